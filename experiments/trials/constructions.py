"""Language models that track by construction: parity, counters, groups. Weights are set by hand.

Every model is a real `LanguageModel` of E88 layers with the default options (SiLU, unit keys, mamba
decay, SiLU gate) but for those that its docstring names. Column j of a head's state, with
b = beta v_j k, follows

    s_t = f(M s_{t-1} + b)      M = decay I - beta k k^T;   f = tanh, or the identity (linear_state)

Decays 0 and 1 are sigmoids of -200 and 200, a write gate of 2 is twice one of 200, as rounded to
float32. `python -m experiments.trials.constructions` measures how long each model is right.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from e88_jax.config import E88Config
from e88_jax.mixers.base import Dtype
from e88_jax.model import LanguageModel
from experiments import cli
from experiments.trials.hand_set import (
    LARGE,
    LOWEST_SILU,
    SATURATED,
    SMALL,
    Floats,
    Head,
    build,
    e88_model,
    lookup,
    one_layer,
    silu_inverse,
    toggle,
    two_layers,
)

BIT_CODE = np.array([[-0.5], [0.5]])


def _shift_codes() -> Floats:
    """Matrix `[2, 3]` that turns the code of either bit, in dimension 2, into the code of 0."""
    return np.pad(BIT_CODE[:1] - BIT_CODE, ((0, 0), (2, 0)))


def parity(
    *,
    linear_state: bool = False,
    amplitude: float = SMALL,
    saturation: float = SATURATED,
    dtype: Dtype = "float32",
) -> LanguageModel:
    """Parity of bits in one layer of default options; the target is (x_1 + ... + x_t) mod 2.

    On a 1, decay is 0, k = e_0 and v = c, the amplitude; on a 0, decay is 1, k = e_1 and v = 0:

        s_t = c - s_{t-1} on a 1,  s_t = s_{t-1} on a 0;   s_0 = 0, so s_t = c * parity

    With tanh, s -> tanh(c - s) contracts to its fixed point, unless c is so small that tanh(c) = c
    in float32. Decays are sigmoids of -+saturation: at a saturation a below 17, where they are not
    0 and 1 in float32, errors grow to c / 2 in about 3 e^a steps.
    """
    layer = E88Config(n_heads=2, n_state=2, linear_state=linear_state)
    to_answer = [[0.0, 0.0, 1.0]]
    flip = toggle([False, True], amplitude, np.full((2, 1), LARGE), to_answer, saturation)
    return one_layer(layer, BIT_CODE, [flip, lookup(_shift_codes(), linear_state)], dtype)


def flip_flop(*, amplitude: float = SMALL, dtype: Dtype = "float32") -> LanguageModel:
    """Parity of bits in one layer with `write_gate_scale` 2 and tanh; ones correct errors.

    On a 1, decay is 0, beta 2, k = e_0 and v = c / 2; on a 0, decay is 1, k = e_1 and v = 0:

        s_t = tanh(c - 2 s_{t-1}) on a 1,  s_t = tanh(s_{t-1}) on a 0;   s_0 = 0

    On ones the sign alternates, from tanh(c) > 0 at the first, and |s| tends to the cycle +-0.957,
    where s = tanh(2 s), from any start. On zeros |s| falls as (3 / 2t)^(1/2) until tanh(s) = s in
    float32. So s >= c or s <= -c or s = 0, and the answer is 1 where s > c / 2.
    """
    layer = E88Config(n_heads=2, n_state=2, write_gate=True, write_gate_scale=2.0)
    flip = toggle([False, True], amplitude, np.full((2, 1), LARGE), [[0.0, 0.0, 1.0]])
    flip.value = silu_inverse([[0.0], [amplitude / 2]])
    flip.write = [0.0, SATURATED]
    return one_layer(layer, BIT_CODE, [flip, lookup(_shift_codes(), False)], dtype)


def error_correcting_parity(*, dtype: Dtype = "float32") -> LanguageModel:
    """Parity of bits in two layers with `write_gate_scale` 2 and tanh; every state corrects errors.

    No sigmoid is saturated, and nothing depends on rounding. Layer 1 has a clock, a trace of the
    bit before and a mark of the first token (decay and beta: 0.05, 1.9; 0.75, 1; 0.5, 1):

        c_t = tanh(0.74 - 1.86 c_{t-1})         + at odd t, - at even t
        l_t = tanh(1.02 x_t - l_{t-1} / 4)      tells x_{t-1} once x_t is known
        m_t = tanh(0.55 - m_{t-1} / 2)          0.50 at t = 1, at most 0.39 later

    Clock and trace have a column for each value of x_t, which the output gate opens for it alone,
    so that layer 2 reads them together with x_t. It keeps a sign, with v > 0 at t = 1 alone:

        s_t = tanh(v - 1.9 s_{t-1})     t odd: k = e_0, decay near 0
        s_t = tanh(-1.05 s_{t-1})       t even, x_t = x_{t-1}: k = e_0, decay near 0.9
        s_t = tanh(0.9 s_{t-1})         t even, x_t != x_{t-1}: k near e_1 or e_2, decay near 0.9

    Over two steps the sign changes by x_{t-1} + x_t, and a small |s| grows by at least 1.5. At even
    t, s_t > 0 means odd parity; at odd t the query is e_0 or -e_0, by x_t.
    """
    layer = E88Config(n_heads=3, n_state=3, write_gate=True, write_gate_scale=2.0)
    token, clock, trace, mark, answer, dim = [0, 1], [2, 3], [4, 5], 6, 7, 8
    embedding = np.zeros((2, dim))
    embedding[:, token], embedding[:, answer:] = np.eye(2), BIT_CODE

    def to(dims: Sequence[int], scale: float) -> Floats:
        return scale * np.eye(dim)[list(dims)]

    one, each = np.full((2, 1), LARGE), LARGE * np.eye(2)
    layer_1 = [
        Head(one, one, np.full((2, 2), 0.6), 3.0, each, to(clock, 1 / LARGE), write=3.0),
        Head(one, one, [[0.0, 0.0], [1.3, 1.3]], -np.log(3), each, to(trace, 1 / LARGE)),
        Head(one, one, np.full((2, 1), 0.8), 0.0, one, to([mark], 1 / LARGE)),
    ]
    rows = 7  # token, clock, trace, mark
    query, key, value = np.zeros((rows, 1)), np.zeros((rows, 3)), np.zeros((rows, 1))
    query[[1, 2], 0] = 1.0, -1.3  # x_t = 1; x_t = 0 at odd t
    key[token, 0] = 0.5
    # 20 where x_{t-1} differs from x_t, -20 where it does not, within 30 %; column 1 for x_t = 0.
    key[[trace[0], 0], 1] = 20 * np.array([-1, -0.09]) / 0.08
    key[[trace[1], 1], 2] = 20 * np.array([1, -0.73]) / 0.043
    for x in range(2):
        key[[x, clock[x]], 1 + x] -= 30 * np.array([0.6, 1.0])  # below 0 at odd t
        key[1 - x, 1 + x] = -100.0
    value[[0, 1, mark], 0] = 160 * np.array([-0.44, -0.44, 1])
    forget, gate, write = np.zeros(rows), np.zeros((rows, 1)), np.zeros(rows)
    forget[clock], gate[token], write[token] = 3.0, 3.0, 4.0
    layer_2 = [Head(query, key, value, forget, gate, to([answer], 4.0), write)]
    config = e88_model(dim, (layer, dataclasses.replace(layer, n_heads=1)), 2, dtype)
    layers = [(token, 1.25 / dim, layer_1), (range(rows), 1.6 / dim, layer_2)]
    return build(config, embedding, layers, slice(answer, dim), 1.0)


def counter_4(*, linear_state: bool = False, dtype: Dtype = "float32") -> LanguageModel:
    """Sums of 0, 1, 2 and 3 modulo 4, in two layers of default options: parity twice.

    Layer 1 has the low bit. Layer 2 has the high bit, which toggles on 2 and 3, and on a carry: an
    odd number that leaves the low bit at 0.
    """
    layer = E88Config(n_heads=2, n_state=8, linear_state=linear_state)
    bits = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])  # low, high
    carries = [low == 0 and x % 2 == 1 for low in (0, 1) for x in range(4)]
    toggles = [bool(high ^ carry) for high, carry in zip([0, 0, 1, 1] * 2, carries, strict=True)]
    dim, answer = 4 + 2 + 8, slice(4, 6)
    low_bit, high_bit = np.zeros((8, dim)), np.zeros((1, dim))
    low_bit[:, answer] = -0.5
    low_bit[4:, 4] = 0.5
    high_bit[0, 5] = 1.0
    amplitude = LARGE if linear_state else SMALL
    flip = toggle(toggles, amplitude, np.full((8, 1), LARGE), high_bit)
    heads = [flip, lookup(low_bit, linear_state)]
    return two_layers([False, True, False, True], layer, bits - 0.5, heads, dtype)


def track(
    tokens: Any,
    classes: Any,
    query: Any,
    mirror: Any = None,
    *,
    linear_state: bool = True,
    amplitude: float = 0.125,
    use_silu: bool = True,
    dtype: Dtype = "float32",
) -> LanguageModel:
    """The running product of orthogonal matrices, by reflections with `write_gate_scale` 2.

    The target at t is the class whose matrix is G_t = X_t ... X_1, X_i that of the i-th token. With
    decay 1 and beta 2 a step is a reflection, so tokens that are reflections need one layer:

        H_t = (I - 2 k_t k_t^T) H_{t-1}      k_t the normal of X_t;  H = G

    For tokens of determinant 1 too, layer 1 has e_t, the parity of the number of these so far, and
    layer 2 has H_t = F^(e_t) G_t with a mirror F. As F^(e_t) X_t F^(e_{t-1}) has determinant -1,
    every step is a reflection again, by a key that depends on x_t and e_t: the output gate of layer
    1 gives layer 2 one dimension for each pair of them.

    H_0 = I has to come from a state of zeros. So the state is S_t = C (I - H_t), C the amplitude;
    its values are v_t = C k_t. The output S_t^T q is C (q - H_t^T q), and with the query
    F^(e_t) q the code of an answer is G_t^T q.

    Rows of the state come twice, so that a key is (n, n) / 2^(1/2) for a normal n: those of swaps
    have entries +-1/2, exact in every dtype.

    Args:
        tokens: orthogonal matrices `[tokens, n, n]`.
        classes: those of the answers, `[classes, n, n]`, at least as many.
        query: `[n]`, with another image G^T q for each class.
        mirror: F; None where all tokens are reflections, for one layer.
        linear_state: without tanh, which distorts the state, the less the smaller the amplitude.
        amplitude: C.
        use_silu: with SiLU, keys and values with entries below 0 are small before it and not exact.
        dtype: compute dtype.

    Raises:
        ValueError: a token is neither a reflection nor, with a mirror, the product of two, or with
            SiLU an entry of C k_t is too far below 0.
    """
    tokens, classes, query = (np.asarray(x, np.float64) for x in (tokens, classes, query))
    code = np.einsum("cij,i->cj", classes, query)
    n_tokens, n = len(tokens), len(query)
    mirrors = np.array([np.eye(n)] if mirror is None else [np.eye(n), mirror])
    # Rows of layer 2: x_t of every token with e_t = 0, then with e_t = 1.
    turns = np.linalg.det(tokens) > 0
    if mirror is None and turns.any():
        raise ValueError("tokens of determinant 1 need a mirror.")
    steps = [
        mirrors[e] @ x @ mirrors[e ^ turn]
        for e in range(len(mirrors))
        for x, turn in zip(tokens, turns, strict=True)
    ]
    normals = np.array([_normal(step) for step in steps])
    queries = np.repeat(mirrors @ query, n_tokens, axis=0)
    rows = len(steps)
    layer = E88Config(
        n_heads=2,
        n_state=max(2 * n, rows),
        write_gate=True,
        write_gate_scale=2.0,
        linear_state=linear_state,
        use_silu=use_silu,
    )
    dim, answer = n_tokens + n + (0 if mirror is None else rows), slice(n_tokens, n_tokens + n)
    values = amplitude * np.sqrt(2) * normals
    keys = np.tile(normals, 2) * (LARGE * np.sqrt(2))
    if use_silu:
        if normals.min() < -1e-9:
            keys *= LOWEST_SILU / keys.min()
        keys, values = silu_inverse(keys), silu_inverse(values)
    read, constant = np.zeros((n, dim)), np.zeros((rows, dim))
    read[:, answer] = -np.eye(n) * np.linalg.norm(query) / (amplitude * LARGE)
    constant[:, answer] = queries
    reflect = Head(
        query=LARGE * queries,
        key=keys,
        value=values,
        forget=-SATURATED,
        gate=np.full((rows, n), LARGE),
        out=read,
        write=SATURATED,
    )
    if mirror is None:
        constant[:, answer] -= code[:n_tokens]
        return one_layer(layer, code, [reflect, lookup(constant, linear_state)], dtype)
    heads = [reflect, lookup(constant, linear_state)]
    return two_layers(turns.tolist(), layer, code, heads, dtype)


def _normal(reflection: Floats) -> Floats:
    """The unit vector n of a reflection I - 2 n n^T, that of the two whose sum is not below 0."""
    square = (np.eye(len(reflection)) - reflection) / 2
    largest = np.argmax(np.diag(square))
    n = square[:, largest] / np.sqrt(square[largest, largest])
    if not np.allclose(square, np.outer(n, n)):
        raise ValueError(f"not a reflection: {reflection}.")
    return n if n.sum() > -1e-9 else -n


def permutation_matrix(p: Sequence[int]) -> Floats:
    """The matrix that takes e_i to e_p[i]."""
    return np.eye(len(p))[list(p)].T


def counter(modulus: int, **options: Any) -> LanguageModel:
    """Sums of integers below `modulus`, at least 3, modulo it, in two layers; options as `track`.

    An integer x turns a plane by 2 pi x / modulus; the clock of layer 1 is the parity of t. For 3,
    turns are the rotations of three things, whose mirrors are swaps.
    """
    if modulus == 3:
        turns = [permutation_matrix(np.roll([0, 1, 2], -x).tolist()) for x in range(3)]
        return track(turns, turns, [2.0, 1.0, 0.0], permutation_matrix([1, 0, 2]), **options)
    angles = 2 * np.pi * np.arange(modulus) / modulus
    cos, sin = np.cos(angles), np.sin(angles)
    turns = np.moveaxis(np.array([[cos, -sin], [sin, cos]]), 2, 0)
    return track(turns, turns, [1.0, 0.0], np.diag([1.0, -1.0]), **options)


def symmetric_group_3(**options: Any) -> LanguageModel:
    """Products of elements of S_3, tokens in lexicographic order, in two layers; options as
    `track`."""
    elements = [permutation_matrix(p) for p in itertools.permutations(range(3))]
    return track(elements, elements, [2.0, 1.0, 0.0], permutation_matrix([1, 0, 2]), **options)


def adjacent_swaps(n: int = 5, **options: Any) -> LanguageModel:
    """Products of swaps of neighbours among n things, in one layer; options as `track`.

    Token i swaps i and i + 1; classes are the permutations in lexicographic order. With the sign of
    every other thing turned a swap has the normal (e_i + e_{i+1}) / 2^(1/2), exact after SiLU.
    """
    signs = np.diag((-1.0) ** np.arange(n))

    def signed(p: Sequence[int]) -> Floats:
        return signs @ permutation_matrix(p) @ signs

    things = list(range(n))
    swaps = [signed([*things[:i], i + 1, i, *things[i + 2 :]]) for i in range(n - 1)]
    elements = [signed(p) for p in itertools.permutations(things)]
    return track(swaps, elements, [(n - i) // 2 for i in range(n)], **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstructionsConfig:
    """Measure how long the models whose weights are set by hand are right, on random sequences and
    on sequences of one token. Prints Markdown tables."""

    length: int = 16_384
    """Tokens of a sequence, at most."""
    sequences: int = 16
    """Random sequences per model; those of one token come on top."""
    seed: int = 0
    """The same seed gives the same sequences and noise."""

    def __post_init__(self) -> None:
        cli.require(self, "length", "sequences", minimum=1)
        cli.require(self, "seed", minimum=0)


def main(args: Sequence[str]) -> None:
    """Parses, measures, prints."""
    config = cli.parse(ConstructionsConfig, args)
    from experiments.trials import horizons

    horizons.report(config.length, config.sequences, config.seed)


if __name__ == "__main__":
    cli.run(main)
