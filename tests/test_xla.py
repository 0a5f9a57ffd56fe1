import jax
import jax.numpy as jnp
import pytest

from e88_jax.xla import GPU_OPTIONS, xla_options
from pallas_kernels import target


def test_options_of_xla_are_for_gpus_and_give_way_to_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert xla_options() == {}
    with target.use(target.H100):
        assert xla_options() == GPU_OPTIONS
        untuned = xla_options(autotune=False)
        assert untuned == GPU_OPTIONS | {"xla_gpu_autotune_level": "0"}
        gathering = xla_options(gathered_bytes=1000)
        assert gathering == GPU_OPTIONS | {"xla_gpu_all_gather_combine_threshold_bytes": "1000"}
        changed = xla_options(divides_rows=False).items() - GPU_OPTIONS.items()
        early = "xla_gpu_experimental_collective_start_as_early_as_possible"
        assert changed == {(early, False)}
        first, *others = GPU_OPTIONS
        monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/dev/null --{first}=true")
        assert xla_options() == {name: GPU_OPTIONS[name] for name in others}
    # XLA knows them, whatever the device.
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options=untuned | gathering)
