"""Language models whose weights are set by hand: heads by tables, layers, embedding and norms.

The residual stream is divided into blocks: one dimension per token, others that layers write, and
the answer, which alone the final norm lets through. A layer reads a few dimensions, scaled to 1
where the residual stream holds a 1; a table has one row per dimension read.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.base import Dtype, Execution
from e88_jax.mixers.e88 import E88Mixer
from e88_jax.model import LanguageModel
from e88_jax.precision import NORM_EPSILON
from e88_jax.projection import InputProjections

Floats = NDArray[np.float64]

SATURATED = 200.0
"""Input of a sigmoid that is 1 in float32, and 0 for its negative: e^-200 is below float32."""
LARGE = 64.0
"""Input that SiLU leaves as it is in float32; the 1e-6 of the l2 norm is rounded away beside it."""
SMALL = 2.0**-13
"""Amplitude at which tanh(x) = x in float32, for |x| up to twice as large: correctly rounded tanh
is x up to 3.5e-4, and XLA's up to 4e-4 on a CPU."""
LOWEST_SILU = -0.278
"""Lowest value of SiLU, at -1.278, rounded up to three digits."""


def silu_inverse(y: Any) -> Floats:
    """The x of at least -1.278 with SiLU(x) = y, in float64, for y of at least -0.278."""
    y = np.asarray(y, np.float64)
    if y.size and y.min() < LOWEST_SILU:
        raise ValueError(f"SiLU is at least {LOWEST_SILU}, got {y.min()}.")
    low, high = np.full(y.shape, -1.278), np.maximum(y, 0) + 1.0
    for _ in range(80):  # bisection: SiLU rises there
        middle = (low + high) / 2
        below = middle / (1 + np.exp(-middle)) < y
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(y == 0, 0.0, high)


@dataclasses.dataclass
class Head:
    """One head by tables of what each dimension read adds before the activations.

    Decay is `sigmoid(-forget)`, as `A_log` and `dt_bias` are 0: `exp(-softplus(a)) = sigmoid(-a)`.
    """

    query: Any
    """`[rows, <= N]`."""
    key: Any
    """`[rows, <= N]`."""
    value: Any
    """`[rows, <= V]`."""
    forget: Any
    """`[rows]`."""
    gate: Any
    """`[rows, <= V]`."""
    out: Any
    """`[<= V, dim]`."""
    write: Any = 0.0
    """`[rows]`; 0 is a write gate of half its scale."""


def lookup(table: Floats, linear_state: bool) -> Head:
    """The head that adds row `a` of `table` `[rows, dim]` at each step that reads row `a`.

    With decay 1 and one key k the state along k is overwritten: x -> (decay - 1) x + v = v. Column
    a of the state is then large where row a is read, and 0 elsewhere.
    """
    rows, held = len(table), LARGE if linear_state else 1.0  # tanh(64) = 1
    one = np.full((rows, 1), LARGE)
    return Head(
        query=one,
        key=one,
        value=LARGE * np.eye(rows),
        forget=-SATURATED,
        gate=np.full((rows, rows), LARGE),
        out=table / (held * LARGE),
    )


def toggle(
    toggles: Sequence[bool],
    amplitude: float,
    gate: Floats,
    out: Any,
    saturation: float = SATURATED,
) -> Head:
    """The head whose state, in every column, is `amplitude` times the parity of the toggles so far.

    A toggle has decay 0, k = e_0 and v = amplitude: x -> amplitude - x, that is 0 -> amplitude ->
    0. Any other token has decay 1, k = e_1 and v = 0: x -> x. Decays are sigmoids of -+saturation.
    """
    which = np.asarray(toggles, np.float64)[:, None]
    return Head(
        query=np.full((len(toggles), 1), LARGE),
        key=LARGE * np.concatenate([which, 1 - which], axis=1),
        value=silu_inverse(amplitude * which * np.ones((1, gate.shape[1]))),
        forget=saturation * (2 * which[:, 0] - 1),
        gate=gate,
        out=np.asarray(out) / (amplitude * LARGE),
    )


def e88_model(dim: int, layers: tuple[E88Config, ...], vocab_size: int, dtype: Dtype) -> LMConfig:
    """The configuration of a model with these layers, each once."""
    return LMConfig(
        dim=dim,
        depth=len(layers),
        layers=layers,
        vocab_size=vocab_size,
        execution=Execution(dtype=dtype),
    )


def margin_scale(code: Floats, mean_square: float) -> float:
    """The final norm's scale with which the right logit is above the others by 1 at least, where
    the residual stream has this mean square and holds a code in the answer's dimensions."""
    products = code @ code.T
    margins = np.diag(products)[:, None] - products
    np.fill_diagonal(margins, np.inf)
    return np.sqrt(mean_square) / margins.min()


def one_layer(layer: E88Config, code: Floats, heads: list[Head], dtype: Dtype) -> LanguageModel:
    """A model of one layer over as many tokens as the lookup head has rows.

    The residual stream is a dimension per token, then the code of the answer, `[classes, n]`, which
    the heads add in place of the token's own.
    """
    tokens = len(heads[-1].query)  # the lookup's
    embedding = np.pad(code, ((0, 0), (tokens, 0)))
    embedding[:tokens, :tokens] = np.eye(tokens)
    dim = embedding.shape[1]
    mean_square = (1 + np.sum(code[0] ** 2)) / dim
    config = e88_model(dim, (layer,), len(code), dtype)
    layers = [(range(tokens), mean_square, heads)]
    norm = margin_scale(code, mean_square)
    return build(config, embedding, layers, slice(tokens, dim), norm)


def two_layers(
    toggles: Sequence[bool], layer: E88Config, code: Floats, heads: list[Head], dtype: Dtype
) -> LanguageModel:
    """A model whose first layer tells the second, besides the token, the parity of the toggles.

    The residual stream is a dimension per token, then the code of the answer, `[classes, n]`, then
    a dimension for each token at parity 0 and for each at parity 1: of these pairs, the rows of the
    second layer's heads, just one is 1. Layer 1 has default options: its output gate opens one
    column for each token.
    """
    toggles = list(toggles)
    i, tokens, n = np.arange(len(toggles)), len(toggles), code.shape[1]
    answer, pairs = slice(tokens, tokens + n), tokens + n + np.arange(2 * tokens)
    dim = tokens + n + len(pairs)
    at_0, at_1 = pairs[:tokens], pairs[tokens:]
    parity, start = np.zeros((tokens, dim)), np.zeros((tokens, dim))
    parity[i, at_1], parity[i, at_0] = 1.0, -1.0
    start[i, at_0], start[:, answer] = 1.0, -code[:tokens]
    linear_state = layer.linear_state
    first = E88Config(n_heads=2, n_state=max(2, tokens), linear_state=linear_state)
    held = LARGE if linear_state else SMALL
    layer_1 = [
        toggle(toggles, held, LARGE * np.eye(tokens), parity),
        lookup(start, linear_state),
    ]
    embedding = np.zeros((len(code), dim))
    embedding[i, i], embedding[:, answer] = 1.0, code
    square = np.sum(code[0] ** 2)
    layers = [(range(tokens), (1 + square) / dim, layer_1), (list(pairs), 2 / dim, heads)]
    config = e88_model(dim, (first, layer), len(code), dtype)
    return build(config, embedding, layers, answer, margin_scale(code, (2 + square) / dim))


def build(
    config: LMConfig,
    embedding: Floats,
    layers: Sequence[tuple[Sequence[int], float, Sequence[Head]]],
    answer: slice,
    norm: float,
) -> LanguageModel:
    """A model with these weights; all others are 0.

    Args:
        config: sizes and options.
        embedding: `[vocab_size, dim]`.
        layers: for each layer the dimensions that it reads, the mean square of the residual stream
            that its norm divides by, and its heads.
        answer: dimensions that the logits read.
        norm: scale of the final norm in those dimensions.
    """
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    shapes = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), shapes))
    _set(model.embed.embedding, embedding)
    for block, (dims, mean_square, heads) in zip(model.blocks, layers, strict=True):
        scale = np.zeros(config.dim)
        scale[list(dims)] = np.sqrt(mean_square + NORM_EPSILON)
        _set(block.norm.scale, scale)
        _set_heads(block.mixer, list(dims), heads)
    scale = np.zeros(config.dim)
    scale[answer] = norm
    _set(model.norm.scale, scale)
    return model


def _set(parameter: Any, value: Floats) -> None:
    parameter[...] = jax.device_put(value.astype(np.float32))


def _set_heads(mixer: Any, dims: list[int], heads: Sequence[Head]) -> None:
    """Sets the kernels of a layer with mamba decay and an output gate."""
    assert isinstance(mixer, E88Mixer)
    config, inputs, rows = mixer.config, mixer.inputs, len(dims)
    assert isinstance(inputs, InputProjections)

    def of(*tables: tuple[Any, int]) -> Floats:
        """The columns of a head: tables, each with zeros up to its number of columns."""
        return np.concatenate([_widened(table, rows, columns) for table, columns in tables], axis=1)

    n_state, n_value = config.n_state, config.n_value
    for projection, of_heads in (
        (inputs.qkv, [of((x.query, n_state), (x.key, n_state), (x.value, n_value)) for x in heads]),
        (inputs.gate, [of((x.gate, n_value)) for x in heads]),
        (inputs.decay, [of((x.forget, 1))[:, 0] for x in heads]),
        (inputs.write_gate, [of((x.write, 1))[:, 0] for x in heads]),
    ):
        if projection is not None:
            kernel = np.zeros(projection.kernel.shape)
            kernel[dims] = np.stack(of_heads, axis=1)
            _set(projection.kernel, kernel)
    out = [_widened(np.transpose(x.out), mixer.dim, n_value).T for x in heads]
    _set(mixer.heads.projection.kernel, np.stack(out))


def _widened(table: Any, rows: int, columns: int) -> Floats:
    """A table `[rows, <= columns]`, or a column of it, or one number, with zeros after it."""
    table = np.asarray(table, np.float64)
    if table.ndim < 2:
        table = np.broadcast_to(table, rows)[:, None]
    return np.pad(table, ((0, 0), (0, columns - table.shape[1])))
