"""Linear recurrences of a matrix state by chunks of steps: matmuls within a chunk, a scan over
chunks.

The chunk form of state-space duality and, for the delta rule, its WY representation with decay
(Mamba2, DeltaNet and Gated DeltaNet: `docs/references.md`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from e88_jax.meshes import varying_alike
from e88_jax.mixers.activations import CHUNK
from e88_jax.precision import wide_dtype
from e88_jax.typed import checkpoint, einsum

_FORGOTTEN = -1e5
"""Logarithm of a decay that leaves nothing, in place of -inf, which no matmul takes."""


def chunked(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    write_gate: Array,
    initial_state: Array | None,
    starts: Array | None,
    *,
    delta_rule: bool,
    chunk: int = CHUNK,
) -> tuple[Array, Array]:
    """`sequential`, whose arguments and results these are, by chunks.

    With S the state before a chunk, t and s its steps, and D[t, s] the product of the decays after
    s up to t (E[t] of all up to t, L[s] of all after s):

        U = T (beta V) - W S          T = (I + tril(beta D (K K^T), -1))^-1 by the delta rule,
        W = T (beta E K)              else T = I and W = 0
        O = E Q S + (D Q K^T) U
        S = E[last] S + K^T (L U)

    Matmuls of float32 inputs are exact to float32; of bfloat16 inputs, in the GPU's TF32. `chunk`
    is a power of two.

    Raises:
        NotImplementedError: the number of steps is symbolic, of `jax.export`.
    """
    batch, groups, n_key = q.shape[0], *q.shape[2:]
    time: Any = q.shape[1]
    if not isinstance(time, int):
        raise NotImplementedError("takes no symbolic number of steps")
    heads, n_value = v.shape[2:]
    wide, dtype = wide_dtype(q.dtype), v.dtype
    precision = lax.Precision.DEFAULT if q.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dot = functools.partial(einsum, precision=precision)
    chunk = min(chunk, 1 << (time - 1).bit_length())  # a power of two, as `_inverse` needs

    def split(x: Array, *axes: int) -> Array:
        """`[chunks, B, G, (R,) steps, ...]` of `[B, T, ...]`, whose heads are `axes`. A step of
        zeros at the end leaves the state as it is."""
        past = jnp.zeros((batch, -time % chunk, *x.shape[2:]), wide)
        x = jnp.concatenate([x.astype(wide), past], axis=1)
        x = x.reshape(batch, -1, chunk, *axes, *x.shape[3:])
        return jnp.moveaxis(x, (1, 2), (0, 2 + len(axes)))

    if starts is not None:
        log_decay = jnp.where(starts[:, :, None], _FORGOTTEN, log_decay)
    repeats = heads // groups
    keys, queries = split(k, groups), split(q, groups)
    values = split(v, groups, repeats)
    log_decay = jnp.maximum(split(log_decay, groups, repeats), _FORGOTTEN)
    beta = split(write_gate, groups, repeats)

    within = checkpoint(functools.partial(_within, dot, delta_rule))
    writes, weights, before, after = within(keys, values, log_decay, beta)

    state = initial_state
    if state is None:
        state, writes = varying_alike(jnp.zeros((batch, heads, n_key, n_value), wide), writes)
    state = state.astype(wide).reshape(batch, groups, repeats, n_key, n_value)

    def one(
        state: Array, x: tuple[Array, Array | None, Array, Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        writes, weights, keys, after, whole = x
        if weights is not None:
            writes -= dot("bgrtk,bgrkv->bgrtv", weights, state)
        added = dot("bgtk,bgrtv->bgrkv", keys, after[..., None] * writes)
        return whole[..., None, None] * state + added, (state, writes)

    final, (states, writes) = lax.scan(one, state, (writes, weights, keys, after, before[..., -1]))
    out = checkpoint(functools.partial(_outputs, dot))(queries, keys, log_decay, states, writes)
    out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(batch, -1, heads, n_value)[:, :time]
    return out.astype(dtype), final.reshape(batch, heads, n_key, n_value)


# The backward pass recomputes what a chunk has of matrices [C, C]: they would take more memory than
# the states.


def _within(
    dot: Callable[..., Array],
    delta_rule: bool,
    keys: Array,
    values: Array,
    log_decay: Array,
    beta: Array,
) -> tuple[Array, Array | None, Array, Array]:
    """T (beta V), W (None without the delta rule), E and L of every chunk."""
    between, before, after = _decays(log_decay)
    writes = beta[..., None] * values
    if not delta_rule:
        return writes, None, before, after
    overlap = dot("nbgtk,nbgsk->nbgts", keys, keys)[:, :, :, None]
    solved = _inverse(jnp.tril(beta[..., None] * between * overlap, -1))
    writes = dot("nbgrts,nbgrsv->nbgrtv", solved, writes)
    decayed = (beta * before)[..., None] * keys[:, :, :, None]
    return writes, dot("nbgrts,nbgrsk->nbgrtk", solved, decayed), before, after


def _outputs(
    dot: Callable[..., Array],
    queries: Array,
    keys: Array,
    log_decay: Array,
    states: Array,
    writes: Array,
) -> Array:
    """O of every chunk, from the state before it and U."""
    between, before, _ = _decays(log_decay)
    scores = between * dot("nbgtk,nbgsk->nbgts", queries, keys)[:, :, :, None]
    of_state = before[..., None] * dot("nbgtk,nbgrkv->nbgrtv", queries, states)
    return of_state + dot("nbgrts,nbgrsv->nbgrtv", scores, writes)


def _decays(log_decay: Array) -> tuple[Array, Array, Array]:
    """D `[..., C, C]`, E and L `[..., C]` of logarithms `[..., C]`."""
    between = jnp.tril(jnp.exp(_sums_between(log_decay)))
    return between, jnp.exp(jnp.cumsum(log_decay, axis=-1)), between[..., -1, :]


def _sums_between(x: Array) -> Array:
    """Sums of x `[..., C]` over the elements after s up to t, `[..., t, s]`; 0 where t <= s.

    A difference of two cumulative sums would cancel: after one decay near 0 the others would be
    lost. As one matmul with ones and zeros, exact but for the sum.
    """
    n = x.shape[-1]
    step = jnp.arange(n, dtype=jnp.int32)
    upto = step[:, None, None] <= step[None, :, None]
    between = upto & (step[:, None, None] > step[None, None, :])  # [l, t, s]
    matrix = between.astype(x.dtype).reshape(n, n * n)
    sums = einsum("...l,lm->...m", x, matrix, precision=lax.Precision.HIGHEST)
    return sums.reshape(*x.shape[:-1], n, n)


@jax.custom_jvp
def _inverse(lower: Array) -> Array:
    """`(I + lower)^-1` of strictly lower triangular matrices `[..., C, C]`, as exact as by
    substitution. C is a power of two.

        [[X, 0], [Z, Y]]^-1 = [[X^-1, 0], [-Y^-1 Z X^-1, Y^-1]]

    A Neumann series would need as few matmuls, but its terms grow to (2 C)^C where keys repeat.
    `lax.linalg.triangular_solve` never returns in JAX 0.10 on a CPU with more devices than cores:
    it takes the threads that it waits for.
    """
    half = lower.shape[-1] // 2
    if not half:
        return jnp.ones_like(lower)
    diagonal = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, last = _inverse(diagonal)
    below = -_matmul(_matmul(last, lower[..., half:, :half]), first)
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([below, last], axis=-1)], axis=-2)


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = _inverse(*primals)
    return inverse, -_matmul(_matmul(inverse, *tangents), inverse)


_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
