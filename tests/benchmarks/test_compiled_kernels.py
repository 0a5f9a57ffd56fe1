"""The compiler's report as it is read, and kernels compiled where JAX can."""

import functools
import importlib.util
import json
from importlib.metadata import version
from typing import Any

import jax
import pytest

from benchmarks import compiled_kernels
from benchmarks.compiled_kernels import (
    GPUS,
    Case,
    Compiled,
    cases,
    compiled_for,
    main,
    read,
    worse_than,
)
from e88_jax import hardware
from experiments.cli.errors import UsageError

OUTPUT = """case: ["recurrence", 32, "bfloat16", "many", false]
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'e88_forward_mosaic_gpu_kernel' for 'sm_86'
ptxas info    : Function properties for e88_forward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 16 barriers, 1 bytes smem
ptxas warning : Registers are spilled to local memory in function 'e88_backward_mosaic_gpu_kernel', 80 bytes spill stores, 48 bytes spill loads
ptxas info    : Compiling entry function 'e88_backward_mosaic_gpu_kernel' for 'sm_86'
ptxas info    : Function properties for e88_backward_mosaic_gpu_kernel
    48 bytes stack frame, 80 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 96 registers, used 16 barriers, 48 bytes cumulative stack size, 1 bytes smem
case: ["recurrence", 128, "float32", "few", true]
refused: needs 162816 bytes of shared memory, of 100352
case: ["decode", 128, "float32", "many", false]
failed: Mosaic GPU kernel exceeds available shared memory
"""  # noqa: E501


def test_the_compilers_output() -> None:
    assert read(OUTPUT.splitlines()) == {
        Case("recurrence", 32, "bfloat16"): [
            Compiled("e88_forward", 48, 0),
            Compiled("e88_backward", 96, 80),
        ],
        Case("recurrence", 128, "float32", "few", True): (
            "refused: needs 162816 bytes of shared memory, of 100352"
        ),
        Case("decode", 128, "float32"): (
            "failed: Mosaic GPU kernel exceeds available shared memory"
        ),
    }


def test_one_gpu_of_every_compute_capability() -> None:
    capabilities = [hardware.find_gpu(name).compute_capability for name in GPUS]
    assert capabilities == [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def test_sizes_that_are_padded_to_the_same_row_are_one_program() -> None:
    found = [(case.size, case.dtype) for case in cases([4, 8, 20, 24])]
    sizes = [(n, "float32") for n in (4, 8, 20, 24)] + [(n, "bfloat16") for n in (4, 20)]
    assert set(found) == set(sizes)
    assert len(found) == 4 * len(sizes)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--gpus rtx1", "unknown GPU 'rtx1'"),
        ("--sizes 30", "30"),
        ("--sizes 132", "132"),
        ("--gpus h100 b200 --listed", "got 2"),
    ],
)
def test_mistakes(flags: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        main(flags.split())


KERNEL = {
    "gpu": "h100",
    **Case("recurrence", 64, "bfloat16")._asdict(),
    **Compiled("e88_backward", 96, 80)._asdict(),
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"spilled_bytes": 84}, "h100 recurrence 64 bfloat16 many False e88_backward: spills 84"),
        ({"size": 32}, "spills 80 bytes, more than 16"),
        ({"dtype": "float32", "spilled_bytes": 0}, "bfloat16 many False e88_backward: not in the"),
        ({"gpu": "b200", "spilled_bytes": 0}, None),
        ({"size": 32, "spilled_bytes": 16}, None),
    ],
)
def test_what_is_worse_than_recorded(change: dict[str, Any], sentence: str | None) -> None:
    found = worse_than([KERNEL], [KERNEL | change])
    assert found == [] if sentence is None else sentence in found[0]


def test_a_program_that_is_refused_is_worse() -> None:
    refused = {"gpu": "h100", **Case("decode", 64, "bfloat16")._asdict(), "refused": "too large"}
    assert worse_than([refused], [refused]) == []
    assert "refused, too large" in worse_than([KERNEL], [refused])[0]
    lost = {key: x for key, x in KERNEL.items() if key in ("gpu", *Case._fields)}
    assert len(worse_than([KERNEL], [lost | {"refused": "too large"}])) == 1


def test_a_check_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling: Any = {Case("recurrence", 32, "bfloat16"): [Compiled("e88_backward", 255, 9999)]}
    monkeypatch.setattr(compiled_kernels, "compiled_for", lambda *_: spilling)
    main(["--gpus", "h100"])
    with pytest.raises(UsageError, match=r"are worse.*\n.*spills 9999 bytes"):
        main(["--gpus", "h100", "--check"])


JAX = tuple(map(int, version("jax").split(".")[:2]))
needs_a_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None
    or JAX < (0, 11)
    or jax.default_backend() == "gpu",
    reason="needs JAX 0.11 or later with its CUDA plugin, and no GPU",
)


@functools.cache
def compiled_at_32(name: str) -> dict[Case, list[Compiled] | str]:
    return compiled_for(hardware.find_gpu(name), [32])


@needs_a_plugin
@pytest.mark.parametrize("name", GPUS)
def test_kernels_compile(name: str) -> None:
    """Without a GPU, for one of every compute capability."""
    compiled = compiled_at_32(name)
    assert compiled.keys() == set(cases([32]))
    for case, kernels in compiled.items():
        assert isinstance(kernels, list), (case, kernels)
        assert len(kernels) == (1 if case.kernel == "decode" else 2)


@needs_a_plugin
@pytest.mark.parametrize("name", GPUS)
def test_no_more_is_spilled_than_recorded(name: str, request: pytest.FixtureRequest) -> None:
    if JAX >= (0, 12) and not hardware.find_gpu(name).target.has_bulk_copies:
        # It assembles by nvJitLink: docs/gpus.md.
        request.applymarker(pytest.mark.xfail(strict=True))
    rows = [
        {"gpu": name, **case._asdict(), **kernel._asdict()}
        for case, kernels in compiled_at_32(name).items()
        for kernel in kernels
        if isinstance(kernel, Compiled)
    ]
    assert worse_than(json.loads(compiled_kernels.RECORDED.read_text())["kernels"], rows) == []
