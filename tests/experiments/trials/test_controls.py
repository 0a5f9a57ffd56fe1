"""Controls have E88's parameters, and what their titles say."""

import itertools

import pytest

from experiments.trials.controls import CONTROLS, TOLERANCE, VARIANTS, Size, build
from experiments.trials.suites import SUITES

SIZES = list(dict.fromkeys(size for suite in SUITES.values() for size in suite.sizes))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (name, size)
        for name, size in [
            *itertools.product(CONTROLS, SIZES),
            *itertools.product(VARIANTS, SUITES["ablations"].sizes),
        ]
        if name != "hybrid" or size.depth > 1
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [2, 120])
def test_parameters_are_equal(name: str, size: Size, vocab_size: int) -> None:
    e88, control = build("e88", size, vocab_size), build(name, size, vocab_size)
    assert e88 is not None
    assert control is not None
    assert abs(control.count_params() / e88.count_params() - 1) <= TOLERANCE
    assert (control.dim, control.depth, control.vocab_size) == (size.dim, size.depth, vocab_size)


def test_a_hybrid_needs_two_layers() -> None:
    assert build("hybrid", Size(dim=32, depth=1, n_heads=2, n_state=16), 5) is None


def test_gated_deltanet_has_the_heads_that_are_asked_for() -> None:
    model = build("gdn", Size(dim=384, depth=4, n_heads=32), 5)
    assert model is not None
    (layer,) = model.layers
    assert (layer.n_heads, layer.head_dim, layer.value_dim) == (32, 32, 32)  # pyright: ignore


def test_a_transformer_has_a_channel_mixer() -> None:
    model = build("transformer", Size(dim=128, depth=2, n_heads=8), 5)
    assert model is not None
    assert model.channel_mixer_dim is not None


def test_the_author_s_e88_is_as_published() -> None:
    """7,917,184 parameters with a vocabulary of 4: the count that his runs on a ring report."""
    model = build("e88", SUITES["author"].sizes[0], 4)
    assert model is not None
    assert model.count_params() == 7_917_184
