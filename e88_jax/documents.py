"""Packed documents and right-padded rows: where they begin and end, and how they stay apart."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from e88_jax.typed import checkpoint


class Inputs(NamedTuple):
    """The arrays of an op that are differentiated. q and k may have fewer heads than v, G of them,
    each shared by H / G in a row."""

    q: Array  # [B, T, G, N]
    k: Array  # [B, T, G, N]
    v: Array  # [B, T, H, V]
    decay: Array  # [B, T, H]; its logarithm, of an op that takes that
    write_gate: Array | None  # [B, T, H]
    initial_state: Array | None  # [B, H, N, V]


class _Spoilt(NamedTuple):
    """Where results are NaN, because an input that they depend on is not finite."""

    out: Array  # [B, T, H] bool
    final_state: Array  # [B, H] bool


def of_rows(
    recurrence: Callable[..., tuple[Array, Array]],
    x: Inputs,
    segment_ids: Array | None,
    lengths: Array | None,
) -> tuple[Array, Array]:
    """The op on rows of documents, by a recurrence that takes `starts` and `live`.

    Args:
        recurrence: from the inputs, `starts` and `live`, `[B, T]` bool or None, to
            `(out, final_state)`. A step in `starts` starts from a zero state; a step not in `live`
            keeps the state, has zeros as inputs, and its outputs mean nothing.
        x, segment_ids, lengths: as `e88_recurrence` takes them.
    """
    if segment_ids is None and lengths is None:
        return recurrence(*x, None, None)
    starts = None if segment_ids is None else document_starts(segment_ids)
    live = None if lengths is None else live_steps(lengths, x.q.shape[1])
    if starts is not None and live is not None:
        starts &= live
    x, spoilt = _keep_apart(x, starts, live)
    out, state = recurrence(*x, starts, live)
    out = _filled(out, spoilt.out, jnp.nan)
    if live is not None:
        out = _filled(out, ~live, 0)
    return out, _filled(state, spoilt.final_state, jnp.nan)


def document_starts(segment_ids: Array) -> Array:
    """Where the id changes from the step before, `[B, T]` bool; never at step 0."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = jnp.zeros((segment_ids.shape[0], 1), bool)
    return jnp.concatenate([first, changes], axis=1)


def live_steps(lengths: Array, time: int) -> Array:
    """Steps before the end of their row, `[B, T]` bool."""
    return jnp.arange(time, dtype=jnp.int32)[None, :] < lengths[:, None]


def _keep_apart(x: Inputs, starts: Array | None, live: Array | None) -> tuple[Inputs, _Spoilt]:
    """The inputs with zeros for values that are not finite or past the end of their row.

    A zero gradient times NaN is NaN, and would cross the border of a document although the state is
    cleared there. So a value that is not finite is zeroed before the recurrence, with all that
    follows in its document and head; the op puts NaN into the results that depend on it.
    """
    steps = jnp.arange(x.q.shape[1], dtype=jnp.int32)[None, :]
    heads = x.v.shape[2]
    begins = jnp.zeros_like(steps) if starts is None else jnp.where(starts, steps, 0)
    ended = None if live is None else ~live[:, :, None]

    def since(bad: Array) -> Array:
        """Where a step is bad, and from there to the end of its document."""
        latest = lax.cummax(jnp.where(bad, steps[:, :, None], -1), axis=1)
        return latest >= lax.cummax(begins, axis=1)[:, :, None]

    def within(bad: Array) -> Array:
        return bad if ended is None else bad & ~ended

    def of_heads(bad: Array) -> Array:
        """From the heads of q or k to those of v."""
        return jnp.repeat(bad, heads // bad.shape[2], axis=2)

    def cleared(y: Array | None, bad: Array) -> Array | None:
        return None if y is None else _filled(y, bad if ended is None else bad | ended, 0)

    q_bad, k_bad = within(_not_finite(x.q, 3)), within(_not_finite(x.k, 3))
    written = (y for y in (x.v, x.decay, x.write_gate) if y is not None)
    writes_bad = functools.reduce(jnp.logical_or, (within(_not_finite(y, 3)) for y in written))
    writes_bad |= of_heads(k_bad)
    initial_state = x.initial_state
    if initial_state is not None:
        bad = _not_finite(initial_state, 2)
        writes_bad = jnp.concatenate([writes_bad[:, :1] | bad[:, None], writes_bad[:, 1:]], axis=1)
        initial_state = _filled(initial_state, bad, 0)

    state_bad = since(writes_bad)
    out_bad = state_bad | of_heads(q_bad)
    # A key that others share stays where it is finite: their documents go on.
    shared = x.k.shape[2] != heads
    q = cleared(x.q, q_bad if shared else out_bad)
    k = cleared(x.k, since(k_bad) if shared else state_bad)
    v, decay, write_gate = (cleared(y, state_bad) for y in x[2:5])
    inputs = Inputs(q, k, v, decay, write_gate, initial_state)  # pyright: ignore[reportArgumentType]
    return inputs, _Spoilt(out_bad, state_bad[:, -1])


def _not_finite(x: Array, n_axes: int) -> Array:
    """Whether any value is not finite, over all axes but the first `n_axes`."""
    return jnp.any(~jnp.isfinite(x), axis=tuple(range(n_axes, x.ndim)))


def _filled(x: Array, where: Array, value: float) -> Array:
    """x with `value` where `where` holds, a bool of its first axes."""

    def fill(x: Array, where: Array) -> Array:
        where = where.reshape(*where.shape, *(1,) * (x.ndim - where.ndim))
        return jnp.where(where, jnp.asarray(value, x.dtype), x)

    return checkpoint(fill)(x, where)  # saves `where`, not its broadcast
