"""What the kernels take."""

import jax.numpy as jnp

SIZE_MULTIPLE = 4
MAX_SIZE = 128


def unsupported(n_state: int, n_value: int, dtype: jnp.dtype) -> str | None:
    """Why the kernels do not take states `[N, V]` with q, k, v of dtype, or None if they do."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, got {jnp.dtype(dtype).name}"
    for name, size in (("N", n_state), ("V", n_value)):
        if size % SIZE_MULTIPLE or size > MAX_SIZE:
            return f"takes {name} a multiple of {SIZE_MULTIPLE} up to {MAX_SIZE}, got {size}"
    return None
