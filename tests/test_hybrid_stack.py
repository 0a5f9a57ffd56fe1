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
from e88_jax.mixers.base import Execution, Remat
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


def config(remat: Remat = "none") -> LMConfig:
    return LMConfig(
        dim=12,
        depth=len(LAYERS) + 1,
        layers=LAYERS,
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


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        init = jax.jit(lambda: nnx.state(build(config())), compiler_options=QUICK_TO_COMPILE)
        return nnx.merge(graphdef_of(config()), init())


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
    state = model.init_state(BATCH, TIME)
    whole = run(model, tokens, state)
    first, state = run(model, tokens[:, :4], state)
    second, state = run(model, tokens[:, 4:], state)
    chex.assert_trees_all_close((np.concatenate([first, second], 1), state), whole, rtol=1e-9)


def test_packed_documents_equal_separate_runs(model: LanguageModel, tokens: np.ndarray) -> None:
    ids = np.asarray([[3, 3, 3, 3, 7, 7, 7, 7, 7]] * BATCH, np.int32)
    packed, _ = run(model, tokens, None, ids)
    fresh = model.init_state(BATCH, TIME)
    parts = [run(model, part, fresh)[0] for part in (tokens[:, :4], tokens[:, 4:])]
    chex.assert_trees_all_close(packed, np.concatenate(parts, axis=1), rtol=1e-10)


def test_rows_have_lengths_of_their_own(model: LanguageModel, tokens: np.ndarray) -> None:
    padded = tokens.copy()
    padded[1, 5:] = VOCAB + 3
    state = model.init_state(BATCH, TIME)
    logits, end = run(model, padded, state, lengths=np.asarray([TIME, 5], np.int32))
    alone, its_end = run(model, tokens[1:, :5], model.init_state(1, TIME))
    chex.assert_trees_all_close(logits[1:, :5], alone, rtol=1e-10)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1:], end), its_end, rtol=1e-9)


def gradient(model: LanguageModel, tokens: np.ndarray, remat: Remat) -> Any:
    graphdef = graphdef_of(config(remat))

    def loss(params: Any) -> Any:
        return jnp.mean(jnp.sin(nnx.merge(graphdef, params)(tokens)[0]))

    params = nnx.state(model, nnx.Param)
    gradients = jax.jit(jax.grad(loss), compiler_options=QUICK_TO_COMPILE)(params)
    return jax.tree.map(np.asarray, gradients)


def test_recomputation_changes_no_gradient(model: LanguageModel, tokens: np.ndarray) -> None:
    """Of any parameter; none is zero."""
    kept = gradient(model, tokens, "none")
    assert all(np.any(x) for x in jax.tree.leaves(kept))
    choices: tuple[Remat, ...] = get_args(Remat)
    for remat in choices[1:]:
        recomputed = gradient(model, tokens, remat)
        chex.assert_trees_all_close(recomputed, kept, rtol=1e-8, atol=1e-14)


def test_it_continues_a_prompt_as_whole_passes_do(model: LanguageModel, tokens: np.ndarray) -> None:
    drawn = generate(model, jnp.asarray(tokens[:, :4]), 5, key=jax.random.key(0), temperature=0)
    text = tokens.copy()
    text[:, 4:] = 0  # zeros to come, so that every pass is of one length
    for t in range(4, TIME):
        text[:, t] = np.argmax(run(model, text)[0][:, t - 1], axis=-1)
    np.testing.assert_array_equal(drawn, text[:, 4:])


def test_a_named_implementation_is_for_every_layer(model: LanguageModel) -> None:
    """E88 has no chunk form, and says so when the model is called."""
    execution = dataclasses.replace(config().execution, implementation="chunked")
    graphdef = graphdef_of(dataclasses.replace(config(), execution=execution))
    chunked = nnx.merge(graphdef, nnx.state(model))
    with pytest.raises(NotImplementedError, match=r"'chunked' is not one of e88_recurrence's"):
        jax.eval_shape(chunked, jax.ShapeDtypeStruct((1, 3), jnp.int32))
