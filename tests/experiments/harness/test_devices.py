import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments.cli.errors import UsageError
from experiments.harness import devices
from pallas_kernels import target

SETTINGS: Any = jax.config
FRACTIONS = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
OTHERS = (
    *["XLA_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_PREALLOCATE"],
    *["XLA_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_ALLOCATOR"],
)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = SETTINGS.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (*FRACTIONS, *OTHERS, "PJRT_NPROC", "PYTHON_CPU_COUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "_CPU_QUOTA", tmp_path / "cpu.max")
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_of_a_gpu_are_kept(tmp_path: Path) -> None:
    with target.use(target.H100):
        devices.set_up()
    assert SETTINGS.jax_compilation_cache_dir == str(tmp_path / "e88_jax")


def test_where_the_user_said() -> None:
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    with target.use(target.H100):
        devices.set_up()
    assert SETTINGS.jax_compilation_cache_dir == "elsewhere"


def test_programs_of_a_cpu_are_not() -> None:
    with target.use(target.CPU):
        devices.set_up()
    assert SETTINGS.jax_compilation_cache_dir is None


@pytest.mark.parametrize("cache", ["file", "file/deeper", "locked"])
def test_a_home_that_cannot_be_written(
    cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / cache))
    with target.use(target.H100):
        devices.set_up()
    assert capsys.readouterr().err == ""  # nothing is cached anyway, see conftest.py
    monkeypatch.setattr(type(jax.config), "jax_enable_compilation_cache", True)
    with target.use(target.H100):
        devices.set_up()
    assert SETTINGS.jax_compilation_cache_dir is None
    assert capsys.readouterr().err == (
        "warning: compiled programs are not kept for the next run, as "
        f"{tmp_path / cache}/.cache/e88_jax cannot be written: JAX_COMPILATION_CACHE_DIR names "
        "another directory.\n"
    )


@pytest.mark.parametrize("own", FRACTIONS)
def test_memory_of_a_gpu(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.set_up()
    assert os.environ[FRACTIONS[0]] == devices.GPU_MEMORY_FRACTION
    monkeypatch.delenv(FRACTIONS[0])
    monkeypatch.setenv(own, "0.5")
    devices.set_up()
    # JAX refuses both together.
    assert [os.environ[name] for name in FRACTIONS if name in os.environ] == ["0.5"]


@pytest.mark.parametrize("own", OTHERS)
def test_memory_that_the_user_does_not_want_taken_at_once(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(own, "false")
    devices.set_up()
    assert not any(name in os.environ for name in FRACTIONS)


def cpu_devices(monkeypatch: pytest.MonkeyPatch, **config: int) -> int | None:
    """How many `set_up` asks JAX for, which has not started yet; None if it leaves that alone."""
    return asked_of_jax(monkeypatch, **config)[0]


def asked_of_jax(monkeypatch: pytest.MonkeyPatch, **config: int) -> tuple[int | None, str | None]:
    """CPU devices and threads that `set_up` asks JAX for, which has not started yet."""
    asked = {}
    with monkeypatch.context() as unstarted:
        unstarted.setattr(os, "environ", environment := dict(os.environ))
        unstarted.setattr(jax.config, "update", asked.__setitem__)
        for name, value in config.items():
            unstarted.setattr(type(jax.config), name, value)
        devices.set_up()
    return asked.get("jax_num_cpu_devices"), environment.get("PJRT_NPROC")


def test_a_device_for_each_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert cpu_devices(monkeypatch) == 6
    monkeypatch.setenv("PYTHON_CPU_COUNT", "default")
    assert cpu_devices(monkeypatch) == 6
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_devices(monkeypatch) == 6
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert cpu_devices(monkeypatch) == 4
    (tmp_path / "cpu.max").write_text("900000 100000\n")
    assert cpu_devices(monkeypatch) == 6
    (tmp_path / "cpu.max").write_text("20000 100000\n")
    assert cpu_devices(monkeypatch) == 1
    (tmp_path / "cpu.max").unlink()
    for name in ("PJRT_NPROC", "PYTHON_CPU_COUNT"):
        monkeypatch.setenv(name, "3")
        assert cpu_devices(monkeypatch) == 3
        monkeypatch.setenv(name, "99")
        assert cpu_devices(monkeypatch) == 6


def test_threads_for_programs_beside_an_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert asked_of_jax(monkeypatch) == (6, "8")
    monkeypatch.setenv("PJRT_NPROC", "2")
    assert asked_of_jax(monkeypatch) == (2, "4")
    monkeypatch.setenv("PJRT_NPROC", "1")
    assert asked_of_jax(monkeypatch) == (1, "1")


def test_as_many_devices_as_the_user_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=1")
    assert cpu_devices(monkeypatch) is None
    monkeypatch.setenv("XLA_FLAGS", "")
    for n in (0, 1, 3):
        assert cpu_devices(monkeypatch, jax_num_cpu_devices=n) is None


def test_jax_reads_the_number_of_devices_where_it_is_looked_for() -> None:
    code = (
        "from experiments.harness import devices; devices.set_up(); "
        "import jax; print(len(jax.devices()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "3"},
        cwd=Path(__file__).parents[2] / "experiments",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "3\n"


@pytest.mark.parametrize("error", [RuntimeError("no such platform\nmore"), AssertionError()])
def test_a_platform_that_is_not_there(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    why = "no such platform$" if str(error) else "no such device"
    with pytest.raises(UsageError, match=rf"JAX cannot start \(JAX_PLATFORMS='abacus'\): {why}"):
        devices.set_up()
