"""Programs for any batch and any length, by `jax.export`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from e88_jax import LanguageModel, e88_recurrence
from tests.reference.configs import lm_config

VOCAB = 19
OPTIONS: dict[str, Any] = {
    "dim": 8,
    "n_heads": 2,
    "conv_size": 2,
    "saved_state_interval": 2,
    "dtype": "float32",
    "vocab_size": VOCAB,
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(lm_config(**OPTIONS), rngs=nnx.Rngs(0))


def tokens(batch: int, time: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (batch, time)).astype(np.int32)


def in_place_of(tree: Any, batch: Any) -> Any:
    """Shapes of arrays whose first axis is the batch."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), tree)


def assert_same(actual: Any, expected: Any) -> None:
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_decoding_step_of_any_batch(model: LanguageModel) -> None:
    graphdef, params = nnx.split(model.for_inference())

    @jax.jit
    def step(tokens: Any, state: Any) -> Any:
        return nnx.merge(graphdef, params)(tokens, state)

    (batch,) = export.symbolic_shape("b")
    state = in_place_of(model.init_state(1), batch)
    exported = export.export(step)(jax.ShapeDtypeStruct((batch, 1), jnp.int32), state)
    arguments = tokens(3, 1), model.init_state(3)
    assert_same(exported.call(*arguments), step(*arguments))


def test_a_forward_pass_of_any_batch_and_length(model: LanguageModel) -> None:
    """Documents and the state of the call before included."""
    batch, time = export.symbolic_shape("b, t")
    ids = jax.ShapeDtypeStruct((batch, time), jnp.int32)
    state = in_place_of(model.init_state(1), batch)
    run = jax.jit(model)
    exported = export.export(run)(ids, state, ids)
    rows, steps = 3, 7
    segment_ids = np.arange(steps, dtype=np.int32)[None] // 3 + np.zeros((rows, 1), np.int32)
    arguments = tokens(rows, steps), model.init_state(rows), segment_ids
    assert_same(exported.call(*arguments), run(*arguments))


CHOICES: list[dict[str, Any]] = [
    {"tie_kv": True, "head_mix": "per_head", "write_gate": True, "output_norm": True},
    {"head_mix": "input_weighted", "value_residual": True, "decay_mode": "constant"},
    {"head_mix": "sum", "output_gate": "none", "decay_mode": "none", "conv_size": None},
]


# Of as many steps as are known before, once: where the most options meet.
@pytest.mark.parametrize(
    ("options", "shape"), [*((options, "b, t") for options in CHOICES), (CHOICES[0], "b, 5")]
)
def test_no_option_compares_sizes(options: dict[str, Any], shape: str) -> None:
    config = lm_config(**{**OPTIONS, **options}, channel_mixer_dim=6)
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)

    def loss(params: Any, tokens: Any) -> Any:
        return jnp.sum(nnx.merge(graphdef, params)(tokens)[0])

    ids = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.int32)
    exported = export.export(jax.jit(jax.value_and_grad(loss)))(params, ids)
    assert exported.in_avals[-1].shape == ids.shape


def test_the_op_of_any_batch_and_length() -> None:
    batch, time = export.symbolic_shape("b, t")

    def of(batch: Any, time: Any, array: Callable[..., Any]) -> list[Any]:
        vectors = [array((batch, time, 2, 4), jnp.float32) for _ in range(3)]
        return [*vectors, array((batch, time, 2), jnp.float32), array((batch,), jnp.int32)]

    @jax.jit
    def gradients(q: Any, k: Any, v: Any, decay: Any, lengths: Any) -> Any:
        def loss(*arrays: Any) -> Any:
            out, state = e88_recurrence(*arrays, lengths=lengths, saved_state_interval=2)
            return jnp.sum(out * out) + jnp.sum(state)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(q, k, v, decay)

    exported = export.export(gradients)(*of(batch, time, jax.ShapeDtypeStruct))
    rng = np.random.default_rng(0)
    *arrays, _ = of(2, 5, lambda shape, _: rng.uniform(0.1, 0.9, shape).astype(np.float32))
    arguments = *arrays, np.array([3, 5], np.int32)
    assert_same(exported.call(*arguments), gradients(*arguments))


def test_a_written_program_is_read_back(model: LanguageModel) -> None:
    (batch,) = export.symbolic_shape("b")
    shapes = jax.ShapeDtypeStruct((batch, 1), jnp.int32), in_place_of(model.init_state(1), batch)
    exported = export.export(jax.jit(model))(*shapes)
    assert export.deserialize(exported.serialize()).out_tree == exported.out_tree
