"""What a layer does for one token between its two matrix products, as one kernel.

A warp has 32 columns of a head's state, and a lane all of one column: so what the recurrence sums
over the keys is a lane's own. The numbers of q and k, each on a lane, come by exchange.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import support
from pallas_kernels.activation import Activation, Split, after_silu, over_length, sigmoid
from pallas_kernels.calls import over_rows
from pallas_kernels.layouts import WARPS, inline
from pallas_kernels.warp import Memory, Warp

LANES = 32
CHAINS = 4
"""Of multiply-adds, into which a sum over keys is cut: each waits for the one before."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is in the columns of the first product, and what is done with it.

    Attributes:
        split: q, k and v, which come first.
        gate: activation of the gate that multiplies the outputs.
        gate_start: column of the first head's gate, where there is one.
        linear_state: leave out the tanh.
    """

    split: Split
    gate: Literal["silu", "sigmoid", "none"]
    gate_start: int
    linear_state: bool

    def unsupported(self, dtype: Any) -> str | None:
        """Why the kernel does not take a product of this dtype, or None if it does."""
        return support.unsupported(self.split.n_state, self.split.n_value, jnp.dtype(dtype))

    @property
    def warps(self) -> int:
        """Of a row."""
        return self.split.heads * self.blocks

    @property
    def blocks(self) -> int:
        """Of columns of a head, each a warp's."""
        return -(-self.split.n_value // LANES)


def _number(w: Any, memory: Any, index: Any) -> Any:
    """Element `index` of a row in memory, in float32."""
    address = w.address(memory, index)
    if memory.itemsize == 4:
        return w.as_float(w.load(memory, address, 1)[0])
    return w.as_float(w.shift_left(w.load_half(memory, address), 16))


def _over_lanes(w: Any, memory: Any, first: Any, n: int, activation: Activation) -> list[Any]:
    """n activated elements: number i on lane i % 32, at i // 32; zeros after them."""
    x = []
    for start in range(0, n, LANES):
        i = w.add(w.lane, start)
        y = _number(w, memory, w.add(first, w.minimum(i, n - 1)))
        if start + LANES > n:
            y = w.as_float(w.select(w.less(i, n), w.as_bits(y), 0))
        x.append(y)
    x, _ = after_silu(w, activation, x)
    if activation.unit_length:
        scale, _ = over_length(w, LANES, x)
        x = [w.fmultiply(y, scale) for y in x]
    return x


def _each(w: Any, x: list[Any], n: int) -> Any:
    """The n elements of `_over_lanes`, one after the other, on every lane."""
    return (w.from_lane(x[i // LANES], i % LANES) for i in range(n))


def _sum_over_keys(w: Any, column: list[Any], x: list[Any]) -> Any:
    sums: list[Any] = []
    for i, (state, key) in enumerate(zip(column, _each(w, x, len(column)), strict=True)):
        if i < CHAINS:
            sums.append(w.fmultiply(state, key))
        else:
            sums[i % CHAINS] = w.fma(state, key, sums[i % CHAINS])
    return functools.reduce(w.fadd, sums)


def step_of_row(w: Any, layer: Layer, group: Any, ref: dict[str, Any]) -> None:
    """Of a row of the batch, by the `group`-th 4 warps.

    Args:
        ref: memory of a row: x `[columns]`, decay and perhaps write_gate `[H]`, state
            `[H, N, V]`, which is updated, and out `[H * V]`, which is written.
    """
    warp = w.add(w.multiply(group, WARPS), w.warp)
    w.when(w.less(warp, layer.warps), lambda: _step_of_warp(w, layer, warp, ref))


def _step_of_warp(w: Any, layer: Layer, warp: Any, ref: dict[str, Any]) -> None:
    split, x, state = layer.split, ref["x"], ref["state"]
    heads, n_state, n_value = split.heads, split.n_state, split.n_value
    head, block = w.divide(warp, layer.blocks)
    column = w.add(w.multiply(block, LANES), w.lane)
    own = w.minimum(column, n_value - 1)
    # None where every lane has a column.
    exists = w.less(column, n_value) if n_value % LANES else None

    first = w.address(state, head, 0, column)
    addresses = [w.add(first, i * state.strides[1]) for i in range(n_state)]
    old = [w.as_float(_load_where(w, exists, state, address)) for address in addresses]

    keys = Activation(split.silu, split.unit_length)
    of_head = w.multiply(head, n_state)
    q, k = (
        _over_lanes(w, x, w.add(of_head, start), n_state, keys) for start in (0, heads * n_state)
    )
    value = w.add(w.multiply(head, n_value), own)
    v = _number(w, x, w.add(value, 2 * heads * n_state))
    ((v,), _) = after_silu(w, Activation(split.silu, False), [v])

    decay = _number(w, ref["decay"], head)
    correction = w.fadd(v, w.negative(_sum_over_keys(w, old, k)))
    if "write_gate" in ref:
        correction = w.fmultiply(correction, _number(w, ref["write_gate"], head))
    new = [
        w.fma(key, correction, w.fmultiply(decay, s))
        for s, key in zip(old, _each(w, k, n_state), strict=True)
    ]
    if not layer.linear_state:
        new = [w.tanh(s, approximate=x.itemsize == 2) for s in new]

    out = _sum_over_keys(w, new, q)
    if layer.gate != "none":
        gate = _number(w, x, w.add(value, layer.gate_start))
        factor = sigmoid(w, gate)
        if layer.gate == "silu":
            factor = w.fmultiply(gate, factor)
        out = w.fmultiply(out, factor)
    word = _word_of(w, ref["out"], out)

    def store() -> None:
        for address, s in zip(addresses, new, strict=True):
            w.store(state, address, [w.as_bits(s)])
        index, _ = w.divide(value, 4 // ref["out"].itemsize)
        w.store(ref["out"], w.multiply(index, 4), [word])

    store() if exists is None else w.when(exists, store)


def _load_where(w: Any, condition: Any, memory: Any, address: Any) -> Any:
    if condition is None:
        return w.load(memory, address, 1)[0]
    return w.load_where(condition, memory, address)


def _word_of(w: Any, memory: Any, x: Any) -> Any:
    """With this lane's number, and in bfloat16 also its neighbour's: as it lies in memory."""
    if memory.itemsize == 4:
        return w.as_bits(x)
    _, odd = w.divide(w.lane, 2)
    is_odd, other = w.equal(odd, 1), w.exchange(x, 1)
    own, other = (w.as_bits(y) for y in (x, other))
    low, high = w.select(is_odd, other, own), w.select(is_odd, own, other)
    return w.pack(w.as_float(low), w.as_float(high))


@functools.cache
def _call(layer: Layer) -> Callable[..., tuple[Array, Array]]:
    def call(x: Array, decay: Array, write_gate: Array | None, state: Array) -> Any:
        groups = -(-layer.warps // WARPS)
        inputs = {"x": x, "decay": decay, "write_gate": write_gate}
        inputs = {name: array for name, array in inputs.items() if array is not None}
        names = [*inputs, "state", "out"]

        def body(*refs: Any) -> None:
            index = lax.axis_index("block")
            row, group = lax.div(index, jnp.int32(groups)), lax.rem(index, jnp.int32(groups))

            def emit(_: Any, group: Any, *refs: Any) -> None:
                memory = dict(zip(names, map(Memory, refs), strict=True))
                step_of_row(Warp(), layer, group.registers.item(), memory)

            types = (plgpu.Layout.WG_SPLAT(()), *(plgpu.RefType() for _ in refs))
            inline(emit, group, *(ref.at[row] for ref in refs), arg_types=types)

        split = layer.split
        updated = jax.new_ref(state)
        run: Any = pl.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((state.shape[0], split.heads * split.n_value), x.dtype),
            mesh=plgpu.Mesh(grid=(state.shape[0] * groups,), grid_names=("block",)),
            compiler_params=plgpu.CompilerParams(
                unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            name="e88_decode_layer",
        )
        return run(*inputs.values(), updated), jax.freeze(updated)

    return over_rows(
        call,
        ("b c", "b h", "b h", "b h n v"),
        lambda *_: ("b d", "b h n v"),
        partition=True,
        no_derivative="a token of a model made for inference cannot be differentiated.",
    )


def decode_layer(
    layer: Layer, x: Array, decay: Array, write_gate: Array | None, state: Array
) -> tuple[Array, Array]:
    """SiLU and unit length of q, k and v, a step of the recurrence, and the output gate.

    Args:
        x: the product `[B, columns]`, float32 or bfloat16, that `layer.unsupported` does not
            refuse.
        decay: `[B, H]` float32.
        write_gate: `[B, H]` float32, or None for 1.
        state: `[B, H, N, V]` float32; updated where it lies if nothing else reads it.

    Returns:
        The gated outputs `[B, H * V]` in x's dtype, and the state after the token.

    Raises:
        ValueError: an empty batch, or another dtype.
    """
    if len(x) == 0:
        raise ValueError(f"no axis may be empty, got x of shape {x.shape}.")
    for name, array in (("decay", decay), ("write_gate", write_gate), ("state", state)):
        if array is not None and array.dtype != jnp.float32:
            raise ValueError(f"{name} must be float32, got {array.dtype}.")
    return _call(layer)(x, decay, write_gate, state)
