"""Layers whose results are recomputed in the backward pass, one at a time or side by side."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
from flax import nnx
from jax import Array

from e88_jax.mixers.base import MixerState, Remat
from e88_jax.projection import MATMUL
from e88_jax.typed import F, Variables, checkpoint, split
from e88_jax.wavefront import stacked

SUM = "sum over devices"
"""The name of sums over devices in policies of `jax.checkpoint`: the backward pass would wait for
them again."""

_save = jax.checkpoint_policies
_REMAT_POLICIES = {
    # Matmuls of layers side by side have a batch axis, and are known by name.
    "recurrence": _save.save_from_both_policies(
        _save.dots_with_no_batch_dims_saveable, _save.save_only_these_names(MATMUL, SUM)
    ),
    "layer": _save.save_only_these_names(SUM),
}


def _recomputed(run: F, remat: Remat) -> F:
    """`run`, recomputed in the backward pass as `remat` says.

    Not by `nnx.remat`, which fails where the model was made outside of a loop and is called inside.
    """
    return run if remat == "none" else checkpoint(run, policy=_REMAT_POLICIES[remat])


def run_layer(layer: Any, remat: Remat, *inputs: Any) -> tuple[Array, MixerState]:
    """`layer(*inputs)`.

    Raises:
        ValueError: the layer has variables that are no parameters, with `remat`.
    """
    if remat == "none":
        return layer(*inputs)
    graphdef, params = _split(layer)

    def run(params: Variables, *inputs: Any) -> tuple[Array, MixerState]:
        return nnx.merge(graphdef, params)(*inputs)

    return _recomputed(run, remat)(params, *inputs)


def run_side_by_side(
    run: Callable[..., tuple[Array, MixerState]],
    remat: Remat,
    graphdef: nnx.GraphDef[Any],
    params: Sequence[Variables],
    *inputs: Any,
) -> tuple[Array, MixerState]:
    """`run(layer, *inputs)` of layers with these parameters, each with its part of every input
    along axis 0."""

    def run_one(params: Variables, *inputs: Any) -> tuple[Array, MixerState]:
        return run(nnx.merge(graphdef, params), *inputs)

    def run_all(params: Sequence[Variables], *inputs: Any) -> tuple[Array, MixerState]:
        # Stacked in here, so that `remat` keeps no copies of the weights.
        return jax.vmap(run_one)(stacked(params), *inputs)

    return _recomputed(run_all, remat)(params, *inputs)


def split_alike(layers: Sequence[nnx.Module]) -> tuple[nnx.GraphDef[Any], Sequence[Variables]]:
    """The graph that layers have in common, and the parameters of each.

    Raises:
        ValueError: layers differ in more than their weights, or one has variables that are no
            parameters.
    """
    graphdefs, params = zip(*map(_split, layers), strict=True)
    for i, graphdef in enumerate(graphdefs):
        if graphdef != graphdefs[0]:
            raise ValueError(
                "time_chunks needs layers that differ in their weights alone, and layer "
                f"{i} is not as layer 0."
            )
    return graphdefs[0], params


def _split(layer: nnx.Module) -> tuple[nnx.GraphDef[Any], Variables]:
    """`nnx.split` of a layer; other variables than parameters would lose their changes."""
    for path, x in nnx.iter_graph(layer):
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.Param):
            name = ".".join(map(str, cast("tuple[Any, ...]", path)))
            kind = type(cast(Any, x)).__name__
            raise ValueError(
                f"remat and time_chunks take layers whose variables are parameters, and {name} is "
                f"{kind}."
            )
    return split(layer)
