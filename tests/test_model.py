import dataclasses
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from e88_jax import sizing
from e88_jax.interop import mixer_to_torch
from e88_jax.model import LanguageModel
from e88_jax.naive import rms_ratio
from e88_jax.optim import weight_decay_mask
from tests.reference import layer as numpy_layer
from tests.reference.configs import e88_mixers, lm_config, n_params

VOCAB, DIM, DEPTH = 19, 10, 2
CONFIG = lm_config(
    dim=DIM,
    depth=DEPTH,
    expansion=2.0,
    conv_size=3,
    write_gate=True,
    output_norm=True,
    saved_state_interval=2,
    dtype="float32",
    vocab_size=VOCAB,
    channel_mixer_dim=14,
)
LAYER = sizing.e88_layer(CONFIG)
TOKENS: Any = np.random.default_rng(0).integers(0, VOCAB, (2, 8)).astype(np.int32)


def disturbed(model: LanguageModel) -> LanguageModel:
    """The model with no parameter at the value it starts with, such as norms of 1."""
    leaves, structure = jax.tree.flatten(nnx.state(model, nnx.Param))
    rng = np.random.default_rng(0)
    leaves = [x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    nnx.update(model, jax.tree.unflatten(structure, leaves))
    return model


def one_layer(remat: Any = "none") -> LanguageModel:
    """A model of `CONFIG` but for its depth: for what no second layer has a part in."""
    execution = dataclasses.replace(CONFIG.execution, remat=remat)
    config = dataclasses.replace(CONFIG, depth=1, execution=execution)
    return LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return disturbed(LanguageModel(CONFIG, rngs=nnx.Rngs(0)))


@nnx.jit
def run(model: LanguageModel, tokens: Any, state: Any = None, segment_ids: Any = None) -> Any:
    return model(tokens, state, segment_ids)


def loss_of(model: LanguageModel, tokens: Any) -> Any:
    """Loss of a text that begins again where it ends."""
    logits, _ = model(tokens)
    targets = jnp.roll(tokens, -1, axis=1)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def numpy_model(model: LanguageModel, tokens: np.ndarray, segment_ids: np.ndarray) -> Any:
    """The model in float64 NumPy."""

    def array(param: Any) -> np.ndarray:
        return np.asarray(param[...], np.float64)

    embedding = array(model.embed.embedding)
    x = embedding[tokens]
    states = []
    for block, layer in zip(model.blocks, e88_mixers(model), strict=True):
        start = jax.tree.map(np.zeros_like, numpy_layer.random_state(LAYER, len(tokens)))
        y, state = numpy_layer.layer(
            LAYER,
            mixer_to_torch(layer),
            numpy_layer.rms_norm(x, array(block.norm.scale)),
            start,
            segment_ids,
        )
        x = x + y
        states.append(state)
        mixer = block.channel_mixer
        assert mixer is not None
        inner = numpy_layer.rms_norm(x, array(mixer.norm.scale))
        gate = numpy_layer.silu(inner @ array(mixer.gate_proj.kernel))
        x = x + (gate * (inner @ array(mixer.up_proj.kernel))) @ array(mixer.down_proj.kernel)
    return numpy_layer.rms_norm(x, array(model.norm.scale)) @ embedding.T, states


class TestForward:
    def test_against_numpy(self, model: LanguageModel) -> None:
        ids = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3, 2, 2]], np.int32)
        logits, states = run(model, jnp.asarray(TOKENS), None, jnp.asarray(ids))
        expected, expected_states = numpy_model(model, TOKENS, ids)
        assert logits.shape == (2, 8, VOCAB)
        assert rms_ratio(logits, expected) < 1e-5
        assert len(states) == DEPTH
        for actual, wanted in zip(states, expected_states, strict=True):
            assert rms_ratio(actual.recurrent, wanted.recurrent) < 1e-5
            conv = numpy_layer.join_heads(LAYER, wanted.conv)
            assert conv is not None
            assert rms_ratio(actual.conv, conv) < 1e-5

    def test_decoding_equals_the_whole(self, model: LanguageModel) -> None:
        tokens = jnp.asarray(TOKENS)
        whole, whole_state = run(model, tokens)
        state, rows = model.init_state(2), []
        for t in range(TOKENS.shape[1]):
            logits, state = run(model, tokens[:, t : t + 1], state)
            rows.append(logits)
        assert rms_ratio(jnp.concatenate(rows, axis=1), whole) < 1e-5
        chex.assert_trees_all_close(state, whole_state, rtol=1e-4, atol=1e-5)

    def test_windows_of_truncated_backpropagation(self, model: LanguageModel) -> None:
        """Forward they equal one long window; backward each sees itself alone."""
        first, second = jnp.asarray(TOKENS[:, :4]), jnp.asarray(TOKENS[:, 4:])
        whole, whole_state = run(model, jnp.asarray(TOKENS))

        @nnx.jit
        def step(model: LanguageModel, tokens: Any, state: Any) -> Any:
            def loss(model: LanguageModel, state: Any) -> Any:
                logits, state = model(tokens, state)
                return jnp.mean(logits**2), (logits, state)

            grads, (logits, state) = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, state)
            return grads, logits, state

        (grads, d_start), logits_0, state = step(model, first, model.init_state(2))
        (more_grads, d_state), logits_1, state = step(model, second, state)
        assert rms_ratio(jnp.concatenate([logits_0, logits_1], axis=1), whole) < 1e-5
        chex.assert_trees_all_close(state, whole_state, rtol=1e-4, atol=1e-5)
        chex.assert_tree_all_finite((grads, more_grads, d_start))
        # A caller who wants to go through the state can.
        assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(d_state))

    def test_packed_documents_equal_separate_runs(self, model: LanguageModel) -> None:
        ids = jnp.asarray([[0] * 4 + [1] * 4] * 2, jnp.int32)
        packed, state = run(model, jnp.asarray(TOKENS), None, ids)
        first, _ = run(model, jnp.asarray(TOKENS[:, :4]))
        second, second_state = run(model, jnp.asarray(TOKENS[:, 4:]))
        assert rms_ratio(packed, jnp.concatenate([first, second], axis=1)) < 1e-5
        chex.assert_trees_all_close(state, second_state, rtol=1e-4, atol=1e-5)

    def test_logits_at_positions(self) -> None:
        """In any order, one of them twice, with the state and the gradient of the whole."""
        model = disturbed(one_layer())
        positions = jnp.asarray([[7, 0, 3], [2, 2, 5]], jnp.int32)
        tokens = jnp.asarray(TOKENS)

        def loss(model: LanguageModel, alone: bool) -> Any:
            logits, state = model(tokens, positions=positions if alone else None)
            if not alone:
                logits = jnp.take_along_axis(logits, positions[:, :, None], axis=1)
            return jnp.mean(logits**2), (logits, state)

        @nnx.jit(static_argnums=1)
        def grads(model: LanguageModel, alone: bool) -> Any:
            return nnx.grad(loss, has_aux=True)(model, alone)

        picked, gathered = grads(model, True), grads(model, False)
        assert picked[1][0].shape == (2, 3, VOCAB)
        chex.assert_trees_all_close(picked, gathered, rtol=1e-4, atol=1e-6)

    def test_bad_input(self, model: LanguageModel) -> None:
        with pytest.raises(ValueError, match=r"float32 of shape \(2, 8\)"):
            model(jnp.zeros((2, 8)))
        with pytest.raises(ValueError, match=r"int32 of shape \(8,\)"):
            model(jnp.zeros(8, jnp.int32))
        with pytest.raises(ValueError, match=r"2 mixers' states.*length 1"):
            model(jnp.asarray(TOKENS), model.init_state(2)[:1])
        for positions, said in {
            ((8,), (0,)): "positions must be from 0 to 7, got 0 to 8",
            ((-1,), (0,)): "positions must be from 0 to 7, got -1 to 0",
            ((0, 1),): r"positions must be \[B, N\] with B = 2, got \(1, 2\)",
            (0, 1): r"positions must be integers \[B, N\]",
        }.items():
            with pytest.raises(ValueError, match=said):
                model(jnp.asarray(TOKENS), positions=cast(Any, np.array(positions)))


class TestDtypes:
    def test_bfloat16(self) -> None:
        options: dict[str, Any] = {"saved_state_interval": 2, "dtype": "bfloat16"}
        config = lm_config(dim=DIM, vocab_size=VOCAB, channel_mixer_dim=14, **options)
        model = LanguageModel(config, rngs=nnx.Rngs(0))
        logits, (state,) = run(model, jnp.asarray(TOKENS))
        assert logits.dtype == jnp.float32
        assert state.recurrent.dtype == jnp.float32
        grads = nnx.jit(nnx.grad(loss_of))(model, jnp.asarray(TOKENS))
        chex.assert_tree_all_finite(grads)
        for grad in jax.tree.leaves(grads):
            assert grad.dtype == jnp.float32
            assert np.any(np.asarray(grad))


class TestFlax:
    """Transformations of Flax and JAX over the model."""

    def test_optimizer(self) -> None:
        """The gradient reaches every parameter, and the loss falls."""
        model = one_layer()
        decay = optax.adamw(3e-2, weight_decay=0.1, mask=weight_decay_mask)
        optimizer = nnx.Optimizer(model, decay, wrt=nnx.Param)

        @nnx.jit
        def step(model: LanguageModel, optimizer: Any, tokens: Any) -> Any:
            loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
            optimizer.update(model, grads)
            return loss, grads

        # optax counts in int32 and corrects biases with scalars.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            losses, (grads, *_) = zip(
                *(step(model, optimizer, jnp.asarray(TOKENS)) for _ in range(20)), strict=True
            )
        assert losses[-1] < 0.7 * losses[0]
        for path, grad in nnx.to_flat_state(grads):
            chex.assert_tree_all_finite(grad)
            assert np.any(np.asarray(grad[...])), path

    def test_split_and_merge_in_plain_jax(self) -> None:
        graphdef, params = nnx.split(model := one_layer())
        tokens = jnp.asarray(TOKENS)

        @jax.jit
        def descend(params: Any) -> Any:
            loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graphdef, p), tokens))(
                params
            )
            return loss, jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)

        losses = []
        for _ in range(3):
            loss, params = descend(params)
            losses.append(float(loss))
        assert losses[2] < losses[1] < losses[0]
        # The parameters are all there is to the module's state.
        assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(
            nnx.state(model, nnx.Param)
        )


class TestRemat:
    def test_the_same_gradients(self) -> None:
        @nnx.jit
        def gradient(model: LanguageModel) -> Any:
            return nnx.value_and_grad(loss_of)(model, TOKENS)

        def of(remat: Any) -> Any:
            return gradient(disturbed(one_layer(remat)))

        expected = of("none")
        for remat in ("recurrence", "layer"):
            chex.assert_trees_all_close(of(remat), expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("remat", ["recurrence", "layer"])
    def test_a_model_from_outside_of_a_loop(self, remat: Any) -> None:
        model = one_layer(remat)
        segment_ids = jnp.asarray([[0] * 3 + [1] * 5] * 2, jnp.int32)

        @nnx.jit
        def twice(model: LanguageModel) -> Any:
            def one(state: Any, _: None) -> Any:
                logits, state = model(TOKENS, state, segment_ids)
                return state, logits

            return jax.lax.scan(one, model.init_state(2), length=2)[1]

        _, logits = twice(model)
        _, state = run(model, TOKENS, model.init_state(2), segment_ids)
        expected, _ = run(model, TOKENS, state, segment_ids)
        np.testing.assert_allclose(logits, expected, atol=1e-6)

    def test_less_is_kept(self) -> None:
        tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)

        def kept_bytes(remat: Any) -> int:
            """Bytes that the forward pass leaves to the backward pass."""
            options: dict[str, Any] = {"dtype": "float32", "remat": remat}
            config = lm_config(dim=64, n_heads=4, n_state=16, depth=3, **options)
            graphdef, params = nnx.split(
                nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
            )

            def backward_pass(params: Any, tokens: Any) -> Any:
                return jax.vjp(lambda x: loss_of(nnx.merge(graphdef, x), tokens), params)[1]

            kept = jax.eval_shape(backward_pass, params, tokens)
            return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))

        none, recurrence, whole = map(kept_bytes, ("none", "recurrence", "layer"))
        assert whole < recurrence / 2 < none / 4


class TestParameters:
    @pytest.mark.parametrize("std", [0.02, 1.5])
    def test_embedding_is_normal(self, std: float) -> None:
        config = lm_config(dim=64, n_heads=1, dtype="float32", vocab_size=500)
        assert config.embedding_std == 0.02
        config = dataclasses.replace(config, embedding_std=std)
        model = LanguageModel(config, rngs=nnx.Rngs(0))
        embedding = np.asarray(model.embed.embedding[...])
        assert embedding.shape == (500, 64)
        assert abs(np.std(embedding) - std) < 5 * std / np.sqrt(2 * embedding.size)
        assert abs(np.mean(embedding)) < 5 * std / np.sqrt(embedding.size)
        assert np.max(np.abs(embedding)) > 3 * std  # not cut off at two deviations

    def test_count(self, model: LanguageModel) -> None:
        keys, values, hidden = 12, 24, 14
        mixer = (
            DIM * (2 * keys + values)  # q, k, v
            + 3 * (2 * keys + values)  # convolutions
            + 3 * DIM + 3 + 3  # decay
            + 3 * DIM  # write gate
            + 8  # norm
            + DIM * values  # gate
            + values * DIM  # output
        )  # fmt: skip
        block = DIM + mixer + DIM + 3 * DIM * hidden
        assert CONFIG.count_params() == VOCAB * DIM + DEPTH * block + DIM
        abstract = nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
        assert n_params(abstract) == n_params(model) == CONFIG.count_params()

    def test_layers_differ(self) -> None:
        model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
        inputs: list[Any] = [mixer.inputs for mixer in e88_mixers(model)]
        first, second = (x.qkv.kernel[...] for x in inputs)
        assert not np.array_equal(first, second)
