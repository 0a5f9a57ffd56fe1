"""The recurrence's blocks in terms of whole arrays, for Pallas's interpreter.

The interpreter knows no layouts and no MLIR: these classes compute what `Registers` and
`BlockSteps` compute on a GPU, and keep the same partial results in the same memory.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.common.aliases import Ref
from pallas_kernels.recurrence.backward_block import BlockSteps
from pallas_kernels.recurrence.backward_lanes import StepKind
from pallas_kernels.recurrence.block import KEYS, Axes
from pallas_kernels.recurrence.forward_registers import Registers
from pallas_kernels.recurrence.mma_fragments import MMA_STEPS


@dataclasses.dataclass(frozen=True)
class ArrayRegisters(Registers):
    """`Registers` without layouts."""

    def cast(self, x: Array, axes: Axes) -> Array:
        return x

    def load(self, ref: Ref, axes: Axes) -> Array:
        return ref[...]

    def wide(self, x: Array, axes: Axes) -> Array:
        return x.astype(jnp.float32)

    def sums_over_keys(self, x: Array, *ys: Array) -> tuple[Array, ...]:
        ys = tuple(self.spread(y, KEYS) for y in ys)
        return tuple(jnp.sum(x * y, axis=2) for y in ys)

    def store(self, ref: Ref, x: Array, axes: Axes) -> None:
        ref[...] = x.astype(ref.dtype)


@dataclasses.dataclass(frozen=True)
class ArraySteps(BlockSteps):
    """`BlockSteps` without lanes."""

    def load(self, ref: Ref) -> Array:
        return ref[...]

    def store(self, ref: Ref, state: Array) -> None:
        ref[...] = state

    def replay(self, n: int, state: Array, **refs: Ref) -> Array:
        states, own_states = refs.pop("states", None), refs.pop("own_states", None)
        after, rows = _replay(self.kind, state, **refs)
        if own_states is not None:
            own_states[...] = rows.astype(own_states.dtype)
        elif states is not None:
            states[...] = rows[int(self.config.first_in_registers) :].astype(states.dtype)
        return after

    def backpropagate(
        self, n: int, d_state: Array, after: Array, first: Array | None = None, **refs: Ref
    ) -> tuple[Array, Array]:
        d_keys, states = refs.pop("d_keys"), refs.pop("states")
        states = refs.pop("own_states", states)
        held = states[:n] if first is None else jnp.concatenate([first[None], states[: n - 1]])
        rows, d_before, before = _backpropagate(self.kind, held, d_state, after, **refs)
        d_keys[...] = rows.astype(d_keys.dtype)
        return d_before, before

    def backpropagate_and_replay(
        self,
        d_state: Array,
        after: Array,
        state: Array,
        *,
        replayed: Mapping[str, Ref],
        sums: Mapping[str, Ref],
        **refs: Ref,
    ) -> tuple[Array, Array, Array]:
        self.add_d_keys(sums=sums["earlier_sums"], d_keys=sums["earlier_d_keys"])
        state_after = self.replay(MMA_STEPS, state, **replayed)
        states = refs.pop("states")[:MMA_STEPS]
        rows, d_before, before = _backpropagate(self.kind, states, d_state, after, **refs)
        own = sums["sums"]
        padded = jnp.pad(rows.reshape(-1), (0, math.prod(own.shape) - rows.size))
        own[...] = padded.reshape(own.shape)
        return d_before, before, state_after

    def add_d_keys(self, *, sums: Ref, d_keys: Ref) -> None:
        rows = sums[...].reshape(-1)[: math.prod(d_keys.shape)]
        d_keys[...] = rows.reshape(d_keys.shape).astype(d_keys.dtype)

    def add_scalars(self, *, partial_scalars: Ref, d_scalars: Ref) -> None:
        partial = partial_scalars[...]  # by warp, 4 of each
        by_head = partial.reshape(*partial.shape[:2], self.config.heads, -1)
        d_scalars[...] = jnp.sum(by_head, axis=3)


def _per_step(kind: StepKind, scalars: Array) -> tuple[Array, Array, Array, Array]:
    """Decay, write gate, keep and live, `[steps, heads]`, from `[heads, scalars, steps]`."""
    rows = jnp.moveaxis(scalars, 2, 0)
    one = jnp.ones_like(rows[..., 0])
    gate = rows[..., 1] if kind.has_write_gate else one
    keep = rows[..., 1 + kind.has_write_gate] if kind.has_keep else one
    live = rows[..., 1 + kind.has_write_gate + kind.has_keep] if kind.has_live else one
    return rows[..., 0], gate, keep, live


def _replay(
    kind: StepKind, state: Array, *, k: Ref, scalars: Ref, delta: Ref
) -> tuple[Array, Array]:
    """The state after the steps, and those before each."""

    def step(state: Array, x: Any) -> Any:
        k, delta, (decay, gate, _, live) = x
        after = state * decay[:, None, None] + (gate[:, None] * delta)[:, :, None] * k[:, None, :]
        if not kind.linear_state:
            after = jnp.tanh(after)
        return jnp.where(live[:, None, None] > 0, after, state), state

    x = k[...].astype(jnp.float32), delta[...], _per_step(kind, scalars[...])
    return lax.scan(step, state, x)


def _backpropagate(
    kind: StepKind,
    states: Array,
    d_state: Array,
    after: Array,
    *,
    k: Ref,
    q: Ref,
    scalars: Ref,
    delta: Ref,
    d_out: Ref,
    d_v: Ref,
    partial_scalars: Ref,
) -> tuple[Array, Array, Array]:
    """The gradients of q and k, `[2, n, heads, keys]`, then what `backpropagate` returns, from the
    states before each of n steps."""

    def step(d_after: Array, x: Any) -> Any:
        k, q, d_o, (decay, gate, keep, live), delta, before, after = x
        d_after = d_after + d_o[:, :, None] * q[:, None, :]
        d_q = jnp.einsum("hvn,hv->hn", after, d_o)
        d_sum = d_after if kind.linear_state else d_after * (1 - after * after)
        d_correction = jnp.einsum("hvn,hn->hv", d_sum, k)
        d_v = gate[:, None] * d_correction
        d_read = -keep[:, None] * d_v
        d_k = jnp.einsum("hvn,hv->hn", before, d_read)
        d_k = d_k + jnp.einsum("hvn,hv->hn", d_sum, gate[:, None] * delta)
        d_before = decay[:, None, None] * d_sum + d_read[:, :, None] * k[:, None, :]
        d_before = jnp.where(live[:, None, None] > 0, d_before, d_after)
        d_decay = jnp.sum(d_sum * before, axis=(1, 2))
        return d_before, (d_q, d_k, d_v, d_decay, d_correction)

    rows = states.astype(jnp.float32)
    x = (
        *(ref[...].astype(jnp.float32) for ref in (k, q, d_out)),
        _per_step(kind, scalars[...]),
        delta[...],
        rows,
        jnp.concatenate([rows[1:], after[None]]),
    )
    # The interpreter ignores `reverse=True` of a scan.
    d_state, results = lax.scan(step, d_state, jax.tree.map(lambda x: x[::-1], x))
    d_q, d_k, d_values, d_decay, d_correction = jax.tree.map(lambda x: x[::-1], results)
    d_v[...] = d_values.astype(d_v.dtype)
    d_gate = [jnp.sum(d_correction * delta[...], axis=2)] if kind.has_write_gate else []
    d_scalars = jnp.stack([d_decay, *d_gate])[..., None]  # [1 or 2, n, heads, 1]
    # The whole sum in the first of a head's partial sums.
    of_head = math.prod(partial_scalars.shape[2:]) // d_scalars.shape[2]
    padded = jnp.pad(d_scalars, ((0, 0), (0, 0), (0, 0), (0, of_head - 1)))
    partial_scalars[...] = padded.reshape(partial_scalars.shape)
    return jnp.stack([d_q, d_k]), d_state, rows[0]
