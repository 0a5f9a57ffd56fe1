import jax
import jax.numpy as jnp
import pytest

from benchmarks.measure.gpu_profile import (
    COMMUNICATION,
    ELSE,
    Kernel,
    alone_ms,
    breakdown,
    longest,
    part_of,
    profile,
)

KERNELS = [
    Kernel("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", 1000, 4000),
    Kernel("e88_forward_mosaic_gpu_kernel", 5000, 1000),
    Kernel("e88_backward_mosaic_gpu_kernel", 8000, 2000),
    Kernel("input_reduce_fusion_3", 9000, 500),  # beside the one before
    Kernel("input_reduce_fusion_3", 10500, 500),
]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("e88_forward_mosaic_gpu_kernel", "recurrence forward"),
        ("e88_backward_mosaic_gpu_kernel", "recurrence backward"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matmuls"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matmuls"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "matmuls"),
        ("gemm_fusion_dot_general_12", "matmuls"),
        (
            "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            COMMUNICATION,
        ),
        ("loop_convert_fusion_8", ELSE),
        ("MemcpyD2D", ELSE),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_breakdown() -> None:
    ms = breakdown(reversed(KERNELS), steps=2)
    assert ms == pytest.approx(
        {
            COMMUNICATION: 0.0,
            "recurrence forward": 0.0005,
            "recurrence backward": 0.001,
            "matmuls": 0.002,
            ELSE: 0.0005,
            "idle": 0.00125,  # 2000 ns before the backward kernel, 500 before the last
        }
    )
    assert not any(breakdown([], steps=1).values())


def test_communication_that_nothing_hides() -> None:
    kernels = [
        Kernel("ncclDevKernel_AllReduce", 1000, 5000),
        Kernel("ncclDevKernel_AllGather", 5000, 2000),
        Kernel("loop_fusion_1", 0, 2000),
        Kernel("loop_fusion_2", 3000, 1000),
        Kernel("loop_fusion_3", 3500, 2000),
    ]
    # 2000 to 3000, 5500 to 7000 ns.
    assert alone_ms(kernels, COMMUNICATION, steps=2) == pytest.approx(0.00125)
    assert alone_ms(KERNELS, "recurrence backward", steps=1) == pytest.approx(0.0015)
    assert not alone_ms(KERNELS, COMMUNICATION, steps=1)


def test_longest() -> None:
    first, second, *others = longest(KERNELS, steps=2, n=4)
    assert first == {**first, "name": KERNELS[0].name, "calls": 0.5, "part": "matmuls"}
    assert second["name"] == "e88_backward_mosaic_gpu_kernel"
    assert {row["name"]: row["calls"] for row in others} == {
        "e88_forward_mosaic_gpu_kernel": 0.5,
        "input_reduce_fusion_3": 1,
    }
    assert longest(KERNELS, steps=2, n=1) == [first]


def test_without_a_gpu_there_are_no_kernels() -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="no kernel of a GPU"):
        profile(lambda: jax.block_until_ready(jnp.ones(3) + 1))
