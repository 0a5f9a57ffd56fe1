"""Masks of a model's parameters for Optax: weight decay, and the matrices of Muon."""

import math
from typing import Any, cast

import jax
from flax import nnx
from optax.contrib import MuonDimensionNumbers  # pyright: ignore[reportMissingTypeStubs]

from e88_jax.checks import shown

DECAYED = ("kernel", "embedding", "taps")
"""Names of the parameters that weight decay applies to: weights of matmuls, of convolutions and of
embeddings. A_log, dt_bias, norms and other numbers of a head or channel have other names."""


def weight_decay_mask(params: Any) -> Any:
    """Which parameters weight decay applies to, for Optax's `mask` and `weight_decay_mask`.

    Args:
        params: `nnx.state(model, nnx.Param)` or a tree of the same paths.

    Returns:
        A tree of the same structure with a bool for each parameter: whether its name is one of
        `DECAYED`.

    Raises:
        TypeError: no tree.
    """
    _require_tree(params)

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return _name(path) in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def muon_dimensions(params: Any) -> Any:
    """The axes of the matrices that Muon takes, for `optax.contrib.muon`.

    Muon takes the weights of matmuls: parameters named `kernel` that say how many of their axes are
    summed over (metadata `n_in_axes`, as `Projection` sets it), and those of two axes, as
    `nnx.Linear` has them. Embedding, convolutions and vectors are left to another optimizer.

    Args:
        params: `nnx.state(model, nnx.Param)`.

    Returns:
        A tree that ends at each `nnx.Param` with its `MuonDimensionNumbers`, or None. Where Optax
        is given plain arrays, as by `nnx.Optimizer`, pass it this tree instead of the function.

    Raises:
        TypeError: no tree, or one of plain arrays, which do not say which axes are summed over.
    """
    _require_tree(params)

    def of(path: Any, param: Any) -> MuonDimensionNumbers | None:
        if not isinstance(param, nnx.Variable):
            raise TypeError(
                "params must be nnx.state(model, nnx.Param), whose parameters say which axes are "
                f"summed over, got {shown(param)}. nnx.Optimizer passes plain arrays: give "
                "optax.contrib.muon the tree that muon_dimensions returns."
            )
        variable = cast(Any, param)  # may hold `optax.partition`'s MaskedNode, which has no shape
        shape: tuple[int, ...] = getattr(variable, "shape", ())
        if _name(path) != "kernel" or math.prod(shape) == 0:
            return None
        n_in: int | None = variable.get_metadata().get("n_in_axes")
        if n_in is None:
            return MuonDimensionNumbers() if len(shape) == 2 else None
        axes = tuple(range(len(shape)))
        return MuonDimensionNumbers(axes[:n_in], axes[n_in:])

    def is_leaf(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    return jax.tree_util.tree_map_with_path(of, params, is_leaf=is_leaf)


def _require_tree(params: Any) -> None:
    if params is None or jax.tree_util.all_leaves([params]):
        raise TypeError(
            f"params must be a tree of parameters, such as nnx.state(model, nnx.Param), "
            f"got {shown(params)}."
        )


def _name(path: tuple[Any, ...]) -> str:
    """The last name in a parameter's path."""
    names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    names = [name for name in names if name != "value"]
    return names[-1] if names else ""
