"""Weights of the original PyTorch implementation, to and from `E88Mixer`.

Keys and layouts are the original project's: a linear layer's weight is `[out, in]`, a depthwise
convolution's `[channels, 1, size]`, and the rows of the fused projection are q, then k, then v,
each head by head.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from e88_jax.checks import require_instance, shown
from e88_jax.config import E88Config
from e88_jax.mixers.base import Execution
from e88_jax.mixers.e88 import E88InferenceMixer, E88Mixer
from e88_jax.typed import params_by_path, params_of, set_params

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A parameter of ours as arrays of a PyTorch state dictionary, and back."""

    to_torch: Callable[[np.ndarray], dict[str, np.ndarray]]
    from_torch: Callable[[Arrays], np.ndarray]


def _same(key: str) -> _Layout:
    return _Layout(lambda ours: {key: ours}, lambda theirs: theirs[key])


def _linear(key: str, in_axes: int, shape: tuple[int, ...]) -> _Layout:
    """`[*in, *out]` and `[out, in]`."""
    n_in = math.prod(shape[:in_axes])
    return _Layout(
        lambda ours: {key: ours.reshape(n_in, -1).T}, lambda theirs: theirs[key].T.reshape(shape)
    )


def _of_each_head(key: str, n_heads: int) -> _Layout:
    """`[H, V, dim]` and, for each head, `[dim, V]`."""
    keys = [key.format(head=i) for i in range(n_heads)]
    return _Layout(
        lambda ours: {key: ours[i].T for i, key in enumerate(keys)},
        lambda theirs: np.stack([theirs[key].T for key in keys]),
    )


def _streams(config: E88Config) -> dict[str, slice]:
    """Columns of a head's q, k and, unless tied, v."""
    n_state = config.n_state
    streams = {"q": slice(0, n_state), "k": slice(n_state, 2 * n_state)}
    return streams if config.tie_kv else streams | {"v": slice(2 * n_state, None)}


def _qkv(config: E88Config) -> _Layout:
    """`[dim, H, 2N + V]`, and rows q, then k, then v, each head by head; tied, two weights."""
    heads, streams = config.n_heads, _streams(config)

    def to_torch(ours: np.ndarray) -> dict[str, np.ndarray]:
        rows = {name: ours[:, :, own].reshape(len(ours), -1).T for name, own in streams.items()}
        if config.tie_kv:
            return {f"{name}_proj.weight": x for name, x in rows.items()}
        return {"qkv_proj.weight": np.concatenate(list(rows.values()))}

    def from_torch(theirs: Arrays) -> np.ndarray:
        if config.tie_kv:
            rows = [theirs[f"{name}_proj.weight"] for name in streams]
        else:
            ends = np.cumsum([heads * config.n_state] * 2)
            rows = np.split(theirs["qkv_proj.weight"], ends)
        return np.concatenate([x.T.reshape(x.shape[1], heads, -1) for x in rows], axis=2)

    return _Layout(to_torch, from_torch)


def _conv(config: E88Config) -> _Layout:
    """`[size, H, 2N + V]`, and `[channels, 1, size]` of each of q, k, v."""
    heads, streams = config.n_heads, _streams(config)

    def to_torch(ours: np.ndarray) -> dict[str, np.ndarray]:
        return {
            f"{name}_conv.weight": ours[:, :, own].reshape(len(ours), -1).T[:, None]
            for name, own in streams.items()
        }

    def from_torch(theirs: Arrays) -> np.ndarray:
        taps = [theirs[f"{name}_conv.weight"][:, 0].T for name in streams]
        return np.concatenate([x.reshape(len(x), heads, -1) for x in taps], axis=2)

    return _Layout(to_torch, from_torch)


def _layouts(config: E88Config, dim: int) -> dict[str, _Layout]:
    """Layouts of the parameters of a layer with every option, by path."""
    heads, n_value = config.n_heads, config.n_value
    if config.head_mix == "per_head":
        output = _of_each_head("head_projs.{head}.weight", heads)
    elif config.head_mix == "concat":
        output = _linear("o_proj.weight", 2, (heads, n_value, dim))
    else:
        output = _linear("o_proj.weight", 1, (n_value, dim))
    decay = "a_proj.weight" if config.decay_mode == "mamba" else "beta_proj.weight"
    per_head = (dim, heads)
    return {
        "inputs.qkv.kernel": _qkv(config),
        "inputs.decay.kernel": _linear(decay, 1, per_head),
        "inputs.gate.kernel": _linear("g_proj.weight", 1, (dim, heads, n_value)),
        "inputs.write_gate.kernel": _linear("write_gate_proj.weight", 1, per_head),
        "inputs.head_weights.kernel": _linear("head_attn.weight", 1, per_head),
        "conv.taps": _conv(config),
        "decay.A_log": _same("A_log"),
        "decay.dt_bias": _same("dt_bias"),
        "decay.logit": _same("decay_logit"),
        "heads.value_residual": _same("value_residual"),
        "heads.norm.scale": _same("o_norm_weight"),
        "heads.weights": _same("head_weights"),
        "heads.projection.kernel": output,
    }


def mixer_from_torch(
    state_dict: Arrays,
    config: E88Config,
    dim: int,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> E88Mixer:
    """A layer with the weights of the original implementation's.

    Args:
        state_dict: the layer's `state_dict()` as NumPy arrays of any float dtype, with the keys
            that an original layer of the same options has: `[out, in]` weights such as
            `qkv_proj.weight` `[2 * H * N + H * V, dim]`, convolutions `[channels, 1, size]`.
        config: sizes and options of the layer.
        dim: width of its input.
        execution: options of running it.

    Returns:
        The layer, its parameters float32 as always.

    Raises:
        TypeError: no mapping of arrays, or another config.
        ValueError: a key is missing, surplus, of another shape, not of floats or not finite in
            float32; the message names it.
    """
    require_instance("state_dict", state_dict, Mapping)
    require_instance("config", config, E88Config)
    mixer = nnx.eval_shape(lambda: E88Mixer(config, dim, execution, rngs=nnx.Rngs(0)))
    params, layouts = params_by_path(mixer), _layouts(config, dim)
    # Zeros that occupy one element each: only their shapes matter.
    shapes = {
        key: array.shape
        for name, param in params.items()
        for key, array in layouts[name]
        .to_torch(np.broadcast_to(np.float32(0), param.shape))
        .items()
    }
    if missing := sorted(shapes.keys() - state_dict.keys()):
        wanted = ", ".join(f"{key} {shapes[key]}" for key in missing)
        raise ValueError(f"the state dictionary lacks {wanted}.")
    if surplus := sorted(map(str, state_dict.keys() - shapes.keys())):
        raise ValueError(
            f"the state dictionary has {', '.join(surplus)}, which a layer of these options lacks."
        )
    arrays = {key: _to_float32(key, state_dict[key]) for key in shapes}
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            raise ValueError(f"{key} must have shape {shape}, got {arrays[key].shape}.")

    set_params(mixer, {name: jnp.asarray(layouts[name].from_torch(arrays)) for name in params})
    return mixer


def mixer_to_torch(mixer: E88Mixer) -> dict[str, np.ndarray]:
    """The layer's weights as the original implementation keeps them: `mixer_from_torch`'s inverse.

    Returns:
        float32 arrays that own their memory, by key.

    Raises:
        TypeError: no E88Mixer, or one whose weights are traced or mere shapes.
        ValueError: its weights are laid out for inference.
    """
    require_instance("mixer", mixer, E88Mixer)
    if isinstance(mixer, E88InferenceMixer):
        raise ValueError(
            "mixer must be a layer as it is trained, got one made by for_inference, whose weights "
            f"are joined and rounded to {mixer.dtype}: give the layer that it was made from."
        )
    for leaf in jax.tree.leaves(params_of(mixer)):
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
            raise TypeError(f"mixer must hold arrays that have their values, got {shown(leaf)}.")
    layouts = _layouts(mixer.config, mixer.dim)
    return {
        key: np.array(array, order="C")
        for name, param in params_by_path(mixer).items()
        for key, array in layouts[name].to_torch(np.asarray(param[...])).items()
    }


def _to_float32(key: str, given: Any) -> np.ndarray:
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # as of a tensor on a GPU, or bfloat16
        raise TypeError(
            f"{key} must be a NumPy array, such as tensor.detach().float().cpu().numpy(), "
            f"got {shown(given)}: {error}"
        ) from None
    if not jnp.issubdtype(array.dtype, jnp.floating):  # NumPy alone does not know bfloat16
        raise ValueError(f"{key} must be of floats, got {array.dtype}.")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not_finite := int(np.sum(~np.isfinite(array))):
        raise ValueError(
            f"{key} must be finite in float32, got {not_finite} of {array.size} that are not."
        )
    return array
