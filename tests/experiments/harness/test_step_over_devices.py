"""The training step over several devices: what they exchange, and that it changes no result."""

import functools
import re
from collections import Counter
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import experiments.harness.step
from e88_jax import E88Config, LanguageModel, LMConfig, LSTMConfig, Mamba2Config
from e88_jax.mixers.base import Dtype, Execution, Remat
from e88_jax.naive import rms_ratio
from experiments.cli.errors import UsageError
from experiments.harness.mesh import ROWS, placement
from experiments.harness.optimizer import make_optimizer
from experiments.harness.step import (
    TrainState,
    compile_train_step,
    init_state,
    jit_train_step,
    make_evaluate,
    make_gradient,
    shardings_of,
)
from experiments.tasks.bytes import BITS_PER_BYTE
from tests.experiments.harness.steps import (
    CONFIG,
    batch_of,
    for_rows,
    gradient_of,
    plain,
    windows_of,
)
from tests.reference.collectives import collectives
from tests.reference.configs import lm_config


@functools.cache
def after_two_steps(mesh: str, rows: int, stateful: bool) -> Any:
    """Metrics and carry of the second step, and the validation after it, on the host."""
    where, optimizer = for_rows(rows, mesh), make_optimizer(plain(), steps=20)
    model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
    state = init_state(model, optimizer, (2, 4) if stateful else None)
    state = jax.device_put(state, shardings_of(state, where))
    assert {x.sharding.spec for x in jax.tree.leaves(state.carry)} <= {P(None, ROWS, "heads")}
    placed = where.put(batch_of(windows_of((2, 4, 10))))
    graphdef = nnx.graphdef(model)
    step = compile_train_step(graphdef, optimizer, 1.0, BITS_PER_BYTE, state, placed)
    for restart in (True, False):
        state, metrics = step(state, placed._replace(restart=np.bool_(restart)))
    batches = [batch_of(windows_of((1, 3, 10)))]
    evaluate = make_evaluate(graphdef, batches, where, BITS_PER_BYTE, stateful=stateful)
    assert state.updates.sharding.num_devices == where.mesh.size
    return jax.device_get((metrics, state.carry, evaluate(state.params)))


@pytest.mark.parametrize(
    ("mesh", "stateful"),  # each axis with and without a state
    [
        ("data=4", True),
        ("fsdp=4", True),
        ("data=2,fsdp=2", False),
        ("heads=2", True),
        ("data=2,heads=2", False),
        ("fsdp=2,heads=2", True),
    ],
)
def test_steps_on_many_devices_equal_those_of_one(mesh: str, stateful: bool):
    """Four rows over four devices; three validation rows, which do not divide among them."""
    found, expected = (after_two_steps(*where, stateful) for where in ((mesh, 4), ("auto", 1)))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
"""A collective in the text of a program: its arrays and its kind."""


def step_on(mesh: str) -> tuple[Any, TrainState, Any]:
    """The step over four devices, the state before it, and where its batches are."""
    where, optimizer = for_rows(4, mesh), make_optimizer(plain(), steps=20)
    model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
    state = init_state(model, optimizer, None)
    state = jax.device_put(state, shardings_of(state, where))
    step = jit_train_step(nnx.graphdef(model), optimizer, 1.0, BITS_PER_BYTE, state)
    return step, state, where


@functools.cache
def program_on(mesh: str) -> str:
    """The text of a training step of three passes over windows of 37 tokens on four devices."""
    step, state, where = step_on(mesh)
    batch = where.put(batch_of(windows_of((3, 4, 38))))
    return str(step.lower(state, batch).compile().as_text())


@pytest.mark.parametrize("mesh", ["fsdp=4", "data=2,fsdp=2"])
def test_devices_exchange_weights_and_no_activations(mesh: str):
    """No array of weights has an axis of a window's tokens, or of all rows' tokens."""
    exchanged = COLLECTIVE.findall(program_on(mesh))
    assert {kind for _, kind in exchanged} == {"all-gather", "all-reduce", "reduce-scatter"}
    for shapes, _ in exchanged:
        for shape in re.findall(r"\[([0-9,]+)\]", shapes):
            assert not {"37", "148", "444"} & set(shape.split(","))


@pytest.mark.parametrize("mesh", ["data=4", "fsdp=4"])
def test_gradients_of_copies_are_summed_once_for_all_passes(mesh: str):
    """The loop over passes exchanges weights that are divided and their gradients alone."""
    program = program_on(mesh)
    loops, whole = set[str](), set[str]()
    for computation in program.split("\n}\n"):
        kinds = {kind for _, kind in COLLECTIVE.findall(computation)}
        if computation.lstrip().startswith("ENTRY"):
            whole |= kinds
        else:
            loops |= kinds
    assert "all-reduce" in whole
    if mesh == "fsdp=4":
        assert {"reduce-scatter"} <= loops <= {"reduce-scatter", "all-gather"}
    else:
        assert loops == set()


LAYERS = (
    E88Config(n_heads=2, n_state=4, conv_size=3, value_residual=True),
    LSTMConfig(width=8),
    Mamba2Config(d_state=4, head_dim=8),
)


@functools.cache
def lowered_gradient(mesh: str, n_passes: int = 1, remat: Remat = "none") -> tuple[list[Any], str]:
    """The parameters of a bfloat16 model of several mixers, and the program of its gradient over
    four devices before it is compiled."""
    execution = Execution(dtype="bfloat16", remat=remat)
    config = LMConfig(dim=16, depth=3, layers=LAYERS, execution=execution)
    model, where = LanguageModel(config, rngs=nnx.Rngs(0)), for_rows(4, mesh)
    gradient = make_gradient(nnx.graphdef(model), BITS_PER_BYTE, where)
    batch = where.put(batch_of(windows_of((n_passes, 4, 10))))._replace(restart=None)
    params = nnx.state(model, nnx.Param)
    params = jax.device_put(params, where.by_name(params))
    program = jax.jit(gradient).lower(params, batch, None).as_text()
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable)), program


def of_matmul(x: Any) -> bool:
    """Whether a parameter is a `Projection`'s."""
    return "n_in_axes" in x.get_metadata()


def array(shape: tuple[int, ...], narrow: bool) -> str:
    """An array as programs write it."""
    return "x".join([*map(str, shape), "bf16" if narrow else "f32"])


@pytest.mark.parametrize(
    ("mesh", "n_passes"),  # passes matter to sums over `data` alone
    [("data=4", 1), ("data=4", 3), ("fsdp=4", 1), ("data=2,fsdp=2", 1), ("data=2,fsdp=2", 3)],
)
def test_gradients_of_matmuls_are_summed_in_the_compute_dtype(mesh: str, n_passes: int):
    """The mean of several passes and all other gradients are summed in float32."""
    params, program = lowered_gradient(mesh, n_passes)
    expected = Counter([("all_reduce", "f32")])  # the loss
    for x in params:
        part = x.sharding.shard_shape(x.shape)
        if part != x.shape:
            expected["reduce_scatter", array(x.shape, of_matmul(x))] += 1
        if part == x.shape or "data" in mesh:
            expected["all_reduce", array(part, of_matmul(x) and n_passes == 1)] += 1
    found = collectives(program)
    assert {x: n for x, n in found.items() if x[0] != "all_gather"} == expected
    assert {of_matmul(x) for x in params if len(x.shape) > 1} == {True, False}


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_weights_of_matmuls_are_gathered_in_the_compute_dtype(remat: Remat):
    """The embedding, which is also added to a float32 stream, and the LSTM's in float32."""
    params, program = lowered_gradient("fsdp=4", remat=remat)
    gathered = {x: n for (kind, x), n in collectives(program).items() if kind == "all_gather"}
    parts = [(x, x.sharding.shard_shape(x.shape)) for x in params]
    divided = [array(part, of_matmul(x)) for x, part in parts if part != x.shape]
    assert gathered == Counter(divided)
    assert {x.rpartition("x")[2] for x in divided} == {"bf16", "f32"}


@pytest.mark.parametrize(
    ("mesh", "gathered", "divides_rows"),
    [
        ("data=4", None, True),
        ("fsdp=4", 4 * 692, True),
        ("fsdp=2,heads=2", 2 * 692, True),
        ("heads=2", None, False),
        ("data=1", None, True),
    ],
)
def test_options_of_a_mesh(
    monkeypatch: pytest.MonkeyPatch, mesh: str, gathered: int | None, divides_rows: bool
):
    """A layer's weights are gathered at once: 692 parameters, 384 for q, k and v, 128 for the gate,
    128 for the output, 32 for the decay, 20 in vectors."""
    asked = list[Any]()
    monkeypatch.setattr(
        experiments.harness.step, "xla_options", lambda **options: asked.append(options) or {}
    )
    step_on(mesh)
    assert asked == [{"gathered_bytes": gathered, "divides_rows": divides_rows}]


@pytest.mark.parametrize("mesh", ["data=4", "fsdp=4", "data=2,fsdp=2"])
def test_sums_in_bfloat16_lose_as_much_as_a_gradient_in_it(mesh: str):
    """Against the float32 sum of the same four gradients. A rounding to bfloat16 changes a number
    by up to 2^-9 of it, and sums of four are rounded up to three times."""
    loss, _, grads = gradient_in("bfloat16", mesh)
    expected_loss, _, expected = gradient_in("bfloat16", "data=1", passes=4)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    ratios = jax.tree.leaves(jax.tree.map(rms_ratio, grads, expected))
    assert 2**-12 < max(ratios) < 2**-8


def test_a_layers_sums_over_heads_in_bfloat16_lose_no_more_than_the_layer():
    """Against the float32 gradient, as on one device in bfloat16."""
    *_, expected = gradient_in("float32", "data=1")
    errors = []
    for mesh in ("heads=2", "data=1"):
        *_, grads = gradient_in("bfloat16", mesh)
        errors.append(np.array(jax.tree.leaves(jax.tree.map(rms_ratio, grads, expected))))
    np.testing.assert_array_less(errors[0], 1.5 * errors[1])
    assert max(errors[0]) > 2**-9


@functools.cache
def gradient_in(dtype: Dtype, mesh: str, passes: int = 1) -> Any:
    """Loss, score and gradient of four rows in passes."""
    config = lm_config(dim=16, n_heads=2, n_state=4, dtype=dtype)
    return gradient_of(config, mesh, windows_of((1, 4, 10)).reshape(passes, 4 // passes, 10))


def test_states_without_names_of_their_axes():
    config = lm_config(n_heads=2)
    state = TrainState({}, (), ((jnp.zeros((1, 2, 4)),),), *(jnp.zeros(()) for _ in range(3)))
    shardings_of(state, placement("fsdp=2", 2, config))
    with pytest.raises(UsageError, match=r"heads=2 .* tuple, the state of layer 0, has no AXES"):
        shardings_of(state, placement("heads=2", 2, config))
