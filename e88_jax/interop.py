"""Weights of the original PyTorch layers, to and from the mixers of this library.

The originals, one of each kind, are E88's own, `fla.layers.GatedDeltaNet` (flash-linear-attention)
and `mamba_ssm`'s `Mamba2` (Mamba; both in `docs/references.md`). Keys and layouts are theirs: a
linear layer's weight is `[out, in]`, a depthwise convolution's `[channels, 1, size]` with the
newest token's tap last, and heads follow one another along rows. Rows of a fused projection are q,
k, v in E88 and z, x, B, C, dt in Mamba2.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from e88_jax.checks import require_instance, shown
from e88_jax.config import E88Config
from e88_jax.mixers.base import Execution
from e88_jax.mixers.baselines import GatedDeltaNetConfig, Mamba2Config
from e88_jax.mixers.e88 import E88Mixer
from e88_jax.mixers.gated_deltanet import GatedDeltaNetMixer
from e88_jax.mixers.mamba2 import Mamba2Mixer
from e88_jax.projection import InputProjections, ProjectionGroup
from e88_jax.typed import params_by_path, params_of, set_params

Arrays = Mapping[str, np.ndarray]
Config = E88Config | GatedDeltaNetConfig | Mamba2Config
Mixer = E88Mixer | GatedDeltaNetMixer | Mamba2Mixer


class _Part(NamedTuple):
    """Part of a parameter of ours."""

    param: str
    """The parameter's path."""
    index: Any = ...
    """Where the part is in the parameter: slices and integers."""


@dataclasses.dataclass(frozen=True)
class _Layout:
    """An array of a PyTorch state dictionary: parts of our parameters `[*in, *out]`, each as rows
    `[out, in]`, one below the other."""

    parts: tuple[_Part, ...]
    in_axes: int = 1
    """Leading axes of a part that are columns of its rows; none of a vector."""
    shape: tuple[int, ...] | None = None
    """The array's shape, -1 for the number of rows; None for `[out, in]`."""

    def to_torch(self, ours: Arrays) -> np.ndarray:
        """The array, from our parameters by path."""
        parts = self._parts(ours)
        rows = np.concatenate([x.reshape(self._n_in(x), -1).T for x in parts])
        return rows if self.shape is None else rows.reshape(self.shape)

    def from_torch(self, array: np.ndarray, ours: Arrays) -> None:
        """Writes the array into our parameters by path."""
        parts = self._parts(ours)
        ends = np.cumsum([x.size // self._n_in(x) for x in parts])
        rows = array.reshape(-1, self._n_in(parts[0]))
        for part, own in zip(parts, np.split(rows, ends[:-1]), strict=True):
            part[...] = own.T.reshape(part.shape)

    def _parts(self, ours: Arrays) -> list[np.ndarray]:
        return [ours[part.param][part.index] for part in self.parts]

    def _n_in(self, part: np.ndarray) -> int:
        return math.prod(part.shape[: self.in_axes])


def _linear(*params: str, in_axes: int = 1) -> _Layout:
    """Rows `[out, in]` of whole kernels `[*in, *out]`."""
    return _Layout(tuple(map(_Part, params)), in_axes)


def _conv(size: int, *params: str) -> _Layout:
    """`[channels, 1, size]` of taps `[size, *channels]`."""
    return _Layout(tuple(map(_Part, params)), shape=(-1, 1, size))


def _vector(*params: str) -> _Layout:
    """`[n]` of parameters of any shape."""
    return _Layout(tuple(map(_Part, params)), in_axes=0, shape=(-1,))


def _e88_layouts(config: E88Config) -> dict[str, _Layout]:
    """The arrays of an original E88 layer, and of options that the config leaves out."""
    heads, n_state, n_value = config.n_heads, config.n_state, config.n_value
    # Columns of a head's q, k and, unless tied, v.
    streams = {"q": slice(0, n_state), "k": slice(n_state, 2 * n_state)}
    if not config.tie_kv:
        streams["v"] = slice(2 * n_state, None)
    qkv = {name: _Part("inputs.qkv.kernel", (..., own)) for name, own in streams.items()}
    decay = "a_proj.weight" if config.decay_mode == "mamba" else "beta_proj.weight"
    output = "heads.projection.kernel"
    if config.tie_kv:
        layouts = {f"{name}_proj.weight": _Layout((part,)) for name, part in qkv.items()}
    else:
        layouts = {"qkv_proj.weight": _Layout(tuple(qkv.values()))}
    for name, own in streams.items():
        taps = (_Part("conv.taps", (..., own)),)
        layouts[f"{name}_conv.weight"] = _Layout(taps, shape=(-1, 1, config.conv_size or 0))
    if config.head_mix == "per_head":
        for head in range(heads):
            layouts[f"head_projs.{head}.weight"] = _Layout((_Part(output, head),))
    else:
        in_axes = 2 if config.head_mix == "concat" else 1
        layouts["o_proj.weight"] = _linear(output, in_axes=in_axes)
    return layouts | {
        decay: _linear("inputs.decay.kernel"),
        "g_proj.weight": _linear("inputs.gate.kernel"),
        "write_gate_proj.weight": _linear("inputs.write_gate.kernel"),
        "head_attn.weight": _linear("inputs.head_weights.kernel"),
        "A_log": _vector("decay.A_log"),
        "dt_bias": _vector("decay.dt_bias"),
        "decay_logit": _vector("decay.logit"),
        "value_residual": _Layout((_Part("heads.value_residual"),), 0, (heads, n_value)),
        "o_norm_weight": _vector("heads.norm.scale"),
        "head_weights": _vector("heads.weights"),
    }


def _gated_deltanet_layouts(config: GatedDeltaNetConfig) -> dict[str, _Layout]:
    """The arrays of a `fla.layers.GatedDeltaNet` with gate, short convolutions and no biases."""
    size = config.conv_size
    return {
        "q_proj.weight": _linear("inputs.q.kernel"),
        "k_proj.weight": _linear("inputs.k.kernel"),
        "v_proj.weight": _linear("inputs.v.kernel"),
        "a_proj.weight": _linear("inputs.decay.kernel"),
        "b_proj.weight": _linear("inputs.write.kernel"),
        "g_proj.weight": _linear("inputs.gate.kernel"),
        "q_conv1d.weight": _conv(size, "q_conv.taps"),
        "k_conv1d.weight": _conv(size, "k_conv.taps"),
        "v_conv1d.weight": _conv(size, "v_conv.taps"),
        "A_log": _vector("decay.A_log"),
        "dt_bias": _vector("decay.dt_bias"),
        "o_norm.weight": _vector("norm.scale"),
        "o_proj.weight": _linear("projection.kernel", in_axes=2),
    }


def _mamba2_layouts(config: Mamba2Config) -> dict[str, _Layout]:
    """The arrays of a `mamba_ssm.Mamba2` with its norm and without biases of projections."""
    return {
        "in_proj.weight": _linear(*(f"inputs.{x}.kernel" for x in ("z", "x", "b", "c", "dt"))),
        "conv1d.weight": _conv(config.conv_size, *(f"{x}_conv.taps" for x in "xbc")),
        "conv1d.bias": _vector(*(f"{x}_conv.bias" for x in "xbc")),
        "A_log": _vector("decay.A_log"),
        "dt_bias": _vector("decay.dt_bias"),
        "D": _vector("skip"),
        "norm.weight": _vector("scale"),
        "out_proj.weight": _linear("projection.kernel", in_axes=2),
    }


def _layouts(config: Config, params: Mapping[str, Any]) -> dict[str, _Layout]:
    """The arrays of the original layer by key; `params` are our layer's parameters by path."""
    match config:
        case E88Config():
            layouts = _e88_layouts(config)
        case GatedDeltaNetConfig():
            layouts = _gated_deltanet_layouts(config)
        case Mamba2Config():
            layouts = _mamba2_layouts(config)
    return {key: x for key, x in layouts.items() if all(part.param in params for part in x.parts)}


@overload
def mixer_from_torch(
    state_dict: Arrays, config: E88Config, dim: int, execution: Execution = ...
) -> E88Mixer: ...
@overload
def mixer_from_torch(
    state_dict: Arrays, config: GatedDeltaNetConfig, dim: int, execution: Execution = ...
) -> GatedDeltaNetMixer: ...
@overload
def mixer_from_torch(
    state_dict: Arrays, config: Mamba2Config, dim: int, execution: Execution = ...
) -> Mamba2Mixer: ...
def mixer_from_torch(
    state_dict: Arrays,
    config: Config,
    dim: int,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> Mixer:
    """A layer with the weights of its original's.

    Args:
        state_dict: the layer's `state_dict()` as NumPy arrays of any float dtype, with the keys
            that an original layer of the same options has. Sizes are named as in the layers'
            docstrings; HV is the number of value heads, G of groups.
            E88: `qkv_proj.weight` `[2 * H * N + H * V, dim]`, the rest by its options.
            Gated DeltaNet: `q_proj`, `k_proj` `[H * K, dim]`, `v_proj`, `g_proj` `[HV * V, dim]`,
            `a_proj`, `b_proj` `[HV, dim]`, `o_proj` `[dim, HV * V]`, `q_conv1d`, `k_conv1d`
            `[H * K, 1, size]`, `v_conv1d` `[HV * V, 1, size]`, `o_norm` `[V]` (`.weight` each),
            `A_log`, `dt_bias` `[HV]`.
            Mamba2: `in_proj.weight` `[2 * H * P + 2 * G * N + H, dim]`, `conv1d.weight`
            `[H * P + 2 * G * N, 1, size]`, `conv1d.bias` `[H * P + 2 * G * N]`, `norm.weight`
            `[H * P]`, `out_proj.weight` `[dim, H * P]`, `A_log`, `dt_bias`, `D` `[H]`.
        config: sizes and options of the layer; its type is the kind of the layer.
        dim: width of its input.
        execution: options of running it.

    Returns:
        The layer of the config's kind, its parameters float32 as always.

    Raises:
        TypeError: no mapping of arrays, or the config of a kind that has no original.
        ValueError: a key is missing, surplus, of another shape, not of floats or not finite in
            float32; the message names it.
    """
    require_instance("state_dict", state_dict, Mapping)
    _require_kind("config", config, E88Config, GatedDeltaNetConfig, Mamba2Config)
    mixer: Mixer = nnx.eval_shape(lambda: config.build(dim, execution, rngs=nnx.Rngs(0)))
    params = params_by_path(mixer)
    layouts = _layouts(config, params)
    # Zeros that occupy one element each: only their shapes matter.
    zeros = {name: np.broadcast_to(np.float32(0), x.shape) for name, x in params.items()}
    shapes = {key: layout.to_torch(zeros).shape for key, layout in layouts.items()}
    arrays = _checked(state_dict, shapes)
    ours = {name: np.full(x.shape, np.nan, np.float32) for name, x in params.items()}
    for key, layout in layouts.items():
        layout.from_torch(arrays[key], ours)
    set_params(mixer, {name: jnp.asarray(x) for name, x in ours.items()})
    return mixer


def mixer_to_torch(mixer: Mixer) -> dict[str, np.ndarray]:
    """The layer's weights as its original keeps them: `mixer_from_torch`'s inverse.

    Args:
        mixer: an E88Mixer, GatedDeltaNetMixer or Mamba2Mixer as it is trained.

    Returns:
        Arrays that own their memory, by key, in the dtype of the parameters: float32.

    Raises:
        TypeError: a mixer of a kind that has no original, or one whose weights are traced or mere
            shapes.
        ValueError: its weights are laid out for inference.
    """
    _require_kind("mixer", mixer, E88Mixer, GatedDeltaNetMixer, Mamba2Mixer)
    if not isinstance(mixer.inputs, InputProjections | ProjectionGroup):
        raise ValueError(
            "mixer must be a layer as it is trained, got one made by for_inference, whose weights "
            f"are joined and rounded to {mixer.dtype}: give the layer that it was made from."
        )
    for leaf in jax.tree.leaves(params_of(mixer)):
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
            raise TypeError(f"mixer must hold arrays that have their values, got {shown(leaf)}.")
    ours = {name: np.asarray(param[...]) for name, param in params_by_path(mixer).items()}
    layouts = _layouts(mixer.config, ours)
    return {key: np.array(x.to_torch(ours), order="C") for key, x in layouts.items()}


def _require_kind(name: str, value: Any, *types: type) -> None:
    """Raises:
    TypeError: the value is of none of the types, one of each kind that has an original.
    """
    if not isinstance(value, types):
        *others, last = (x.__name__ for x in types)
        raise TypeError(
            f"{name} must be of a kind that has an original in PyTorch (e88, gated_deltanet, "
            f"mamba2), {', '.join(others)} or {last}; got {shown(value)}."
        )


def _checked(state_dict: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The arrays of a state dictionary as float32.

    Raises:
        TypeError, ValueError: as `mixer_from_torch`.
    """
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
    return arrays


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
