"""Limits of the kernels: sizes, dtypes, GPUs, intervals of saved states. Imports no JAX."""

SIZE_MULTIPLE = 4
"""N and V are multiples of it: a row of float32 is then whole pieces of 16 bytes, as bulk copies
need; bfloat16 is padded to them."""
MAX_SIZE = 128
"""Largest N and V: a warpgroup holds 32 columns of 128 keys, 32 registers a lane."""
DTYPES = ("float32", "bfloat16")

MIN_COMPUTE_CAPABILITY = (8, 0)
"""Ampere, the first with `cp.async` and the mma instructions of bfloat16 and tf32."""
COMPUTE_CAPABILITY_BELOW = (13, 0)
"""The first that the kernels have not been compiled for."""
BULK_COPIES_FROM = (9, 0)
"""Hopper, the first with bulk tensor copies (TMA). Source: CUDA C++ Programming Guide, technical
specifications per compute capability."""
BEFORE_HOPPER_JAX = (0, 11)
"""The first JAX that lowers kernels for less; 0.10.2 aborts the process there."""
RUN_FOR = ((9, 0),)
"""Compute capabilities of the GPUs on which the tests have run: H100 and H200. For others the
kernels have been compiled, by `benchmarks/compiled_kernels.py`, and run on those two as an A100 and
an RTX 4090 take them."""

SAVED_STATE_GROUP = 8
"""Steps of a group, which the backward kernel replays at once from the saved state before it. A
chunk is whole groups, and a bulk copy a multiple of 128 bytes, so 8 steps or more."""
MAX_GROUPED_INTERVAL = 32
"""Largest `saved_state_interval` for which the state before every group is saved instead. That is
faster than recomputing it: `pallas_kernels/README.md`, log. Larger intervals are rounded up to a
multiple of it, which every chunk divides."""


def takes_size(size: int) -> bool:
    """Whether the kernels take an N or V of this size."""
    return size % SIZE_MULTIPLE == 0 and size <= MAX_SIZE


class UnsupportedError(NotImplementedError):
    """A call that a kernel does not take; its text is a clause without subject."""


def require_supported(n_state: int, n_value: int, dtype: str) -> None:
    """Checks the sizes `[N, V]` of a state and the dtype of q, k, v.

    Raises:
        UnsupportedError: the kernels do not take them.
    """
    if dtype not in DTYPES:
        raise UnsupportedError(f"takes {' and '.join(DTYPES)}, got {dtype}")
    for name, size in (("N", n_state), ("V", n_value)):
        if not takes_size(size):
            raise UnsupportedError(
                f"takes {name} a multiple of {SIZE_MULTIPLE} up to {MAX_SIZE}, got {size}"
            )
