"""Weights of the original PyTorch implementation, to and from `E88Mixer`.

Keys and layouts are those of the original project's layer: a linear layer's weight is `[out, in]`,
a depthwise convolution's `[channels, 1, size]`, and the fused projection's rows are q, k, v in
turn, head by head. A parameter of ours has its namesake's numbers, most of them transposed.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from e88_jax.checks import require_instance, shown
from e88_jax.config import E88Config
from e88_jax.mixer import E88Mixer


class _Layout(NamedTuple):
    """Where a parameter of ours is in a PyTorch state dictionary, and how to turn one's array into
    the other's."""

    key: str
    """With `{head}` in it: one key for each slice of our array's leading axis."""
    to_torch: Callable[[np.ndarray], np.ndarray] = lambda ours: ours
    from_torch: Callable[[np.ndarray], np.ndarray] = lambda theirs: theirs


def _linear(key: str) -> _Layout:
    return _Layout(key, np.transpose, np.transpose)  # [in, out] and [out, in]


def _conv(key: str) -> _Layout:
    # [size, channels] and [channels, 1, size]
    return _Layout(key, lambda ours: ours.T[:, None, :], lambda theirs: theirs[:, 0, :].T)


_LAYOUTS = {
    "qkv_proj.kernel": _linear("qkv_proj.weight"),
    "q_proj.kernel": _linear("q_proj.weight"),
    "k_proj.kernel": _linear("k_proj.weight"),
    "q_conv.kernel": _conv("q_conv.weight"),
    "k_conv.kernel": _conv("k_conv.weight"),
    "v_conv.kernel": _conv("v_conv.weight"),
    "a_proj.kernel": _linear("a_proj.weight"),
    "A_log": _Layout("A_log"),
    "dt_bias": _Layout("dt_bias"),
    "beta_proj.kernel": _linear("beta_proj.weight"),
    "decay_logit": _Layout("decay_logit"),
    "write_gate_proj.kernel": _linear("write_gate_proj.weight"),
    "value_residual": _Layout("value_residual"),
    "o_norm.scale": _Layout("o_norm_weight"),
    "g_proj.kernel": _linear("g_proj.weight"),
    "head_weights": _Layout("head_weights"),
    "head_attn.kernel": _linear("head_attn.weight"),
    "head_projs.kernel": _linear("head_projs.{head}.weight"),
    "o_proj.kernel": _linear("o_proj.weight"),
}


def mixer_from_torch(state_dict: Mapping[str, np.ndarray], config: E88Config) -> E88Mixer:
    """A layer with the weights of the original implementation's.

    Args:
        state_dict: the layer's `state_dict()` as NumPy arrays of any float dtype, with the keys
            that an original layer of the same options has: `[out, in]` weights such as
            `qkv_proj.weight` `[2 * H * N + H * V, dim]`, convolutions `[channels, 1, size]`.
        config: sizes and options of the layer.

    Returns:
        The layer, its parameters float32 as always.

    Raises:
        TypeError: no mapping of arrays, or no E88Config.
        ValueError: a key that is missing, surplus, misshapen, not of floats or not finite in
            float32; the message names it, and both shapes.
    """
    require_instance("state_dict", state_dict, Mapping)
    require_instance("config", config, E88Config)
    mixer = nnx.eval_shape(lambda: E88Mixer(config, rngs=nnx.Rngs(0)))
    params = _params(mixer)
    # Zeros that occupy one element each: only their shapes matter.
    shapes = {
        key: array.shape
        for name, param in params.items()
        for key, array in _to_torch(name, np.broadcast_to(np.float32(0), param.shape)).items()
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

    ours = [
        (tuple(name.split(".")), param.replace(jnp.asarray(_from_torch(name, arrays, config))))
        for name, param in params.items()
    ]
    nnx.update(mixer, nnx.from_flat_state(ours))
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
    if changed := sorted(_params(mixer).keys() - _LAYOUTS.keys()):
        raise ValueError(
            f"mixer must be a layer as it is trained, got {', '.join(changed)} of one made for "
            "inference."
        )
    for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)):
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
            raise TypeError(f"mixer must hold arrays that have their values, got {shown(leaf)}.")
    return {
        key: np.array(array, order="C")
        for name, param in _params(mixer).items()
        for key, array in _to_torch(name, np.asarray(param[...])).items()
    }


def _params(mixer: E88Mixer) -> dict[str, nnx.Param[Any]]:
    """The layer's parameters by dotted path."""
    flat = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    return {".".join(map(str, path)): param for path, param in flat}


def _to_torch(name: str, ours: np.ndarray) -> dict[str, np.ndarray]:
    layout = _LAYOUTS[name]
    if "{head}" in layout.key:
        return {layout.key.format(head=i): layout.to_torch(x) for i, x in enumerate(ours)}
    return {layout.key: layout.to_torch(ours)}


def _from_torch(name: str, arrays: Mapping[str, np.ndarray], config: E88Config) -> np.ndarray:
    layout = _LAYOUTS[name]
    if "{head}" in layout.key:
        keys = [layout.key.format(head=i) for i in range(config.n_heads)]
        return np.stack([layout.from_torch(arrays[key]) for key in keys])
    return layout.from_torch(arrays[layout.key])


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
            f"{key} must be finite in float32, got {not_finite} of {array.size} numbers that are "
            "not."
        )
    return array
