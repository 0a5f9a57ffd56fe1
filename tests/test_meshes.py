"""Explicit mesh axes, as `jax.make_mesh` makes them, and manual ones, inside `jax.shard_map`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from e88_jax import E88Mixer, LanguageModel, e88_recurrence
from e88_jax.projection import JoinedInputProjections
from tests.recurrence_calls import EVERY_OPTION, make_inputs, tensors
from tests.reference.configs import e88_layer, lm_config

LENGTHS = (8, 3, 0, 8)
SIZES = {"b": 4, "t": 8, "h": 4}
OPTIONS: dict[str, Any] = {"dim": 16, "n_heads": 2, "conv_size": 3, "write_gate": True}


@pytest.fixture(scope="module")
def explicit() -> Mesh:
    return jax.make_mesh((2, 2), ("x", "y"))


@pytest.fixture(scope="module")
def automatic() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))


def assert_close(actual: Any, expected: Any) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), actual, expected
    )


def op_and_gradient(arrays: Any, ids: Any, lengths: Any) -> Any:
    """The op's results, and their gradient weighed by themselves."""
    results, pullback = jax.vjp(
        lambda arrays: e88_recurrence(**arrays, segment_ids=ids, lengths=lengths), arrays
    )
    return results, pullback(results)[0]


@pytest.fixture(scope="module")
def op_arguments() -> tuple[Any, Any, Any]:
    inputs = make_inputs(SIZES["t"], 4, 6, EVERY_OPTION, batch=SIZES["b"], heads=SIZES["h"])
    arrays = tensors(inputs, "float32")
    return arrays, jnp.asarray(inputs.segment_ids), jnp.array(LENGTHS, jnp.int32)


@pytest.fixture(scope="module")
def op_expected(op_arguments: Any) -> Any:
    return jax.jit(op_and_gradient)(*op_arguments)


def spec(name: str, parts: dict[str, Any]) -> P:
    axes = {"initial_state": "bh", "ids": "bt", "lengths": "b"}.get(name, "bth")
    return P(*(parts.get(axis) for axis in axes))


def divided(op_arguments: Any, parts: dict[str, Any], put: Callable[[Any, P], Any]) -> Any:
    arrays, ids, lengths = op_arguments
    arrays = {name: put(x, spec(name, parts)) for name, x in arrays.items()}
    return arrays, put(ids, spec("ids", parts)), put(lengths, spec("lengths", parts))


# Rows together with time: `test_model_gathers_time`.
PARTS = [{"b": "x", "h": "y"}, {"h": ("x", "y")}, {"t": "x"}]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_op_over_explicit_axes(
    explicit: Mesh, op_arguments: Any, op_expected: Any, parts: dict[str, Any]
) -> None:
    arguments = divided(
        op_arguments, parts, lambda x, spec: jax.device_put(x, NamedSharding(explicit, spec))
    )
    compiled = jax.jit(op_and_gradient).lower(*arguments).compile()
    collectives = {"all-gather", "all-to-all", "all-reduce", "collective-permute"}
    moved = {name for name in collectives if name in str(compiled.as_text())}
    assert bool(moved) == ("t" in parts), moved
    results, gradient = actual = compiled(*arguments)
    assert_close(actual, op_expected)
    rows_and_heads = {name: parts.get(name) for name in "bh"}
    assert jax.typeof(results[0]).sharding.spec == P(*map(rows_and_heads.get, "bthv"))
    assert jax.typeof(results[1]).sharding.spec == P(*map(rows_and_heads.get, "bhnv"))
    for name, x in gradient.items():
        assert jax.typeof(x) == jax.typeof(arguments[0][name]), name


def test_op_where_only_some_arguments_are_divided(
    explicit: Mesh, op_arguments: Any, op_expected: Any
) -> None:
    """Rows of one argument and heads of another by the same axis: the rows win."""
    arrays, ids, lengths = op_arguments
    put = lambda x, *spec: jax.device_put(x, NamedSharding(explicit, P(*spec)))  # noqa: E731
    arrays = {**arrays, "q": put(arrays["q"]), "k": put(arrays["k"], "x")}
    arrays["decay"] = put(arrays["decay"], None, None, "x")
    with jax.set_mesh(explicit):
        (out, state), gradient = jax.jit(op_and_gradient)(arrays, ids, lengths)
    assert_close(((out, state), gradient), op_expected)
    assert jax.typeof(out).sharding.spec == P("x", None, None, None)


# The types that are checked say over which axes an array varies: two are more to get wrong.
@pytest.mark.parametrize(
    ("parts", "check_vma"), [({"b": "x"}, False), ({"b": "x", "h": "y"}, True)], ids=str
)
def test_op_inside_shard_map(
    automatic: Mesh, op_arguments: Any, op_expected: Any, parts: dict[str, Any], check_vma: bool
) -> None:
    specs = divided(op_arguments, parts, lambda x, spec: spec)
    out_specs = (P(parts["b"], None, parts.get("h")), P(parts["b"], parts.get("h"))), specs[0]
    f = jax.shard_map(
        op_and_gradient, mesh=automatic, in_specs=specs, out_specs=out_specs, check_vma=check_vma
    )
    assert_close(jax.jit(f)(*op_arguments), op_expected)


def test_gradient_of_shard_map_and_of_what_is_not_divided(
    automatic: Mesh, op_arguments: Any
) -> None:
    """The keys are the same on every device: their gradient is summed over devices."""
    arrays, _, _ = op_arguments
    shared = {**arrays, "k": arrays["k"][:1]}

    def loss(arrays: Any) -> Any:
        keys = jnp.broadcast_to(arrays["k"], arrays["q"].shape)
        return jnp.sum(jnp.square(e88_recurrence(**{**arrays, "k": keys})[0]))[None]

    specs = {name: P() if name == "k" else P("x") for name in shared}
    mapped = jax.shard_map(loss, mesh=automatic, in_specs=(specs,), out_specs=P("x"))
    actual, expected = (
        jax.jit(jax.grad(lambda arrays, f=f: jnp.sum(f(arrays))))(shared) for f in (mapped, loss)
    )
    assert_close(actual, expected)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    sizes = {"dim": 16, "n_heads": 2, "vocab_size": 32, "channel_mixer_dim": 24}
    config = lm_config(**sizes, remat="layer")
    return LanguageModel(config, rngs=nnx.Rngs(0))


TOKENS = np.random.default_rng(0).integers(0, 32, (4, 8)).astype(np.int32)


def squares(tree: Any) -> Any:
    """The sum of the mean squares of all arrays of floats."""
    floats = (x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))
    return sum(jnp.mean(jnp.square(x)) for x in floats)


def loss_and_state(graphdef: Any) -> Callable[[Any, Any, Any], Any]:
    def loss(params: Any, tokens: Any, lengths: Any) -> Any:
        logits, state = nnx.merge(graphdef, params)(tokens, lengths=lengths)
        # Optax's loss for integer labels has no gradient over Explicit axes on JAX 0.11 and 0.12.
        losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(tokens, logits.shape[-1]))
        return jnp.mean(losses) + squares(state), state

    return jax.value_and_grad(loss, has_aux=True)


@pytest.fixture(scope="module")
def model_expected(model: LanguageModel) -> Any:
    graphdef, params = nnx.split(model)
    return jax.jit(loss_and_state(graphdef))(params, TOKENS, jnp.array(LENGTHS, jnp.int32))


def test_model_over_explicit_axes(
    explicit: Mesh, model: LanguageModel, model_expected: Any
) -> None:
    """Matrices of parameters are divided, vectors everywhere."""
    graphdef, params = nnx.split(model)

    def put(x: Any) -> Any:
        is_divided = x.ndim > 1 and x.shape[0] % 2 == 0
        return jax.device_put(x, NamedSharding(explicit, P("y") if is_divided else P()))

    params = jax.tree.map(put, params)
    rows = NamedSharding(explicit, P("x"))
    tokens, lengths = (jax.device_put(x, rows) for x in (TOKENS, np.array(LENGTHS, np.int32)))
    actual = jax.jit(loss_and_state(graphdef))(params, tokens, lengths)
    assert_close(actual, model_expected)
    (_, state), gradient = actual
    assert {x.sharding.spec[0] for x in jax.tree.leaves(state)} == {"x"}
    assert jax.tree.map(jax.typeof, gradient) == jax.tree.map(jax.typeof, params)


def test_model_whose_weights_are_divided_by_flax_s_rules(
    automatic: Mesh, model: LanguageModel, model_expected: Any
) -> None:
    graphdef, params = nnx.split(model)
    with nnx.logical_axis_rules((("dim", "y"), ("heads", None), ("hidden", None))):
        there = nnx.get_named_sharding(params, automatic)
    kernels = jax.tree.leaves(
        jax.tree.map(lambda x, to: x.ndim > 1 and "y" in to.spec, params, there)
    )
    assert sum(kernels) > 5
    rows = NamedSharding(automatic, P(("x", "y")))
    tokens, lengths = (jax.device_put(x, rows) for x in (TOKENS, np.array(LENGTHS, np.int32)))
    actual = jax.jit(loss_and_state(graphdef))(jax.device_put(params, there), tokens, lengths)
    assert_close(actual, model_expected)


@nnx.jit
def forward(model: LanguageModel, tokens: Any, positions: Any = None) -> Any:
    return model(tokens, positions=positions)


def test_model_at_positions_over_explicit_axes(explicit: Mesh, model: LanguageModel) -> None:
    positions = np.array([[4, 0], [1, 3]] * (len(TOKENS) // 2), np.int32)
    tokens, at = (
        jax.device_put(x, NamedSharding(explicit, P("x", None))) for x in (TOKENS, positions)
    )
    with jax.set_mesh(explicit):
        logits, _ = forward(model, tokens, at)
    assert jax.typeof(logits).sharding.spec[0] == "x"
    whole, _ = forward(model, TOKENS)
    assert_close(logits, np.take_along_axis(np.asarray(whole), positions[:, :, None], axis=1))


def test_model_gathers_time(explicit: Mesh, model: LanguageModel) -> None:
    tokens = jax.device_put(TOKENS, NamedSharding(explicit, P("x", "y")))
    with jax.set_mesh(explicit):
        logits, _ = forward(model, tokens)
    assert jax.typeof(logits).sharding.spec == P("x", None, None)
    assert_close(logits, forward(model, TOKENS)[0])


def test_model_inside_shard_map(automatic: Mesh, model: LanguageModel, model_expected: Any) -> None:
    """Data parallelism by hand: means over devices of each one's loss and gradient."""
    graphdef, params = nnx.split(model)
    one = loss_and_state(graphdef)

    def mean(params: Any, tokens: Any, lengths: Any) -> Any:
        params = jax.lax.pcast(params, ("x",), to="varying")  # gradients are not yet summed
        (loss, state), gradient = one(params, tokens, lengths)
        return (jax.lax.pmean(loss, "x"), state), jax.lax.pmean(gradient, "x")

    mapped = jax.shard_map(
        mean,
        mesh=automatic,
        in_specs=(P(), P("x"), P("x")),
        out_specs=((P(), P("x")), P()),
    )
    actual = jax.jit(mapped)(params, TOKENS, jnp.array(LENGTHS, jnp.int32))
    assert_close(actual, model_expected)


def test_layer_over_explicit_axes(explicit: Mesh) -> None:
    mixer = E88Mixer(*e88_layer(**OPTIONS, dtype="float32"), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 16)), jnp.float32)
    ids = jnp.asarray(np.repeat([[0, 1]], 4, 0).repeat(3, 1), jnp.int32)
    graphdef, params = nnx.split(mixer)

    @jax.jit
    def run(params: Any, x: Any, before: Any, ids: Any) -> Any:
        """Results, and the gradient of their squares by the input and the state."""

        def loss(x: Any, before: Any) -> Any:
            results = nnx.merge(graphdef, params)(x, before, ids)
            return squares(results), results

        gradient, results = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, before)
        return *results, gradient

    expected = run(params, x, mixer.init_state(4), ids)
    rows = NamedSharding(explicit, P("x"))
    of_heads = NamedSharding(explicit, P("x", "y"))
    before = jax.device_put(mixer.init_state(4), rows)
    before = before._replace(recurrent=jax.device_put(before.recurrent, of_heads))
    params = jax.device_put(params, NamedSharding(explicit, P()))
    actual = run(params, jax.device_put(x, rows), before, jax.device_put(ids, rows))
    assert_close(actual, expected)
    assert jax.typeof(actual[1].recurrent).sharding.spec == P("x", "y", None, None)


@pytest.mark.parametrize("part", ["rows", "heads", "nothing"])
def test_layer_for_inference_over_explicit_axes(explicit: Mesh, part: str) -> None:
    """Weights stay divided as they are, and the numbers as they were. The call is one program, and
    where heads are divided its operations one by one."""
    mixer = E88Mixer(*e88_layer(**OPTIONS, dtype="float32"), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 1, 16)), jnp.float32)
    run = nnx.jit(lambda mixer, x: mixer(x))
    expected = run(mixer, x)
    graphdef, params = nnx.split(mixer)

    def put(x: Any) -> Any:
        of_rows = P("y") if part == "rows" and x.shape[0] == 16 else P()
        of_heads = P(*("y" if n == 2 else None for n in x.shape)) if part == "heads" else of_rows
        return jax.device_put(x, NamedSharding(explicit, of_heads))

    decoder = nnx.merge(graphdef, jax.tree.map(put, params)).for_inference()
    assert isinstance(decoder.inputs, JoinedInputProjections)
    kernels = decoder.inputs.joined.kernel, decoder.heads.projection.kernel
    specs = tuple(jax.typeof(x[...]).sharding.spec[0] for x in kernels)
    assert specs == {"rows": ("y", None), "heads": (None, "y"), "nothing": (None, None)}[part]
    there = jax.device_put(x, NamedSharding(explicit, P("x")))
    assert_close((decoder if part == "heads" else functools.partial(run, decoder))(there), expected)
