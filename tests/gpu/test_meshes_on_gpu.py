"""The kernels over two GPUs: Explicit and automatic axes, `jax.shard_map`, the trainer's step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from e88_jax import LanguageModel, LMConfig, e88_recurrence
from e88_jax.mixers.base import Dtype
from e88_jax.naive import rms_ratio
from e88_jax.sampling import generate
from experiments.harness.config import OptimizerConfig
from experiments.harness.mesh import placement
from experiments.harness.optimizer import make_optimizer
from experiments.harness.step import (
    TrainState,
    compile_train_step,
    init_state,
    make_sharded,
    shapes_of,
)
from experiments.tasks.base import Batch
from experiments.tasks.bytes import BITS_PER_BYTE
from pallas_kernels import target
from tests.experiments.harness.steps import gradient_of
from tests.recurrence_calls import EVERY_OPTION, make_inputs, tensors
from tests.reference.configs import lm_config

if refusal := target.kernels_refusal(target.current()):
    pytest.skip(f"mosaic_gpu {refusal}", allow_module_level=True)
if jax.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

BOUND = 1e-5
LENGTHS = (70, 33, 0, 70)
MESHES = {
    "explicit": lambda: jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]),
    "automatic": lambda: Mesh(np.array(jax.devices()[:2]), ("x",)),
}


def op_and_gradient(arrays: Any, ids: Any, lengths: Any) -> Any:
    results, pullback = jax.vjp(
        lambda arrays: e88_recurrence(
            **arrays, segment_ids=ids, lengths=lengths, implementation="mosaic_gpu"
        ),
        arrays,
    )
    return results, pullback(results)[0]


def graphdef_of(config: LMConfig) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))


def assert_close(actual: Any, expected: Any) -> None:
    ratios = jax.tree.map(rms_ratio, actual, expected)
    assert all(ratio < BOUND for ratio in jax.tree.leaves(ratios)), ratios


def op_arguments() -> tuple[Any, Any, Any]:
    inputs = make_inputs(70, 32, 32, EVERY_OPTION, batch=4, heads=6)
    ids = jnp.asarray(inputs.segment_ids)
    return tensors(inputs, "float32"), ids, jnp.array(LENGTHS, jnp.int32)


def specs_of(arrays: Any, axis: str) -> Any:
    def spec(names: str) -> P:
        return P(*("x" if name == axis else None for name in names))

    by_name = {name: spec("bh" if name == "initial_state" else "bth") for name in arrays}
    return by_name, spec("bt"), spec("b")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("axis", ["b", "h", "t"])
def test_op(mesh: str, axis: str) -> None:
    arguments = op_arguments()
    if axis == "t":  # 70 steps over 2 GPUs; the lengths stay everywhere
        assert arguments[1].shape[1] % 2 == 0
    expected = jax.jit(op_and_gradient)(*arguments)
    of_mesh = MESHES[mesh]()
    shardings = jax.tree.map(
        lambda spec: NamedSharding(of_mesh, spec), specs_of(arguments[0], axis)
    )
    actual = jax.jit(op_and_gradient)(*jax.device_put(arguments, shardings))
    assert_close(actual, expected)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis", ["b", "h"])
def test_op_inside_shard_map(axis: str, check_vma: bool) -> None:
    arguments = op_arguments()
    expected = jax.jit(op_and_gradient)(*arguments)
    specs = specs_of(arguments[0], axis)
    f = jax.shard_map(
        op_and_gradient,
        mesh=MESHES["automatic"](),
        in_specs=specs,
        out_specs=((specs[0]["v"], specs[0]["initial_state"]), specs[0]),
        check_vma=check_vma,
    )
    assert_close(jax.jit(f)(*arguments), expected)


@pytest.mark.parametrize("time_chunks", [1, 4])
@pytest.mark.parametrize("how", [*MESHES, "shard_map"])
def test_gradient_of_a_model(how: str, time_chunks: int) -> None:
    sizes: Any = {"dim": 64, "n_heads": 4, "n_state": 32, "depth": 2, "dtype": "float32"}
    params = nnx.state(LanguageModel(lm_config(**sizes), rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 256, (4, 65)).astype(np.int32)

    def gradient_by(time_chunks: int) -> Any:
        config = lm_config(**sizes, implementation="mosaic_gpu", time_chunks=time_chunks)
        graphdef = graphdef_of(config)

        def loss(params: Any, tokens: Any) -> Any:
            logits, _ = nnx.merge(graphdef, params)(tokens[:, :-1])
            labels = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
            return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1))

        return jax.value_and_grad(loss)

    gradient = gradient_by(time_chunks)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(gradient_by(1))(params, tokens)
        mesh = MESHES["explicit" if how == "explicit" else "automatic"]()
        if how == "shard_map":

            def mean(params: Any, tokens: Any) -> Any:
                params = jax.lax.pcast(params, ("x",), to="varying")
                return jax.lax.pmean(gradient(params, tokens), "x")

            f = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("x")), out_specs=P())
            actual = jax.jit(f)(params, tokens)
        else:
            params = jax.device_put(params, NamedSharding(mesh, P()))
            tokens = jax.device_put(tokens, NamedSharding(mesh, P("x")))
            actual = jax.jit(gradient)(params, tokens)
    assert_close(actual, expected)


@pytest.mark.parametrize("time_chunks", [1, 4])
@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2", "heads=2"])
def test_a_training_step(mesh: str, time_chunks: int) -> None:
    """Two passes of the trainer's step equal those on one GPU, without chunks of time."""
    sizes: Any = {"dim": 64, "n_heads": 4, "n_state": 32, "depth": 2, "dtype": "float32"}
    optimizer = make_optimizer(OptimizerConfig(), steps=20)
    windows = np.random.default_rng(0).integers(0, 256, (2, 4, 65), dtype=np.uint8)
    results = []

    for text, chunks in ((mesh, time_chunks), ("data=1", 1)):
        config = lm_config(**sizes, implementation="mosaic_gpu", time_chunks=chunks)

        def make(config: LMConfig = config) -> TrainState:
            return init_state(LanguageModel(config, rngs=nnx.Rngs(0)), optimizer, None)

        graphdef = graphdef_of(config)
        where = placement(text, 4, config)
        with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
            state = make_sharded(make, shapes_of(make, where))
            batch = where.put(Batch(windows[..., :-1], windows[..., 1:], None, restart=True))
            step = compile_train_step(graphdef, optimizer, 1.0, BITS_PER_BYTE, state, batch)
            state, _ = step(state, batch)
            state, metrics = step(state, batch)
        results.append((metrics.loss, metrics.grad_norm, state.params))
    assert_close(*jax.device_get(results))


@pytest.mark.parametrize("mesh", ["fsdp=2", "heads=2"])
def test_a_sample_of_divided_weights(mesh: str) -> None:
    """It is that of one GPU."""
    config = lm_config(dim=64, n_heads=4, n_state=32, depth=2, dtype="float32")
    model, texts = LanguageModel(config, rngs=nnx.Rngs(0)), []
    for text in (mesh, "data=1"):
        where, params = placement(text, 4, config), nnx.state(model, nnx.Param)
        params = jax.device_put(params, where.by_name(params))
        with jax.default_matmul_precision("highest"):
            divided = nnx.merge(nnx.graphdef(model), where.for_sampling(params))
            texts.append(generate(divided, "def ", 20, key=jax.random.key(0), temperature=0.0))
    np.testing.assert_array_equal(*texts)


@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2", "heads=2"])
def test_gradients_in_bfloat16(mesh: str) -> None:
    """One pass, whose gradients are summed in bfloat16, is as far from float32 as on one GPU."""
    windows, errors = np.random.default_rng(0).integers(0, 256, (1, 4, 65), dtype=np.uint8), []

    def gradient(mesh: str, dtype: Dtype) -> Any:
        sizes: Any = {"dim": 64, "n_heads": 4, "n_state": 32, "depth": 2}
        config = lm_config(**sizes, dtype=dtype, implementation="mosaic_gpu")
        return gradient_of(config, mesh, windows)[-1]

    with jax.default_matmul_precision("highest"):
        exact = gradient("data=1", "float32")
        for text in (mesh, "data=1"):
            ratios = jax.tree.map(rms_ratio, gradient(text, "bfloat16"), exact)
            errors.append(np.array(jax.tree.leaves(ratios)))
    np.testing.assert_array_less(errors[0], 1.5 * errors[1] + 2**-9)
    assert max(errors[0]) > 2**-9
