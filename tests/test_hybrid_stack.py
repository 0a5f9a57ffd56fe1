"""A model with a layer of every kind: state, decoding, documents, recomputation and counts."""

import dataclasses
import functools
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import E88Config, LanguageModel, LMConfig
from e88_jax.mixers import MIXERS
from e88_jax.mixers.base import Execution, MixerConfig, Remat
from e88_jax.mixers.baselines import (
    AttentionConfig,
    GatedDeltaNetConfig,
    LSTMConfig,
    Mamba2Config,
)
from e88_jax.sampling import generate
from tests.recurrence_calls import QUICK_TO_COMPILE
from tests.reference.configs import n_params

BATCH, TIME, VOCAB = 2, 9, 11
LAYERS = (
    E88Config(n_heads=3, n_state=4),
    GatedDeltaNetConfig(n_heads=2, head_dim=4),
    Mamba2Config(d_state=5, head_dim=4),
    AttentionConfig(n_heads=3, head_dim=4, window=4),
    LSTMConfig(width=5),
    AttentionConfig(n_heads=2, head_dim=6, n_kv_heads=1),
)


def config(remat: Remat = "none", layers: tuple[MixerConfig, ...] = LAYERS) -> LMConfig:
    return LMConfig(
        dim=12,
        depth=len(layers),
        layers=layers,
        vocab_size=VOCAB,
        channel_mixer_dim=8,
        execution=Execution(dtype="float64", remat=remat),
    )


def build(config: LMConfig) -> LanguageModel:
    return LanguageModel(config, rngs=nnx.Rngs(0))


def graphdef_of(config: LMConfig) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: build(config)))


@pytest.fixture(autouse=True)
def float64() -> Any:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def params_of(config: LMConfig) -> Any:
    """Random numbers: to draw parameters as a model does takes a large program."""
    shapes = nnx.state(nnx.eval_shape(lambda: build(config)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: 0.5 * rng.normal(size=p.shape).astype(p.dtype), shapes)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(jnp.asarray, params_of(config()))
        return nnx.merge(graphdef_of(config()), params)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(VOCAB, size=(BATCH, TIME)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_TO_COMPILE)
def _run(graphdef: Any, params: Any, *arguments: Any, **options: Any) -> Any:
    return nnx.merge(graphdef, params)(*arguments, **options)


def run(model: LanguageModel, *arguments: Any, **options: Any) -> Any:
    """Logits and state in NumPy, whose slices need no program; calls alike share the model's."""
    return jax.tree.map(np.asarray, _run(*nnx.split(model), *arguments, **options))


def test_every_kind_is_there() -> None:
    assert {layer.kind for layer in LAYERS} == set(MIXERS)


def test_counts(model: LanguageModel) -> None:
    assert model.config.count_params() == n_params(model)
    assert LMConfig.from_dict(model.config.to_dict()) == model.config
    flops = [layer.flops_per_token(12) for layer in model.config.mixers]
    assert model.config.flops_per_token().recurrence == sum(x.recurrence for x in flops)


def test_token_by_token_equals_the_whole(model: LanguageModel, tokens: np.ndarray) -> None:
    whole, _ = run(model, tokens)
    for decoder in (model, model.for_inference()):
        state, rows = model.init_state(BATCH, TIME), []
        for t in range(TIME):
            logits, state = run(decoder, tokens[:, t : t + 1], state)
            rows.append(logits)
        chex.assert_trees_all_close(np.concatenate(rows, axis=1), whole, rtol=1e-10)


def test_split_runs_equal_the_whole(model: LanguageModel, tokens: np.ndarray) -> None:
    whole = run(model, tokens)
    state, parts = model.init_state(BATCH, TIME), []
    for t in range(0, TIME, 3):
        logits, state = run(model, tokens[:, t : t + 3], state)
        parts.append(logits)
    chex.assert_trees_all_close((np.concatenate(parts, axis=1), state), whole, rtol=1e-9)


def test_documents_and_rows_of_their_own_lengths(model: LanguageModel, tokens: np.ndarray) -> None:
    """Equal separate runs, whatever is past the end of the shorter row."""
    ids = np.asarray([[3, 3, 3, 7, 7, 7, 3, 3, 3]] * BATCH, np.int32)
    padded = tokens.copy()
    padded[1, 6:] = VOCAB + 3
    packed, end = run(model, padded, None, ids, lengths=np.asarray([TIME, 6], np.int32))
    for document, start in enumerate(range(0, TIME, 3)):
        fresh = model.init_state(BATCH, TIME)
        logits, its_end = run(model, tokens[:, start : start + 3], fresh)
        for row, last in ((0, 2), (1, 1)):
            if document <= last:
                chex.assert_trees_all_close(packed[row, start : start + 3], logits[row], rtol=1e-10)
            if document == last:
                ends = (jax.tree.map(lambda x, row=row: x[row], state) for state in (end, its_end))
                chex.assert_trees_all_close(*ends, rtol=1e-9)


def test_recomputation_changes_no_gradient(tokens: np.ndarray) -> None:
    """Every parameter has the gradient that it has without, which is not zero. E88 is tested with
    the model."""
    layers = LAYERS[1:-1]
    params = params_of(config(layers=layers))

    def gradient(remat: Remat) -> Any:
        graphdef = graphdef_of(config(remat, layers))

        def loss(params: Any) -> Any:
            return jnp.mean(jnp.sin(nnx.merge(graphdef, params)(tokens)[0]))

        gradients = jax.jit(jax.grad(loss), compiler_options=QUICK_TO_COMPILE)(params)
        return jax.tree.map(np.asarray, gradients)

    kept = gradient("none")
    assert all(np.any(x) for x in jax.tree.leaves(kept))
    choices: tuple[Remat, ...] = get_args(Remat)
    for remat in choices[1:]:
        chex.assert_trees_all_close(gradient(remat), kept, rtol=1e-8, atol=1e-14)


def test_it_continues_a_prompt_as_whole_passes_do(model: LanguageModel, tokens: np.ndarray) -> None:
    """One row is generated, and the passes run both."""
    drawn = generate(model, jnp.asarray(tokens[:1, :4]), 5, key=jax.random.key(0), temperature=0)
    text = tokens.copy()
    text[:, 4:] = 0  # zeros to come, so that every pass is of one length
    for t in range(4, TIME):
        text[:, t] = np.argmax(run(model, text)[0][:, t - 1], axis=-1)
    np.testing.assert_array_equal(drawn, text[:1, 4:])


def test_a_named_implementation_is_for_every_layer(model: LanguageModel) -> None:
    """E88 has no chunk form, and says so when the model is called."""
    execution = dataclasses.replace(config().execution, implementation="chunked")
    graphdef = graphdef_of(dataclasses.replace(config(), execution=execution))
    chunked = nnx.merge(graphdef, nnx.state(model))
    with pytest.raises(NotImplementedError, match=r"'chunked' is not one of e88_recurrence's"):
        jax.eval_shape(chunked, jax.ShapeDtypeStruct((1, 3), jnp.int32))
