"""Models of one budget: E88, the mixers that it is compared with, and hybrids.

Each family is sized as its authors advise.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

from e88_jax.config import E88Config, LMConfig
from e88_jax.hardware import GPU
from e88_jax.mixers.base import MixerConfig
from e88_jax.mixers.baselines import AttentionConfig, GatedDeltaNetConfig, Mamba2Config
from e88_jax.sizing.guide import e88_layer
from e88_jax.sizing.search import closest, imbalance, solve, usual_depth

TOLERANCE = 0.005
"""Relative distance from the budget that is accepted."""
GATED_DELTANET_WIDTH = 0.75
"""n_heads * head_dim over dim (Gated DeltaNet, `docs/references.md`)."""
SWIGLU_WIDTH = 8 / 3
"""Width of a transformer's channel mixer over dim (SwiGLU, `docs/references.md`)."""
_HEAD = 64  # of attention
_MULTIPLE = 64  # of dim, where one is near enough
_LARGEST_DIM = 16_384
_LARGEST_BAND = 1.2  # d_inner over dim of E88 layers, and its inverse

Sized = Callable[[int], Iterable[tuple[tuple[MixerConfig, ...], float]]]
"""The layers of a family in a model of this dim, and their width over the advised one; the choice
nearest to the advice first."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one kind or pattern of layers."""

    name: str
    depth: int
    """Usual number of layers at 500M."""
    layers: Sized
    dim_multiple: int = _MULTIPLE
    """Smallest multiple of dim that the layers take."""
    pattern: int = 1
    """Layers after which the pattern repeats; the depth is a multiple of it."""
    channel_mixer: bool = False

    def usual_depth(self, params: int) -> int:
        """The usual number of layers at this size; it grows as E88's."""
        usual = self.depth * usual_depth(params) / usual_depth(500_000_000)
        return max(1, round(usual / self.pattern)) * self.pattern

    def depths(self, params: int, reach: float) -> list[int]:
        """Depths within a fraction `reach` of the usual one."""
        usual = self.usual_depth(params)
        low, high = math.ceil((1 - reach) * usual), math.floor((1 + reach) * usual)
        return [depth for depth in range(low, high + 1) if depth % self.pattern == 0]


@dataclasses.dataclass(frozen=True)
class Match:
    """A model of a family near a budget."""

    family: str
    """The family's name, for readers."""
    config: LMConfig
    params: int
    budget: int
    disproportion: float
    """Distance from the advised width and the usual depth; 1 is a fifth or a quarter."""

    @property
    def error(self) -> float:
        """Relative distance from the budget."""
        return self.params / self.budget - 1

    @property
    def within(self) -> bool:
        """Whether the budget is met within `TOLERANCE`."""
        return abs(self.error) <= TOLERANCE

    @property
    def distance(self) -> float:
        """From the budget, in hundredths, and from the proportions."""
        return 100 * abs(self.error) + self.disproportion

    @property
    def sizes(self) -> str:
        """Sizes of each kind of layer, in words."""
        kinds = {layer.kind: _in_words(layer, self.config.dim) for layer in self.config.layers}
        words = list(kinds.values())
        if (hidden := self.config.channel_mixer_dim) is not None:
            words.append(f"SwiGLU {hidden}")
        return ", ".join(words)

    def states(self, length: int) -> dict[str, int]:
        """Elements that a layer keeps of a sequence of `length` tokens, by the layer's kind."""
        dim = self.config.dim
        return {layer.kind: _layer_state(layer, dim, length) for layer in self.config.layers}

    def state(self, length: int) -> int:
        """`state_after` of the model."""
        return state_after(self.config, length)


def state_after(config: LMConfig, length: int) -> int:
    """Elements that all layers keep of a sequence of `length` tokens: states, and the keys and
    values of attention."""
    return sum(_layer_state(layer, config.dim, length) for layer in config.mixers)


def _layer_state(layer: MixerConfig, dim: int, length: int) -> int:
    if isinstance(layer, AttentionConfig):
        tokens = length if layer.window is None else min(length, layer.window)
        return 2 * layer.kv_heads * layer.head_dim * tokens
    return layer.state_size(dim)


def _in_words(layer: MixerConfig, dim: int) -> str:
    match layer:
        case E88Config():
            return _heads(layer.n_heads, layer.n_state, layer.n_value)
        case GatedDeltaNetConfig():
            return _heads(layer.value_heads, layer.head_dim, layer.value_dim)
        case Mamba2Config():
            return _heads(layer.n_heads(dim), layer.d_state, layer.head_dim)
        case AttentionConfig():
            return _heads(layer.n_heads, layer.head_dim)
        case _:
            return layer.kind


def _heads(n: int, *shape: int) -> str:
    return f"{n} head{'s' if n > 1 else ''} of {' x '.join(map(str, shape))}"


def _e88(dim: int, n_state: int) -> Iterator[tuple[E88Config, float]]:
    """Layers of the guide's balanced band."""
    low, high = dim / _LARGEST_BAND / n_state, dim * _LARGEST_BAND / n_state
    heads = range(max(1, math.ceil(low)), math.floor(high) + 1)
    for n in sorted(heads, key=lambda n: abs(n * n_state - dim)):
        yield E88Config(n_heads=n, n_state=n_state), n * n_state / dim


def _gated_deltanets(dim: int) -> Iterator[tuple[GatedDeltaNetConfig, float]]:
    """Layers with the numbers of heads on both sides of the advised width."""
    size = 128
    wanted = GATED_DELTANET_WIDTH * dim / size
    around = {max(1, math.floor(wanted)), math.ceil(wanted)}
    for n in sorted(around, key=lambda n: abs(n - wanted)):
        yield GatedDeltaNetConfig(n_heads=n, head_dim=size, expand_v=2.0), n / wanted


def _attention(dim: int) -> AttentionConfig:
    return AttentionConfig(n_heads=dim // _HEAD, head_dim=_HEAD)


def _with_attention(
    choices: Iterable[tuple[MixerConfig, float]], dim: int
) -> Iterator[tuple[tuple[MixerConfig, ...], float]]:
    """Three layers and one of attention."""
    for layer, width in choices:
        yield (layer, layer, layer, _attention(dim)), width


def _families(n_state: int) -> tuple[Family, ...]:
    """The families beside E88; `n_state` is that of the E88 layers of the hybrid."""
    mamba2 = (Mamba2Config(expand=2.0, d_state=128, head_dim=64),)
    return (
        Family(
            "Gated DeltaNet",
            23,
            lambda dim: (((layer,), width) for layer, width in _gated_deltanets(dim)),
            dim_multiple=32,
        ),
        Family("Mamba2", 32, lambda _: [(mamba2, 1.0)], dim_multiple=32),
        Family("transformer", 24, lambda dim: [((_attention(dim),), 1.0)], channel_mixer=True),
        Family(
            "E88 and attention, 3 : 1",
            20,
            lambda dim: _with_attention(_e88(dim, n_state), dim),
            pattern=4,
        ),
        Family(
            "Gated DeltaNet and attention, 3 : 1",
            24,
            lambda dim: _with_attention(_gated_deltanets(dim), dim),
            pattern=4,
        ),
    )


def compare(params: int, *, gpu: GPU | None = None, vocab_size: int = 256) -> list[Match]:
    """Models of `params` parameters to 0.5 %: E88, Gated DeltaNet, Mamba2, a transformer, and
    hybrids of E88 and of Gated DeltaNet with attention.

    E88 is the first row of `solve` that is near enough. The others have the proportions that their
    authors advise (`docs/references.md`), and a depth near a usual one:

    - Gated DeltaNet: heads of 128 x 256, n_heads * head_dim about 0.75 dim; 23 layers at 500M.
    - Mamba2: expand 2, heads of 128 x 64; 32 layers at 500M.
    - Transformer: heads of 64, n_heads * head_dim = dim, and in each layer a SwiGLU channel mixer
      of 8/3 dim, rounded to a multiple of 64; 24 layers at 500M, as GPT-3 of 350M and of 760M.
    - Hybrids: three layers of E88, balanced and of the first row's n_state, or of Gated DeltaNet,
      then one of attention, again and again, without a channel mixer; 20 and 24 layers at 500M.

    The depths grow with the size as `solve`'s do. dim is a multiple of 64, or for Gated DeltaNet
    and Mamba2 of 32, if no multiple of 64 is near enough.

    Args:
        params: exact count wanted, 1M to 10B.
        gpu: to train on; None for any.
        vocab_size: token ids.

    Returns:
        A model of each family; the nearest there is, if none is `within` 0.5 %.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or no E88 model of that size.
    """
    solutions = solve(params, gpu=gpu, vocab_size=vocab_size)
    best = next((s for s in solutions if abs(s.error) <= TOLERANCE), solutions[0])
    layer = e88_layer(best.config)
    e88 = Match("E88", best.config, best.params, params, imbalance(best.ratio))
    return [e88, *(_sized(family, params, vocab_size) for family in _families(layer.n_state))]


def _sized(family: Family, params: int, vocab_size: int) -> Match:
    """The model of the family that is nearest to the budget, or to its proportions among those
    within `TOLERANCE`."""
    reaches = ((_MULTIPLE, 0.25), (family.dim_multiple, 0.25), (family.dim_multiple, 0.5))
    rounds = (
        (
            _candidates(family, params, depth, multiple, vocab_size)
            for depth in family.depths(params, reach)
        )
        for multiple, reach in dict.fromkeys(reaches)
    )
    near, found = closest(rounds, TOLERANCE)
    return near[0] if near else min(found, key=lambda match: abs(match.error))


def _candidates(
    family: Family, params: int, depth: int, multiple: int, vocab_size: int
) -> Iterator[Match]:
    """Models of the two dims below the budget and the two above."""
    usual = family.usual_depth(params)

    def models(dim: int) -> Iterator[Match]:
        hidden = max(1, round(SWIGLU_WIDTH * dim / _MULTIPLE)) * _MULTIPLE
        for layers, width in family.layers(dim):
            config = LMConfig(
                dim=dim,
                depth=depth,
                layers=layers,
                vocab_size=vocab_size,
                channel_mixer_dim=hidden if family.channel_mixer else None,
            )
            off = imbalance(width) + abs(math.log(depth / usual)) / math.log(1.25)
            yield Match(family.name, config, config.count_params(), params, off)

    def first_count(dim: int) -> int:
        return next(models(dim)).params

    dims = range(multiple, _LARGEST_DIM, multiple)
    above = bisect.bisect_left(dims, params, key=first_count)
    for dim in dims[max(0, above - 2) : above + 2]:
        yield from models(dim)
