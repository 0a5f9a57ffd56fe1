"""Models of attention and LSTM over mesh axes: Explicit, as `jax.make_mesh` makes them, and manual,
inside `jax.shard_map`; heads of attention over devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from e88_jax import AttentionConfig, LanguageModel, LMConfig, LSTMConfig
from e88_jax.mixers.base import Execution
from tests.test_meshes import LENGTHS, TOKENS, assert_close, loss_and_state

IDS = np.array([[0, 0, 0, 1, 1, 1, 1, 1]] * 4, np.int32)


@functools.cache
def model_of(*layers: Any) -> LanguageModel:
    config = LMConfig(
        dim=16, depth=2, layers=layers, vocab_size=32, execution=Execution(dtype="float32")
    )
    return LanguageModel(config, rngs=nnx.Rngs(0))


MODELS = {
    "attention": (AttentionConfig(n_heads=4, head_dim=4, n_kv_heads=2), LSTMConfig(width=6)),
    "window": (AttentionConfig(n_heads=4, head_dim=4, window=3), LSTMConfig(width=6)),
}


def arguments(model: LanguageModel) -> Any:
    graphdef, params = nnx.split(model)
    return loss_and_state(graphdef), params, TOKENS, np.array(LENGTHS, np.int32)


@functools.cache
def expected_of(name: str) -> Any:
    f, *given = arguments(model_of(*MODELS[name]))
    return jax.jit(f)(*given)


@pytest.mark.parametrize("name", MODELS)
def test_over_explicit_axes(name: str) -> None:
    mesh = jax.make_mesh((4,), ("x",))
    f, params, tokens, lengths = arguments(model_of(*MODELS[name]))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    tokens, lengths = (jax.device_put(x, NamedSharding(mesh, P("x"))) for x in (tokens, lengths))
    (loss, state), gradient = jax.jit(f)(params, tokens, lengths)
    assert_close(((loss, state), gradient), expected_of(name))
    assert {x.sharding.spec[0] for x in jax.tree.leaves(state)} == {"x"}


@pytest.mark.parametrize("name", MODELS)
def test_inside_shard_map(name: str) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    f, *given = arguments(model_of(*MODELS[name]))

    def mean(params: Any, tokens: Any, lengths: Any) -> Any:
        params = jax.lax.pcast(params, ("x",), to="varying")  # gradients are not yet summed
        (loss, state), gradient = f(params, tokens, lengths)
        return (jax.lax.pmean(loss, "x"), state), jax.lax.pmean(gradient, "x")

    specs = (P(), P("x"), P("x")), ((P(), P("x")), P())
    mapped = jax.shard_map(mean, mesh=mesh, in_specs=specs[0], out_specs=specs[1])
    assert_close(jax.jit(mapped)(*given), expected_of(name))


@pytest.mark.parametrize("name", MODELS)
def test_a_state_over_explicit_axes(name: str) -> None:
    """A layer with its state, documents and caches of keys divided by rows and heads."""
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    mixer = model_of(*MODELS[name]).blocks[0].mixer
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.float32)
    start = mixer.init_state(4, 12)
    run = jax.jit(lambda x, state, ids: mixer(x, state, ids))
    _, before = run(x, start, IDS)
    expected = run(x, before, IDS)

    def put(x: Any, *parts: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, P(*parts)))

    keys, values = (put(a, "x", None, "y") for a in (before.keys, before.values))
    state = before._replace(keys=keys, values=values, position=put(before.position, "x"))
    actual = run(put(x, "x"), state, put(IDS, "x"))
    assert_close(actual, expected)
    assert jax.typeof(actual[1].keys).sharding.spec == P("x", None, "y", None)
    assert jax.typeof(actual[1].position).sharding.spec == P("x")


def test_heads_of_attention_over_devices() -> None:
    """Heads meet in sums alone: of a layer's output, and of the gradient of its input."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("heads",))
    mixer = model_of(AttentionConfig(n_heads=8, head_dim=4, n_kv_heads=4)).blocks[0].mixer
    graphdef, params = nnx.split(mixer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 16)), jnp.float32)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)[0]))

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    specs = {"q": P(None, "heads"), "k": P(None, "heads"), "v": P(None, "heads")}
    specs["output"] = P("heads")
    shardings = nnx.from_flat_state(
        [
            (path, param.replace(NamedSharding(mesh, specs.get(str(path[0]), P()))))
            for path, param in nnx.to_flat_state(params)
        ]
    )
    run = jax.jit(gradient, in_shardings=(shardings, NamedSharding(mesh, P())))
    compiled = run.lower(params, x).compile()
    assert_close(compiled(jax.device_put(params, shardings), x), jax.jit(gradient)(params, x))
    text = str(compiled.as_text())
    assert "all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
