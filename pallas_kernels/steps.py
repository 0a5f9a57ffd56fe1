"""The steps of the backward kernel, as functions of a block's state and of references."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import vector

from pallas_kernels import gradient_steps
from pallas_kernels.fragments import STEPS, Fragments, fragment_layout
from pallas_kernels.geometry import Geometry
from pallas_kernels.gradient_steps import StepKind
from pallas_kernels.layouts import elements_of, inline, load_tiled, store_tiled
from pallas_kernels.warp import Memory, Warp


@dataclasses.dataclass(frozen=True)
class Steps:
    """The programs as functions of a block's state `[heads, values, keys]` and of references."""

    kind: StepKind
    geometry: Geometry
    keys: int
    exact: bool  # float32 throughout, and a precise tanh
    interpret: bool

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.geometry.heads, self.geometry.values, self.keys

    @property
    def _layout(self) -> Any:
        return fragment_layout(*self._shape)

    def load(self, ref: Any) -> Array:
        """A state, in the dtype of `ref`."""
        return ref[...] if self.interpret else load_tiled(ref, self._layout)

    def store(self, ref: Any, state: Array) -> None:
        if self.interpret:
            ref[...] = state
        else:
            store_tiled(ref, state, self._layout)

    def replay(self, n: int, state: Array, **refs: Any) -> Array:
        """The state after n steps.

        Args:
            k: `[n, heads, keys]`.
            scalars: `[heads, scalars, n]`.
            errors: `[n, heads, values]` float32.
            states: the states before each step, written, in an order of their own.
        """
        if self.interpret:
            return _replay_in_jax(self.kind, state, **refs)

        def program(f: Fragments, at: Any, state: Any) -> Any:
            return gradient_steps.replay(f, self.kind, at, state, n, self.geometry.unroll_of(n))

        return self._run(program, refs, state)

    def walk_back(self, n: int, d_state: Array, after: Array, **refs: Any) -> tuple[Array, Array]:
        """The gradient of the state before n steps, at most 4, and that state.

        Args:
            d_state, after: the gradient of the state after the steps, and that state.
            k, scalars, errors: as in `replay`.
            q: `[n, heads, keys]`.
            d_out: `[n, heads, values]`.
            d_v: `[n, heads, values]`, written.
            d_keys: `[2, n, heads, keys]`, of q and of k, written.
            partial_scalars: `[1 or 2, n, ...]`, written: numbers that `add_scalars` adds up to the
                gradients of decay and the write gate.
            states: as in `replay`, with room for 4 steps; overwritten.
        """
        if self.interpret:
            d_keys = refs.pop("d_keys")
            rows, d_before, before = _walk_back_in_jax(self.kind, n, d_state, after, **refs)
            d_keys[...] = rows.astype(d_keys.dtype)
            return d_before, before

        def program(f: Fragments, at: Any, d_state: Any, after: Any) -> Any:
            return gradient_steps.walk_back(f, self.kind, at, d_state, after, n)

        return self._run(program, refs, d_state, after)

    def walk_back_and_replay(
        self,
        d_state: Array,
        after: Array,
        state: Array,
        *,
        ahead: Mapping[str, Any],
        sums: Mapping[str, Any],
        **refs: Any,
    ) -> tuple[Array, Array, Array]:
        """`walk_back` of 4 steps, and meanwhile `replay` of 4 others.

        Args:
            d_state, after, refs: of `walk_back`, but for `d_keys`; `states` stays.
            state, ahead: of `replay`: the state before its steps, and its references.
            sums: memory for the sums that are to become `d_keys`, `sums`; what the call before left
                in its own, `earlier_sums`, and the `d_keys` that become of it, `earlier_d_keys`.

        Returns:
            The results of both.
        """
        if self.interpret:
            self.add_d_keys(sums=sums["earlier_sums"], d_keys=sums["earlier_d_keys"])
            replayed = _replay_in_jax(self.kind, state, **ahead)
            rows, d_before, before = _walk_back_in_jax(self.kind, STEPS, d_state, after, **refs)
            own = sums["sums"]
            padded = jnp.pad(rows.reshape(-1), (0, math.prod(own.shape) - rows.size))
            own[...] = padded.reshape(own.shape)
            return d_before, before, replayed

        def program(f: Fragments, at: Any, d_state: Any, after: Any, state: Any) -> Any:
            at_ahead = {name: at.pop(f"{name} ahead") for name in ahead}
            return gradient_steps.walk_back_and_replay(
                f, self.kind, at, at_ahead, d_state, after, state
            )

        refs = {**refs, **sums, **{f"{name} ahead": ref for name, ref in ahead.items()}}
        return self._run(program, refs, d_state, after, state)

    def add_d_keys(self, *, sums: Any, d_keys: Any) -> None:
        """Writes `d_keys` of the last call of `walk_back_and_replay`."""
        if self.interpret:
            rows = sums[...].reshape(-1)[: math.prod(d_keys.shape)]
            d_keys[...] = rows.reshape(d_keys.shape).astype(d_keys.dtype)
        else:
            refs = {"partial": sums, "d_keys": d_keys}
            self._run(lambda f, at: gradient_steps.add_d_keys(f, **at, n=STEPS), refs)

    def add_scalars(self, *, partial_scalars: Any, d_scalars: Any) -> None:
        """Writes `[1 or 2, n, heads]`, the gradients of decay and the write gate, after all warps
        have come back from `walk_back`."""
        if self.interpret:
            partial = partial_scalars[...]  # warps, then 4 numbers of each
            by_head = partial.reshape(*partial.shape[:2], self.geometry.heads, -1)
            d_scalars[...] = jnp.sum(by_head, axis=3)
        else:
            refs = {"partial_scalars": partial_scalars, "d_scalars": d_scalars}
            self._run(lambda f, at: gradient_steps.add_scalars(f, **at), refs)

    def _run(self, program: Any, refs: Mapping[str, Any], *states: Array) -> Any:
        layout = self._layout

        def emit(_: Any, *args: Any) -> Any:
            memory = {name: Memory(ref) for name, ref in zip(refs, args, strict=False)}
            f = Fragments(Warp(), *self._shape, self.exact)
            arrays = args[len(refs) :]
            results = program(f, memory, *(_unpacked(f, x) for x in arrays))
            return jax.tree.map(
                lambda x: _packed(x, arrays[0]), results, is_leaf=lambda x: isinstance(x, list)
            )

        array = plgpu.ShapeDtypeStruct(self._shape, jnp.float32, layout)
        return inline(
            emit,
            *refs.values(),
            *states,
            arg_types=(plgpu.RefType(),) * len(refs) + (layout,) * len(states),
            return_type=(None, array, (array, array), (array, array, array))[len(states)],
        )


def _unpacked(f: Fragments, x: mgpu.FragmentedArray) -> Any:
    """A state as fragments: its registers count units, tiles of keys, and columns."""
    elements = [elements_of(register) for register in x.registers.flat]
    pairs = [
        list(pair)
        for i in range(0, len(elements), 2)
        for pair in zip(elements[i], elements[i + 1], strict=True)
    ]
    return [pairs[u * f.n_keys : (u + 1) * f.n_keys] for u in range(f.units)]


def _packed(state: Any, like: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    register_type = like.registers.flat[0].type
    pairs = [pair for unit in state for pair in unit]
    (length,) = register_type.shape
    registers = np.empty(like.registers.shape, dtype=object)
    registers.flat[:] = [
        vector.from_elements(register_type, [pair[column] for pair in pairs[i : i + length]])
        for i in range(0, len(pairs), length)
        for column in range(2)
    ]
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)


# In terms of arrays, for the interpreter.


def _per_step(kind: StepKind, scalars: Array) -> tuple[Array, Array, Array, Array]:
    """Decay, write gate, keep and live, `[steps, heads]`, from `[heads, scalars, steps]`."""
    rows = jnp.moveaxis(scalars, 2, 0)
    one = jnp.ones_like(rows[..., 0])
    gate = rows[..., 1] if kind.has_write_gate else one
    keep = rows[..., 1 + kind.has_write_gate] if kind.has_keep else one
    live = rows[..., 1 + kind.has_write_gate + kind.has_keep] if kind.has_live else one
    return rows[..., 0], gate, keep, live


def _replay_in_jax(
    kind: StepKind, state: Array, *, k: Any, scalars: Any, errors: Any, states: Any
) -> Array:
    def step(state: Array, x: Any) -> Any:
        k, error, (decay, gate, _, live) = x
        after = state * decay[:, None, None] + (gate[:, None] * error)[:, :, None] * k[:, None, :]
        if not kind.linear_state:
            after = jnp.tanh(after)
        return jnp.where(live[:, None, None] > 0, after, state), state

    x = k[...].astype(jnp.float32), errors[...], _per_step(kind, scalars[...])
    after, rows = lax.scan(step, state, x)
    states[...] = rows.astype(states.dtype)
    return after


def _walk_back_in_jax(
    kind: StepKind,
    n: int,
    d_state: Array,
    after: Array,
    *,
    k: Any,
    q: Any,
    scalars: Any,
    errors: Any,
    states: Any,
    d_out: Any,
    d_v: Any,
    partial_scalars: Any,
) -> tuple[Array, Array, Array]:
    """The gradients of q and k, `[2, n, heads, keys]`, then what `walk_back` returns."""

    def step(d_after: Array, x: Any) -> Any:
        k, q, d_o, (decay, gate, keep, live), error, before, after = x
        d_after = d_after + d_o[:, :, None] * q[:, None, :]
        d_q = jnp.einsum("hvn,hv->hn", after, d_o)
        d_sum = d_after if kind.linear_state else d_after * (1 - after * after)
        d_correction = jnp.einsum("hvn,hn->hv", d_sum, k)
        d_v = gate[:, None] * d_correction
        d_read = -keep[:, None] * d_v
        d_k = jnp.einsum("hvn,hv->hn", before, d_read)
        d_k = d_k + jnp.einsum("hvn,hv->hn", d_sum, gate[:, None] * error)
        d_before = decay[:, None, None] * d_sum + d_read[:, :, None] * k[:, None, :]
        d_before = jnp.where(live[:, None, None] > 0, d_before, d_after)
        d_decay = jnp.sum(d_sum * before, axis=(1, 2))
        return d_before, (d_q, d_k, d_v, d_decay, d_correction)

    rows = states[:n].astype(jnp.float32)
    x = (
        *(ref[...].astype(jnp.float32) for ref in (k, q, d_out)),
        _per_step(kind, scalars[...]),
        errors[...],
        rows,
        jnp.concatenate([rows[1:], after[None]]),
    )
    # The interpreter's loops go forwards whatever they are told.
    d_state, results = lax.scan(step, d_state, jax.tree.map(lambda x: x[::-1], x))
    d_q, d_k, d_values, d_decay, d_correction = jax.tree.map(lambda x: x[::-1], results)
    d_v[...] = d_values.astype(d_v.dtype)
    d_gate = [jnp.sum(d_correction * errors[...], axis=2)] if kind.has_write_gate else []
    d_scalars = jnp.stack([d_decay, *d_gate])[..., None]  # [1 or 2, n, heads, 1]
    # All in the first number of a head.
    of_head = math.prod(partial_scalars.shape[2:]) // d_scalars.shape[2]
    padded = jnp.pad(d_scalars, ((0, 0), (0, 0), (0, 0), (0, of_head - 1)))
    partial_scalars[...] = padded.reshape(partial_scalars.shape)
    return jnp.stack([d_q, d_k]), d_state, rows[0]
