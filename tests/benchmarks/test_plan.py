"""What is read from the text of a compiled program."""

import pytest

from benchmarks import plan
from e88_jax import LMConfig
from e88_jax.sizing import PRESETS, training_memory
from experiments.cli.errors import UsageError
from tests.reference.toy_mixer import ToyConfig

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_add (p0: bf16[16,100], p1: f32[16,30], p2: f32[16]) -> f32[16,30] {
  %p0 = bf16[16,100]{1,0} parameter(0)
  %wide = f32[16,100]{1,0} convert(%p0)
  %slice.1 = f32[16,30]{1,0} slice(%wide), slice={[0:16], [0:30]}
  %slice.2 = f32[16,20]{1,0} slice(%wide), slice={[0:16], [30:50]}
  %p1 = f32[16,30]{1,0} parameter(1)
  %p2 = f32[16]{0} parameter(2)
  %b = f32[16,30]{1,0} broadcast(%p2), dimensions={0}
  %c = f32[16,30]{1,0} multiply(%slice.1, %b)
  ROOT %add = f32[16,30]{1,0} add(%c, %p1)
}

ENTRY %main (x: bf16[16,8], w: bf16[8,100]) -> f32[16,30] {
  %x = bf16[16,8]{1,0} parameter(0), metadata={op_name="x"}
  %w = bf16[8,100]{1,0} parameter(1), metadata={op_name="w"}
  %call = (bf16[16,100]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"
  %y = bf16[16,100]{1,0} get-tuple-element(%call), index=0
  %mpmd.1 = (f32[16,30]{1,0}, f32[16]{0}) custom-call(%y), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/e88_backward/mpmd"}
  %o = f32[16,30]{1,0} get-tuple-element(%mpmd.1), index=0
  %s = f32[16]{0} get-tuple-element(%mpmd.1), index=1
  ROOT %fusion.7 = f32[16,30]{1,0} fusion(%y, %o, %s), kind=kLoop, calls=%fused_add
}
"""  # noqa: E501


def test_kernels_and_the_bytes_they_move() -> None:
    product, recurrence, fusion = plan.kernels_of(PROGRAM)
    y, workspace = 16 * 100 * 2, 64
    assert product == (
        "call",
        "matmuls",
        16 * 8 * 2 + 8 * 100 * 2 + y + workspace,
        product[3],
    )
    assert product.result == "(bf16[16,100], s8[64])"
    assert recurrence[:3] == ("mpmd.1", "recurrence backward", y + (16 * 30 + 16) * 4)
    # Of y it reads two slices, in its own width.
    assert fusion[:3] == ("fusion.7", "everything else", 16 * 50 * 2 + (2 * 16 * 30 + 16) * 4)


OVER_FOUR = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[8,4], y: f32[32], z: bf16[2]) -> f32[2] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[32]{0} parameter(1)
  %z = bf16[2]{0} parameter(2)
  %rs = ((f32[8,4]{1,0}), f32[2,4]{1,0}) reduce-scatter-start(%x), dimensions={0}
  %part = f32[2,4]{1,0} reduce-scatter-done(%rs)
  %ar.1 = ((f32[32]{0}), f32[32]{0}) all-reduce-start(%y), to_apply=%add
  %sum = f32[32]{0} all-reduce-done(%ar.1)
  %ar.2 = f32[32]{0} all-reduce(%sum), to_apply=%add
  %ag = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%z), dimensions={0}
  ROOT %all = bf16[8]{0} all-gather-done(%ag)
}
"""


def test_what_devices_exchange() -> None:
    """Whole arrays: before they are scattered, after they are gathered."""
    assert plan.exchanges_of(OVER_FOUR) == {
        "reduce-scatter": (1, 8 * 4 * 4),
        "all-reduce": (2, 2 * 32 * 4),
        "all-gather": (1, 8 * 2),
    }
    assert plan.kernels_of(OVER_FOUR) == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--mesh auto", "--mesh auto takes the GPUs that are there: give numbers"),
        ("--mesh fsdp=3 --batch-size 3", "--mesh fsdp=3: dim 256 does not divide over fsdp=3"),
        ("--seq-len 0", "--seq-len must be at least 1, got 0"),
        ("--implementation scan", "--implementation scan is a loop"),
    ],
)
def test_mistakes(flags: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        plan.main(flags.split())


def test_memory_beside_the_estimate_if_there_is_one() -> None:
    preset = plan.on_a_gpu(PRESETS["h40n32-100m"].config)
    estimate = training_memory(preset, 2, 512).total / 1e9
    said = plan.memory_line(preset, 2, 512, planned=3_210_000_000)
    assert said == f"memory: 3.21 GB; e88_jax.sizing says {estimate:.2f}"
    of_one = training_memory(preset, 4, 512, fsdp=2).total / 1e9
    said = plan.memory_line(preset, 8, 512, planned=3_210_000_000, mesh="data=2,fsdp=2")
    on_each = "memory: 3.21 GB on each device of"
    assert said == f"{on_each} data=2,fsdp=2; e88_jax.sizing says {of_one:.2f}"
    said = plan.memory_line(preset, 2, 512, planned=3_210_000_000, mesh="heads=2")
    assert said == f"{on_each} heads=2"
    hybrid = LMConfig(dim=16, depth=4, layers=(*preset.layers, ToyConfig(width=5)))
    said = plan.memory_line(plan.on_a_gpu(hybrid), 2, 512, planned=3_210_000_000)
    assert said.startswith("memory: 3.21 GB; training memory is estimated for ")
    assert said.endswith("that of toy has none.")
