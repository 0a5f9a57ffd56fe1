"""From a budget of parameters and a GPU to configurations: the guide's procedure, done exactly.

The search, `closest`, is that of `compare.py` too.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, get_args

from e88_jax.checks import require_choice, require_instance, require_int, require_number, shown
from e88_jax.config import E88Config, LMConfig, OutputGate
from e88_jax.hardware import GPU, require_gpu
from e88_jax.sizing.guide import d_inner_of, e88_layer
from pallas_kernels.limits import MAX_SIZE, SIZE_MULTIPLE, takes_size

SMALLEST, LARGEST = 1_000_000, 10_000_000_000
TOLERANCE = 0.01
"""Relative distance from the budget that is accepted."""
DIM_MULTIPLE = 64
ANY_GPU = (32, 48, 64)
"""Sizes n_state where no GPU is given: the sizing guide's for consumer and datacenter cards."""
_WIDEST = 2.0  # dim / d_inner, and its inverse


def parse_params(text: str) -> int:
    """A budget such as 500M, 1.3B, 250k or 25000000.

    Raises:
        TypeError: the text is no string.
        ValueError: it is none.
    """
    require_instance("text", text, str)
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmb]?)", text.strip().lower(), re.ASCII)
    params = float(match[1]) if match else math.inf
    if match is None or math.isinf(params):
        raise ValueError(f"a budget is a number such as 500M, 1.3B or 25000000, got {shown(text)}.")
    return round(params * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2]])


def usual_depth(params: int) -> int:
    """Layers of a model of this size: the guide's 20 at 100M and 500M and 24 at 1B.

    Outside of that range it grows with the cube root of the size.
    """
    if params < 100e6:
        return max(2, round(20 * (params / 100e6) ** (1 / 3)))
    return 20 if params < 750e6 else max(24, round(24 * (params / 1e9) ** (1 / 3)))


def imbalance(ratio: float) -> float:
    """Distance of a ratio from 1, in widths of the guide's balanced band."""
    return abs(math.log(ratio)) / math.log(1.2)


@dataclasses.dataclass(frozen=True)
class Solution:
    """A configuration near a budget."""

    config: LMConfig
    params: int
    budget: int

    @property
    def error(self) -> float:
        """Relative distance from the budget."""
        return self.params / self.budget - 1

    @property
    def ratio(self) -> float:
        """dim / d_inner."""
        return self.config.dim / d_inner_of(self.config)

    @property
    def distance(self) -> float:
        """From the budget, in hundredths, and from balance, in widths of the guide's band."""
        return abs(self.error) / TOLERANCE + imbalance(self.ratio)


def solve(
    params: int,
    *,
    gpu: GPU | None = None,
    depth: int | None = None,
    n_state: int | None = None,
    vocab_size: int = 256,
    gate: OutputGate = "silu",
) -> list[Solution]:
    """Configurations of `params` parameters to 1 %, nearest to it and to balance first.

    For each n_state and depth the best one, with a dim that is a multiple of 64. n_state and depth
    that are not given are those that suit the GPU and the size, and their neighbours.

    Args:
        params: exact count wanted, 1M to 10B.
        gpu: to train on; None for any.
        depth: layers.
        n_state: a multiple of 4 up to 128.
        vocab_size: token ids.
        gate: the layers' output gate; with "none" they have a fifth fewer parameters.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or no such configuration; the message says what
            would do.
    """
    if not SMALLEST <= require_number("params", params) <= LARGEST:
        raise ValueError(f"params, the budget, must be 1M to 10B parameters, got {params:,}.")
    require_gpu(gpu)
    if n_state is not None:
        n_state = require_int("n_state", n_state, minimum=SIZE_MULTIPLE)
        if not takes_size(n_state):
            raise ValueError(
                f"n_state must be a multiple of {SIZE_MULTIPLE} up to {MAX_SIZE}, got {n_state}."
            )
    depth = None if depth is None else require_int("depth", depth)
    vocab_size = require_int("vocab_size", vocab_size)
    require_choice("gate", gate, get_args(OutputGate))
    usual, recommended = usual_depth(params), gpu.recommended_n_state if gpu else ANY_GPU
    usual_depths = range(math.ceil(0.75 * usual), math.floor(1.25 * usual) + 1)

    def groups(depths: Iterable[int], sizes: Iterable[int]) -> Iterator[Iterator[Solution]]:
        sizes = [n_state] if n_state else sizes
        for n, layers in itertools.product(sizes, [depth] if depth else depths):
            yield _candidates(params, n, layers, vocab_size, gate)

    # Small models have few multiples of 64 to choose from: for some, other sizes must do.
    others = range(min(*recommended, 16), max(recommended) + 1, SIZE_MULTIPLE)
    rounds = groups(usual_depths, recommended), groups(range(1, 2 * usual + 1), others)
    near, found = closest(rounds, TOLERANCE)
    if not near:
        raise ValueError(_why_not(params, n_state, depth, vocab_size, found))
    return near


class Candidate(Protocol):
    """A configuration near a budget."""

    @property
    def error(self) -> float:
        """Relative distance from the budget."""
        ...

    @property
    def distance(self) -> float:
        """Distance from the budget and from the proportions wanted; rows are sorted by it."""
        ...


C = TypeVar("C", bound=Candidate)


def closest(rounds: Iterable[Iterable[Iterable[C]]], tolerance: float) -> tuple[list[C], list[C]]:
    """The candidates within the tolerance, by distance, of the first round that has any; and the
    best of all groups of the rounds searched.

    A round is groups of candidates, of each of which the best is taken.
    """

    def is_far_and_distance(candidate: C) -> tuple[bool, float]:
        return abs(candidate.error) > tolerance, candidate.distance

    found: list[C] = []
    for groups in rounds:
        best = (min(group, key=is_far_and_distance, default=None) for group in groups)
        found += [candidate for candidate in best if candidate is not None]
        near = [x for x in found if abs(x.error) <= tolerance]
        if near:
            return sorted(near, key=lambda x: x.distance), found
    return [], found


def _candidates(
    params: int, n_state: int, depth: int, vocab_size: int, gate: OutputGate
) -> Iterator[Solution]:
    """For each dim near balance, the numbers of heads below and above the budget."""

    def config(dim: int, heads: int) -> LMConfig:
        layer = E88Config(n_heads=heads, n_state=n_state, output_gate=gate)
        return LMConfig(dim=dim, depth=depth, layers=(layer,), vocab_size=vocab_size)

    def counts(heads: int) -> Iterator[int]:
        """At each multiple of 64; the count is affine in dim."""
        first, second = (config(n * DIM_MULTIPLE, heads).count_params() for n in (1, 2))
        return itertools.count(first, second - first)

    matrices = 4 if gate == "none" else 5
    balanced = math.sqrt(params / (matrices * depth))
    dims = range(DIM_MULTIPLE, round(1.5 * balanced) + DIM_MULTIPLE + 1, DIM_MULTIPLE)
    for dim, base, of_two in zip(dims, counts(1), counts(2), strict=False):
        per_head = of_two - base  # the count is affine in the heads
        heads = 1 + (params - base) / per_head
        for h in {math.floor(heads), math.ceil(heads)}:
            if h >= 1 and 1 / _WIDEST <= dim / (h * n_state) <= _WIDEST:
                yield Solution(config(dim, h), round(base + (h - 1) * per_head), params)


def _why_not(
    params: int, n_state: int | None, depth: int | None, vocab_size: int, found: list[Solution]
) -> str:
    asked = [f"{params:,} parameters"]
    asked += [f"depth {depth}"] if depth else []
    asked += [f"n_state {n_state}"] if n_state else []
    message = f"no configuration with dim a multiple of {DIM_MULTIPLE} has {' and '.join(asked)}"
    if not found:
        smallest = vocab_size * DIM_MULTIPLE
        return (
            f"{message} and dim within a factor {_WIDEST:g} of d_inner: the embedding of "
            f"{vocab_size:,} ids takes at least {smallest:,}; take "
            f"{'another depth' if depth else 'a smaller vocabulary'} or a larger budget."
        )
    nearest = min(found, key=lambda s: abs(s.error))
    config, layer = nearest.config, e88_layer(nearest.config)
    return (
        f"{message} to {TOLERANCE:.0%}: the nearest has {nearest.params:,} (dim {config.dim}, "
        f"{layer.n_heads} heads of {layer.n_state}, depth {config.depth}); take that budget, or "
        "leave depth or n_state open."
    )
