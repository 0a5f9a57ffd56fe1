"""The call of a mixer: checks of arguments, and Explicit mesh axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, export

from e88_jax.checks import as_array, as_integers, as_lengths, require_instance, require_int
from e88_jax.documents import live_steps
from e88_jax.meshes import call_with_automatic_axes, explicit_mesh
from e88_jax.typed import params_of, same_structure, shapes_of


def call_checked(
    compute: Callable[..., tuple[Array, Any]],
    mixer: Any,
    dim: int,
    state_type: Any,
    x: Array,
    state: Any,
    segment_ids: Array | None,
    lengths: Array | None,
    *,
    takes_no_state: bool = False,
) -> tuple[Array, Any]:
    """`compute(mixer, x, state, segment_ids, lengths)` with checked arguments; x is zeros past the
    end of each row.

    Args:
        compute: a method of the mixer's class.
        mixer: a `Mixer`.
        dim: width of x.
        state_type: type of the mixer's states, whose AXES are the names of the first axes of each
            array: "b" is the batch, "b h" the batch and the heads. Or "b", for any state.
        x, state, segment_ids, lengths: as `Mixer.__call__` takes them.
        takes_no_state: whether `compute` takes None for the state; else it gets `init_state(B)`.

    Raises:
        TypeError: an argument of another type.
        ValueError: x is empty or not `[B, T, dim]`, or state, ids or lengths do not fit it.
    """
    x = as_array("x", x, f"[B, T, {dim}]")
    if x.ndim != 3 or x.shape[-1] != dim or x.size == 0:
        raise ValueError(f"x must be [B, T, {dim}], B and T not 0, got shape {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be of floats, got {x.dtype}.")
    if segment_ids is not None:
        segment_ids = as_integers("segment_ids", segment_ids, "[B, T]", x.shape[:2])
    if lengths is not None:
        lengths = as_lengths(lengths, *x.shape[:2])
    if state is not None:
        check_state("state", state, mixer, x.shape[0])
    elif not takes_no_state:
        state = mixer.init_state(x.shape[0])
    arguments = x, state, segment_ids, lengths

    def compute_of_live(
        mixer: Any, x: Array, state: Any, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, Any]:
        if lengths is not None:
            live = live_steps(lengths, x.shape[1])[:, :, None]
            x = jnp.where(live, x, jnp.zeros_like(x))
        return compute(mixer, x, state, segment_ids, lengths)

    if explicit_mesh((*arguments, params_of(mixer))) is None:
        return compute_of_live(mixer, *arguments)
    state_axes = state_type if isinstance(state_type, str) else state_type(*state_type.AXES)
    axes = "b t", None if state is None else state_axes, "b t", "b"
    return call_with_automatic_axes(compute_of_live, mixer, arguments, axes, ("b t", state_axes))


def check_batch(batch: Any) -> None:
    """Raises:
    TypeError, ValueError: no integer, or below 1; a batch may be symbolic, of `jax.export`.
    """
    is_symbolic: bool = export.is_symbolic_dim(batch)
    if not is_symbolic:
        require_int("batch", batch)


def fresh_state(mixer: Any, state: Any, batch: int) -> Any:
    """`init_state` of the mixer, of the size of a state."""
    context_of = getattr(mixer, "context_of", None)
    return mixer.init_state(batch, None if context_of is None else context_of(state))


def check_state(name: str, state: Any, mixer: Any, batch: int) -> None:
    """Raises:
    TypeError: the state is of another type than the mixer's.
    ValueError: its shapes or dtypes are not the mixer's for a batch of so many rows.
    """
    fresh: object = shapes_of(lambda: fresh_state(mixer, state, batch))
    if not same_structure(fresh, 0):  # else it is one array
        needs = f"of type {type(fresh).__name__}, such as init_state({batch})"
        require_instance(name, state, type(fresh), needs)
    got, wanted = (jax.tree.map(_described, tree) for tree in (state, fresh))
    if not same_structure(got, wanted) or got != wanted:
        raise ValueError(f"{name} must be {wanted} for a batch of {batch}, got {got}.")


def _described(array: Any) -> str:
    """dtype and shape of an array; the type of anything else."""
    dtype = getattr(array, "dtype", type(array).__name__)
    return f"{dtype} {getattr(array, 'shape', '')}"
