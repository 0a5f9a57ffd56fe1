"""The models that are compared: E88, its variants and its controls, of equal parameters."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.base import Execution
from e88_jax.mixers.baselines import (
    AttentionConfig,
    GatedDeltaNetConfig,
    LSTMConfig,
    Mamba2Config,
)

TOLERANCE = 0.02
"""Greatest relative difference of a control's parameters from E88's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Size of E88, to which the other models are matched."""

    dim: int
    depth: int
    n_heads: int
    n_state: int = 32
    conv_size: int | None = None
    """Taps of E88's short convolution; the linear recurrences have 4 of their own."""

    @property
    def values(self) -> int:
        """Values of all heads of an E88 layer."""
        return self.n_heads * self.n_state


def _e88(size: Size, **options: Any) -> E88Config:
    options = {"conv_size": size.conv_size} | options
    return E88Config(n_heads=size.n_heads, n_state=size.n_state, **options)


def _variant(**options: Any) -> "Build":
    return lambda size, model: [dataclasses.replace(model, layers=(_e88(size, **options),))]


def _gated_deltanet(**options: Any) -> "Build":
    """As many heads of the same keys, of values as long or nearly so."""

    def build(size: Size, model: LMConfig) -> Iterable[LMConfig]:
        lengths = sorted(range(1, 2 * size.n_state), key=lambda v: abs(v - size.n_state))
        for n_value in lengths:
            layer = GatedDeltaNetConfig(
                n_heads=size.n_heads,
                head_dim=size.n_state,
                expand_v=n_value / size.n_state,
                **options,
            )
            yield dataclasses.replace(model, layers=(layer,))

    return build


def _mamba2(size: Size, model: LMConfig) -> Iterable[LMConfig]:
    """The authors' heads and state, with as many channels as the parameters allow."""
    shapes = (128, 64), (64, 64), (128, 32), (64, 32), (64, 16), (64, 8), (32, 8), (32, 4)
    for d_state, head_dim in shapes:
        middle = round(5 * size.values / 3 / head_dim)  # an E88 layer has about 5 dim * values
        for heads in sorted(range(1, 2 * middle + 1), key=lambda h: abs(h - middle)):
            layer = Mamba2Config(
                expand=heads * head_dim / size.dim, d_state=d_state, head_dim=head_dim
            )
            yield dataclasses.replace(model, layers=(layer,))


def _transformer(size: Size, model: LMConfig) -> Iterable[LMConfig]:
    """Attention of dim / head size heads, and a SwiGLU channel mixer of the other parameters."""
    layer = AttentionConfig(n_heads=size.dim // size.n_state, head_dim=size.n_state)
    for hidden in range(4, 8 * size.values, 4):
        yield dataclasses.replace(model, layers=(layer,), channel_mixer_dim=hidden)


def _lstm(size: Size, model: LMConfig) -> Iterable[LMConfig]:
    for width in range(4, 4 * size.values):
        yield dataclasses.replace(model, layers=(LSTMConfig(width=width),))


def _hybrid(size: Size, model: LMConfig) -> Iterable[LMConfig]:
    """E88 and attention in turn."""
    if model.depth == 1:
        return
    attention = AttentionConfig(n_heads=5 * size.n_heads // 4, head_dim=size.n_state)
    yield dataclasses.replace(model, layers=(_e88(size), attention))


Build = Callable[[Size, LMConfig], Iterable[LMConfig]]
"""From a size and E88 of that size to candidates, the best first."""


@dataclasses.dataclass(frozen=True)
class Control:
    """A model that takes part in comparisons."""

    title: str
    build: Build


CONTROLS: dict[str, Control] = {
    "e88": Control("E88", _variant()),
    "e88_linear": Control("E88 without tanh", _variant(linear_state=True)),
    "e88_gate2": Control("E88, write gate to 2", _variant(write_gate=True, write_gate_scale=2.0)),
    "e88_linear_gate2": Control(
        "E88 without tanh, write gate to 2",
        _variant(linear_state=True, write_gate=True, write_gate_scale=2.0),
    ),
    "gdn": Control("Gated DeltaNet in [0, 1]", _gated_deltanet()),
    "gdn_negative": Control(
        "Gated DeltaNet in [-1, 1]", _gated_deltanet(negative_eigenvalues=True)
    ),
    "mamba2": Control("Mamba2", _mamba2),
    "transformer": Control("transformer", _transformer),
    "lstm": Control("LSTM", _lstm),
    "hybrid": Control("E88 and attention", _hybrid),
}
"""The models of most suites by name. Gated DeltaNet is named by the range of its eigenvalues."""

VARIANTS: dict[str, Control] = {
    "e88_conv": Control("E88, convolution of 4", _variant(conv_size=4)),
    "e88_linear_conv": Control(
        "E88 without tanh, convolution of 4", _variant(linear_state=True, conv_size=4)
    ),
    "e88_raw_keys": Control("E88, keys not normalised", _variant(use_l2_norm=False)),
    "e88_no_silu": Control("E88, no SiLU on q, k, v", _variant(use_silu=False)),
    "e88_constant_decay": Control("E88, constant decay", _variant(decay_mode="constant")),
}
"""Changes of the layer, for ablations."""

MODELS = CONTROLS | VARIANTS
"""All of them."""


def title(name: str) -> str:
    """A model's name in tables and plots."""
    return MODELS[name].title if name in MODELS else name


def build(
    name: str,
    size: Size,
    vocab_size: int,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
    *,
    embedding_std: float = 1.0,
) -> LMConfig | None:
    """A control of E88's parameters: the first candidate within `TOLERANCE`, else the nearest.

    Args:
        name: in `MODELS`.
        size: of E88.
        vocab_size: of the task.
        execution: of the model.
        embedding_std: of the model.

    Returns:
        None if there is none of this depth: a hybrid needs two layers.
    """
    e88 = LMConfig(
        dim=size.dim,
        depth=size.depth,
        layers=(_e88(size),),
        vocab_size=vocab_size,
        embedding_std=embedding_std,
        execution=execution,
    )
    budget = e88.count_params()
    nearest, distance = None, 0.0
    for candidate in MODELS[name].build(size, e88):
        off = abs(candidate.count_params() / budget - 1)
        if nearest is None or off < distance:
            nearest, distance = candidate, off
        if off <= TOLERANCE:
            break
    return nearest
