"""Chunks of time: a wavefront computes what layers do one after the other."""

import dataclasses
import functools
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import (
    AttentionConfig,
    E88Config,
    GatedDeltaNetConfig,
    LanguageModel,
    LMConfig,
    LSTMConfig,
    Mamba2Config,
)
from e88_jax.mixers.base import Execution, MixerConfig, Remat
from e88_jax.wavefront import ChunkInputs, cut, joined, wavefront
from tests.recurrence_calls import QUICK_TO_COMPILE

BATCH, TIME, VOCAB, DEPTH = 2, 12, 11, 2
LAYERS: dict[str, MixerConfig] = {
    "e88": E88Config(n_heads=3, n_state=4),
    "e88_options": E88Config(
        n_heads=3,
        n_state=4,
        expansion=2.0,
        conv_size=4,
        write_gate=True,
        head_mix="input_weighted",
        output_norm=True,
    ),
    "gated_deltanet": GatedDeltaNetConfig(n_heads=2, head_dim=4),
    "mamba2": Mamba2Config(d_state=5, head_dim=4),
    "lstm": LSTMConfig(width=5),
    "window": AttentionConfig(n_heads=3, head_dim=4, window=5),
    "attention": AttentionConfig(n_heads=3, head_dim=4),
}
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(BATCH, TIME)).astype(np.int32)
# Documents that end within a chunk of 4 or 6 tokens, at its end, and one over several.
IDS = np.asarray([[0] * 3 + [1] * 3 + [2] * 2 + [5] * 4, [7] * 4 + [1] * 8], np.int32)


def config(name: str, time_chunks: int = 1, remat: Remat = "none", depth: int = DEPTH) -> LMConfig:
    return LMConfig(
        dim=12,
        depth=depth,
        layers=(LAYERS[name],),
        vocab_size=VOCAB,
        execution=Execution(dtype="float64", time_chunks=time_chunks, remat=remat),
    )


@pytest.fixture(autouse=True)
def float64() -> Any:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def build(config: LMConfig) -> LanguageModel:
    return LanguageModel(config, rngs=nnx.Rngs(0))


@functools.cache
def params_of(name: str, depth: int = DEPTH) -> Any:
    init = jax.jit(lambda: nnx.state(build(config(name, depth=depth)), nnx.Param))
    return init()


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_TO_COMPILE)
def results(config: LMConfig, params: Any, state: Any, **options: Any) -> Any:
    """Logits, state, and the gradient of a function of both."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(config)))
    lengths = options.get("lengths", jnp.full(BATCH, TIME))
    live = jnp.arange(TIME)[None] < lengths[:, None]

    def loss(params: Any, state: Any) -> Any:
        logits, after = nnx.merge(graphdef, params)(TOKENS, state, **options)
        logits = jnp.where(live[:, :, None], logits, 0)
        floats = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
        total = jnp.mean(jnp.sin(3 * logits)) + sum(jnp.mean(jnp.sin(x)) for x in floats)
        return total, (logits, after)

    argnums = (0,) if state is None else (0, 1)
    return jax.value_and_grad(loss, argnums, has_aux=True, allow_int=True)(params, state)


def check(actual: Any, expected: Any) -> None:
    assert all(np.any(x) for x in jax.tree.leaves(expected[1][0]))
    chex.assert_trees_all_close(actual[0], expected[0], rtol=1e-9, atol=1e-13)
    both = actual[1], expected[1]
    # Gradients of float32 weights, rounded for each chunk.
    gradients = [[x for x in jax.tree.leaves(of) if x.dtype != jax.dtypes.float0] for of in both]
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("depth", "time_chunks"), [(1, 2), (3, 2)])
def test_one_layer_and_more_layers_than_chunks(depth: int, time_chunks: int) -> None:
    params = params_of("e88", depth)
    actual = results(config("e88", time_chunks, depth=depth), params, None)
    check(actual, results(config("e88", depth=depth), params, None))


@functools.cache
def rows_of_documents(name: str) -> tuple[dict[str, Any], Any]:
    """Options of rows that continue a state, of which one ends in the first chunk, and what layers
    do with them one after the other."""
    params = params_of(name)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(config(name))))
    _, state = jax.jit(lambda params: nnx.merge(graphdef, params)(TOKENS))(params)
    options = {"state": state, "segment_ids": IDS, "lengths": np.asarray([10, 3], np.int32)}
    return options, results(config(name), params, **options)


@pytest.mark.parametrize(
    ("name", "time_chunks", "remat"),
    [
        *((name, 3 if name == "e88" else 2, "none") for name in LAYERS),
        *(("e88", 3, remat) for remat in get_args(Remat)[1:]),
    ],
)
def test_rows_of_documents_that_continue_a_state(name: str, time_chunks: int, remat: Remat) -> None:
    options, expected = rows_of_documents(name)
    check(results(config(name, time_chunks, remat), params_of(name), **options), expected)


def test_lengths_of_any_integers() -> None:
    for dtype in (np.uint32, np.int8):
        chunks = ChunkInputs.cut(None, jnp.asarray([3, 100], dtype), 3, 50)
        np.testing.assert_array_equal(chunks.lengths, [[3, 50], [0, 50], [0, 0]])


def test_attention_that_remembers_more_than_the_sequence() -> None:
    model, options = build(config("attention", 3)), {"segment_ids": jnp.asarray(IDS)}
    tokens, state = jnp.asarray(TOKENS), model.init_state(BATCH, TIME + 5)
    whole = jax.jit(build(config("attention")))
    _, state = whole(tokens[:, :5], state)
    actual, expected = (run(tokens, state, **options) for run in (jax.jit(model), whole))
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-7)


def kept(name: str, remat: Remat, time_chunks: int) -> tuple[int, int]:
    """Floats that the forward pass leaves to the backward pass, of weights and of all else."""
    settings = config(name, time_chunks, remat)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build(settings)))

    def backward_pass(params: Any) -> Any:
        tokens = jnp.asarray(TOKENS)
        return jax.vjp(lambda x: jnp.sum(nnx.merge(graphdef, x)(tokens)[0]), params)[1]

    arrays = jax.tree.leaves(jax.eval_shape(backward_pass, params))
    weights = {x.shape for x in jax.tree.leaves(params)}
    sizes = [(x.shape in weights, x.size) for x in arrays if x.dtype == jnp.float64]
    return sum(n for of, n in sizes if of), sum(n for of, n in sizes if not of)


@pytest.mark.parametrize("remat", get_args(Remat)[1:])
@pytest.mark.parametrize("name", ["e88", "lstm"])
def test_recomputation_keeps_what_it_does_without_chunks(name: str, remat: Remat) -> None:
    """Chunks add the states between them alone."""
    weights, others = kept(name, remat, 1)
    state = DEPTH * BATCH * LAYERS[name].state_size(12)
    assert kept(name, remat, 3)[0] == weights
    assert others <= kept(name, remat, 3)[1] <= others + 4 * state


class Counter(nnx.BatchStat[Any]):
    """A variable that is no parameter."""


@pytest.mark.parametrize("changes", [{"time_chunks": 2}, {"remat": "layer"}])
def test_variables_that_are_no_parameters(changes: dict[str, Any]) -> None:
    model = build(config("e88", **changes))
    for block in model.blocks:
        setattr(block.mixer, "calls", Counter(jnp.zeros(())))  # noqa: B010
    with pytest.raises(ValueError, match=r"variables are parameters, and mixer.calls is Counter"):
        model(jnp.asarray(TOKENS))


def test_a_length_that_does_not_divide_runs_as_one() -> None:
    tokens, params = jnp.asarray(TOKENS), params_of("e88")

    def program(time_chunks: int) -> str:
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(config("e88", time_chunks))))
        return jax.jit(lambda params: nnx.merge(graphdef, params)(tokens)).lower(params).as_text()

    assert program(5) == program(1) != program(4)


def test_other_layers_have_no_chunks() -> None:
    layers = LAYERS["e88"], LAYERS["lstm"]
    with pytest.raises(ValueError, match=r"time_chunks 2 needs layers of one configuration, got 2"):
        LMConfig(dim=4, depth=2, layers=layers, execution=Execution(time_chunks=2))
    model = build(config("e88", 2))
    model.blocks[1].mixer = build(config("lstm")).blocks[0].mixer
    with pytest.raises(ValueError, match=r"differ in their weights alone, and layer 1 is not as"):
        model(jnp.asarray(TOKENS))


def test_a_layer_waits_for_the_one_below_and_for_the_chunk_before() -> None:
    waves: list[list[str]] = []

    def run(layers: Any, x: jax.Array, state: jax.Array, inputs: ChunkInputs) -> Any:
        """Layers write which chunks they saw, by x, and after which, by the state."""
        assert inputs.lengths is not None
        waves.append([f"{layer}{n[0]}" for layer, n in zip(layers, inputs.lengths, strict=True)])
        return x + jnp.asarray([10.0**layer for layer in layers])[:, None, None], state + x[:, :, 0]

    x = jnp.asarray([[[1.0]], [[2.0]], [[3.0]]])
    inputs = ChunkInputs(None, jnp.arange(3)[:, None], None)
    y, states = wavefront(run, [1, 2], x, [jnp.zeros(1), jnp.full(1, 100.0)], inputs)
    assert waves == [["10"], ["20", "11"], ["21", "12"], ["22"]]
    np.testing.assert_array_equal(y[:, 0, 0], [111, 112, 113])
    np.testing.assert_array_equal(states, [[6], [136]])


def test_cut() -> None:
    x = np.arange(24).reshape(2, 6, 2)
    parts = cut(jnp.asarray(x), 3)
    np.testing.assert_array_equal(parts[1], x[:, 2:4])
    np.testing.assert_array_equal(joined(parts), x)


def test_it_is_an_option_of_execution() -> None:
    settings = config("e88", 4)
    assert LMConfig.from_dict(settings.to_dict()) == settings
    one = dataclasses.replace(settings.execution, time_chunks=1)
    assert dataclasses.replace(settings, execution=one) == config("e88")
    with pytest.raises(ValueError, match=r"time_chunks must be at least 1, got 0"):
        Execution(time_chunks=0)
