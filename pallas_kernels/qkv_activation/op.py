"""q, k and v from the output of the matmul that computes them side by side: SiLU and unit length.

One kernel reads the output once, another computes its gradient; XLA takes two passes each, as the
length of a row is a sum over it. A thread block has some tokens of q, k or v. Lanes side by side
hold 16 bytes of a head each, so that a sum over a row takes a few shuffles.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.aliases import Index, Ref
from pallas_kernels.common.batching import over_rows
from pallas_kernels.common.lane_ops import LaneOps, Memory
from pallas_kernels.common.launch import run_blocks
from pallas_kernels.common.mosaic import inline
from pallas_kernels.qkv_activation import lanes
from pallas_kernels.qkv_activation.columns import HeadColumns, Part


def activate(
    columns: HeadColumns, y: Array, n_rest: int | None = None
) -> tuple[Array, Array, Array, Array]:
    """q, k, v and the rest of a matmul's output; differentiable once.

    Args:
        columns: layout of the output, and which activations are applied.
        y: `[B, T, columns]`, float32 or bfloat16.
        n_rest: columns after those of q, k and v that are no padding; None for all.

    Returns:
        q and k `[B, T, H, N]`, v `[B, T, H, V]`, and the `n_rest` columns after theirs, or a few
        more, in y's dtype.

    Raises:
        NotImplementedError: sizes or a dtype that the kernels do not take.
    """
    n_rest = y.shape[-1] - columns.n_columns if n_rest is None else n_rest
    columns.require_supported(y.shape[-1], y.dtype.name, n_rest)
    return _activate(columns, n_rest, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activate(columns: HeadColumns, n_rest: int, y: Array) -> tuple[Array, Array, Array, Array]:
    q, k, v = _forward_call(columns)(y)
    end = columns.n_columns + columns.rest_columns(n_rest, y.dtype.itemsize)
    return q, k, v, y[:, :, columns.n_columns : end]


def _activate_forward(columns: HeadColumns, n_rest: int, y: Array) -> Any:
    return _activate(columns, n_rest, y), y


def _activate_backward(
    columns: HeadColumns, n_rest: int, y: Array, d: tuple[Array, ...]
) -> tuple[Array]:
    return (_backward_call(columns, n_rest)(y, *d[: 3 + bool(n_rest)]),)


_activate.defvjp(_activate_forward, _activate_backward)


def _flat(x: Array) -> Array:
    """`[B * T, columns]`."""
    return x.reshape(x.shape[0] * x.shape[1], -1)


@functools.cache
def _forward_call(columns: HeadColumns) -> Callable[[Array], tuple[Array, ...]]:
    def call(x: Array) -> tuple[Array, ...]:
        batch, time, n_columns = x.shape
        parts = [s for s in columns.parts(n_columns, x.dtype.itemsize) if s.name != "rest"]

        def of_block(part: Part, ref: dict[str, Ref], tokens: Index) -> list[Ref]:
            return [ref["x"].at[tokens, part.columns], ref[part.name].at[tokens]]

        results = _kernel(
            "e88_activation",
            lanes.activate_rows,
            parts,
            batch * time,
            of_block,
            {"x": _flat(x)},
            {s.name: jax.ShapeDtypeStruct((batch * time, s.n_columns), x.dtype) for s in parts},
        )
        return tuple(results[s.name].reshape(batch, time, s.heads, -1) for s in parts)

    return over_rows(call, ("b t c",), lambda *_: ("b t h n", "b t h n", "b t h v"), True)


@functools.cache
def _backward_call(columns: HeadColumns, n_rest: int) -> Callable[..., Array]:
    def call(x: Array, *d: Array) -> Array:
        parts = columns.parts(x.shape[2], x.dtype.itemsize, n_rest)
        given = {s.name: _flat(d_y) for s, d_y in zip(parts, d, strict=True)}

        def of_block(part: Part, ref: dict[str, Ref], tokens: Index) -> list[Ref]:
            return [
                ref["x"].at[tokens, part.columns],
                ref[part.name].at[tokens],
                ref["d_x"].at[tokens, part.columns],
            ]

        flat = _flat(x)
        results = _kernel(
            "e88_activation_backward",
            lanes.gradient_of_rows,
            parts,
            flat.shape[0],
            of_block,
            {"x": flat, **given},
            {"d_x": jax.ShapeDtypeStruct(flat.shape, x.dtype)},
        )
        return results["d_x"].reshape(x.shape)

    axes = ("b t c", "b t h n", "b t h n", "b t h v", *(("b t r",) if n_rest else ()))
    return over_rows(call, axes, lambda *_: "b t c", True)


def _kernel(
    name: str,
    program: Callable[..., None],
    parts: list[Part],
    tokens: int,
    of_block: Callable[[Part, dict[str, Ref], Index], list[Ref]],
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, Array]:
    """Runs `program(w, part, *memory)` for blocks of tokens of each part; `of_block(part, refs,
    tokens)` gives the references to their memory. The rest, if any, is the last part."""
    together = [part for part in parts if part.name != "rest"]
    size = min(part.tokens(tokens) for part in together)
    n_groups = -(-tokens // size)
    # Blocks of q, k and v of the same tokens follow each other: what they read and write lies in
    # the same lines of memory, which are in the L2 cache then.
    n_together = n_groups * len(together)
    rest_size = parts[-1].tokens(tokens)
    n_rest = -(-tokens // rest_size) if len(parts) > len(together) else 0

    def run(part: Part, size: int, group: Index, ref: dict[str, Ref]) -> None:
        # The last block is whole too: it repeats tokens of the one before.
        first = jnp.minimum(group * size, tokens - size)
        refs = of_block(part, ref, pl.ds(first, size))
        inline(
            lambda _, *refs: program(LaneOps(), part, *(Memory(x) for x in refs)),
            *refs,
            arg_types=(plgpu.RefType(),) * len(refs),
        )

    def body(index: Index, _: Index, ref: dict[str, Ref]) -> None:
        n_parts = jnp.int32(len(together))
        group, own = lax.div(index, n_parts), lax.rem(index, n_parts)
        for i, part in enumerate(together):
            pl.when((index < n_together) & (own == i))(
                functools.partial(run, part, size, group, ref)
            )
        if n_rest:
            rest = functools.partial(run, parts[-1], rest_size, index - n_together, ref)
            pl.when(index >= n_together)(rest)

    return run_blocks(
        name,
        body,
        n_together + n_rest,
        inputs,
        outputs,
        {},
        warpgroups=1,
        approximate=True,
        interpret=None,
    )
