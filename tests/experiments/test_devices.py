import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from harness import devices

FRACTIONS = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in FRACTIONS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_of_a_gpu_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    devices.set_up()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "e88_jax")


def test_where_the_user_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    devices.set_up()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"


def test_programs_of_a_processor_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    devices.set_up()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("own", FRACTIONS)
def test_memory_of_a_gpu(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.set_up()
    assert os.environ[FRACTIONS[0]] == devices.GPU_MEMORY_FRACTION
    monkeypatch.delenv(FRACTIONS[0])
    monkeypatch.setenv(own, "0.5")
    devices.set_up()
    # JAX refuses both together.
    assert [os.environ[name] for name in FRACTIONS if name in os.environ] == ["0.5"]
