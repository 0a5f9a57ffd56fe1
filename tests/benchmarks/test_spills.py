import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import spills
from benchmarks.compiled_kernels import Case
from benchmarks.spills import SpillsConfig, Timed, candidates, compare, table, time_all
from e88_jax.hardware import find_gpu
from experiments.cli.errors import UsageError
from pallas_kernels.common.launch import shared_memory_limit
from pallas_kernels.recurrence.tuning import backward_shared_bytes
from pallas_kernels.target import H100


def kernel(
    gpu: str = "rtx4090",
    size: int = 64,
    spilled: int = 100,
    name: str = "e88_backward",
    **case: Any,
) -> dict[str, Any]:
    about = Case("recurrence", size, "bfloat16")._replace(**case)._asdict()
    return {"gpu": gpu, **about, "name": name, "registers": 96, "spilled_bytes": spilled}


def test_candidates_are_the_chosen_config_and_others_that_fit() -> None:
    found = list(candidates([kernel()]))
    assert [x.is_chosen for x in found] == [True, *[False] * (len(found) - 1)]
    configs = [x.config for x in found]
    assert len(set(configs)) == len(configs) > 5
    assert {x.warpgroups for x in configs} >= {configs[0].warpgroups, configs[0].warpgroups - 2}
    limit = shared_memory_limit(find_gpu("rtx4090").target)
    for config in configs:
        assert backward_shared_bytes(config, 64, "bfloat16", 1, False) <= limit


def test_which_kernels_are_timed() -> None:
    """Backward kernels that spill more than 16 bytes, one of two that differ in options alone."""
    few, forward = kernel(spilled=16), kernel(name="e88_forward")
    assert not list(candidates([few, forward, {"gpu": "h100", "refused": "why"}]))
    twice = [kernel(gpu="h100"), kernel(gpu="h100", every_option=True)]
    chosen = [x.kernel for x in candidates(twice) if x.is_chosen]
    assert chosen == twice[:1]
    other = kernel(gpu="h100", dtype="float32")
    assert sum(x.is_chosen for x in candidates([*twice, other])) == 2


def test_what_is_compared() -> None:
    of_both = list(candidates([kernel(), kernel(gpu="h100")]))
    second = next(i for i, x in enumerate(of_both) if i and x.is_chosen)
    timed = {
        0: Timed(96, 120, 2.0),
        1: Timed(96, 200, 1.0),  # faster, but spills too
        2: Timed(168, 16, 3.0),
        3: Timed(168, 0, 2.5),
        second: Timed(96, 80, 4.0),
    }
    rows = list(compare(of_both, timed, H100))
    assert [(row["gpu"], row["ms"], row["spilled_here"]) for row in rows] == [
        ("rtx4090", 2.0, 120),
        ("h100", 4.0, 80),
    ]
    assert rows[0]["ms_without"] == 2.5
    assert "ms_without" not in rows[1]
    header, lines = table(rows)
    assert all(len(line) == len(header) for line in lines)
    assert lines[0][1:] == ["1", "1", "1", "1.25", "1.25"]
    assert lines[1][1:] == ["1", "0", "0", "-", "-"]


def test_an_sm_of_an_h100_holds_what_one_with_less_memory_does_not() -> None:
    """Two thread blocks of 50 to 99 KB would be timed where there is room for one."""
    rtx4090 = find_gpu("rtx4090").target
    found = list(candidates([kernel(size=128)]))
    configs = [(x.config.warpgroups, x.config.states_held) for x in found]
    one = configs.index((1, 8))
    others = {i: Timed(250, 0, 9.0) for i in range(1, len(found)) if i != one}
    timed = others | {0: Timed(250, 30, 8.0), one: Timed(250, 0, 7.0)}
    bytes_of_one = backward_shared_bytes(found[one].config, 128, "bfloat16", 1, False)
    assert 50 * 1024 < bytes_of_one < 99 * 1024
    assert found[one].blocks_of_an_sm(250, H100) == 2
    assert found[one].blocks_of_an_sm(250, rtx4090) == 1
    (row,) = compare(found, timed, H100)
    assert row["ms_without"] == 9.0
    (row,) = compare(found, timed, rtx4090)
    assert row["ms_without"] == 7.0


WORKER = """#!{python}
import sys
part = int(sys.argv[sys.argv.index("--part") + 1])
for i in range(part, 3, 2):
    print(f"candidate: {{i}}")
    print("ptxas info    : Compiling entry function 'e88_backward_mosaic_gpu_kernel' for 'sm_90a'")
    print(f"    0 bytes stack frame, {{10 * i}} bytes spill stores, 0 bytes spill loads")
    print("ptxas info    : Used 96 registers")
if {ends_early}:
    sys.exit("out of memory")
print("compiled", flush=True)
sys.stdin.readline()
for i in range(part, 3, 2):
    print(f"timed: [{{i}}, {{i + 0.5}}]")
"""


@pytest.mark.parametrize("ends_early", [False, True])
def test_processes_compile_together(
    ends_early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker"
    worker.write_text(WORKER.format(python=sys.executable, ends_early=ends_early))
    worker.chmod(0o755)
    monkeypatch.setattr(spills.sys, "executable", str(worker))
    options = SpillsConfig(processes=2)
    if ends_early:
        with pytest.raises(UsageError, match="out of memory"):
            time_all(3, options)
        return
    assert time_all(3, options) == {i: (96, 10 * i, i + 0.5) for i in range(3)}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an NVIDIA GPU"):
        spills.main(["--json", str(tmp_path / "x.json")])
    assert not list(tmp_path.iterdir())
