"""Heads divided over devices inside `jax.shard_map`: same numbers, and what is exchanged."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from e88_jax import (
    AttentionConfig,
    E88Config,
    GatedDeltaNetConfig,
    LanguageModel,
    LMConfig,
    LSTMConfig,
    Mamba2Config,
    head_parallel,
)
from e88_jax.mixers.base import Dtype, Execution, MixerConfig, Remat
from tests.reference.collectives import collectives

E88 = E88Config(n_heads=4, n_state=4)
LAYERS: dict[str, tuple[MixerConfig, ...]] = {
    "default": (E88,),
    "options": (
        E88Config(
            n_heads=4,
            n_state=4,
            expansion=2.0,
            conv_size=3,
            decay_mode="simple",
            output_gate="sigmoid",
            output_norm=True,
            value_residual=True,
            write_gate=True,
        ),
        dataclasses.replace(E88, decay_mode="constant", head_mix="per_head", tie_kv=True),
        dataclasses.replace(E88, decay_mode="none", head_mix="sum", output_gate="none"),
    ),
    "gated_deltanet": (GatedDeltaNetConfig(n_heads=2, head_dim=4, n_value_heads=4),),
    "mamba2": (Mamba2Config(d_state=4, head_dim=4, n_groups=2),),
    "attention": (
        AttentionConfig(n_heads=4, head_dim=4, n_kv_heads=2, window=5),
        AttentionConfig(n_heads=4, head_dim=4, qk_norm=False),
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 9), dtype=np.int32)
RULES = ("heads", "heads"), ("hidden", "heads"), ("dim", None)


def config_of(
    name: str, dtype: Dtype = "float32", remat: Remat = "none", hidden: int | None = 12
) -> LMConfig:
    """A model of a layer of each configuration; dim 16 is no other axis of its parameters."""
    return LMConfig(
        dim=16,
        depth=len(LAYERS[name]),
        layers=LAYERS[name],
        vocab_size=32,
        channel_mixer_dim=hidden,
        execution=Execution(dtype=dtype, remat=remat),
    )


def build(config: LMConfig) -> LanguageModel:
    return LanguageModel(config, rngs=nnx.Rngs(0))


def loss_of(model: LanguageModel) -> tuple[jax.Array, jax.Array]:
    logits, _ = model(jnp.asarray(TOKENS))
    return jnp.mean(jnp.square(logits)), logits


gradient = functools.partial(jax.value_and_grad, has_aux=True)


@functools.cache
def whole(config: LMConfig) -> tuple[Any, Any]:
    """Parameters; loss, logits and gradient on one device."""
    params = jax.jit(lambda: nnx.state(build(config), nnx.Param))()
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(config)))
    run = jax.jit(gradient(lambda params: loss_of(nnx.merge(graphdef, params))))
    return params, jax.device_get(run(params))


def divided(config: LMConfig) -> tuple[Any, Any]:
    """Shapes of the parameters; the function of them that `whole` has the results of, on two
    devices."""
    shapes = nnx.eval_shape(lambda: nnx.state(build(config), nnx.Param))
    with nnx.logical_axis_rules(RULES):
        specs = nnx.get_partition_spec(shapes)
    specs = jax.tree.map(lambda x: x if isinstance(x, P) else P(), specs)
    run = jax.shard_map(
        gradient(lambda params: loss_of(head_parallel.merge(config, params, "heads"))),
        mesh=Mesh(np.array(jax.devices()[:2]), ("heads",)),
        in_specs=(specs,),
        out_specs=(P(), specs),
        check_vma=False,
    )
    return shapes, jax.jit(run)


def check(run: Any, config: LMConfig) -> None:
    params, expected = whole(config)
    chex.assert_trees_all_close(jax.device_get(run(params)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "remat"),
    [*((name, "none") for name in LAYERS), ("options", "recurrence"), ("options", "layer")],
)
def test_two_devices_compute_what_one_does(name: str, remat: Remat) -> None:
    _, run = divided(config_of(name, remat=remat))
    check(run, config_of(name))


@pytest.mark.parametrize(
    ("hidden", "remat"), [(12, "none"), (12, "recurrence"), (12, "layer"), (None, "layer")]
)
@pytest.mark.parametrize("name", ["default", "gated_deltanet", "mamba2", "attention"])
def test_a_sum_for_each_mixer_and_pass(name: str, hidden: int | None, remat: Remat) -> None:
    """Outputs are summed forward, gradients of inputs backward, in the compute dtype, once with any
    remat; what else is summed is the gradient of vectors that heads share."""
    config = config_of(name, "bfloat16", remat, hidden)
    params, run = divided(config)
    found = collectives(run.lower(params).as_text())
    n_sums = 2 * config.depth * (1 if hidden is None else 2)
    assert found.pop(("all_reduce", "2x9x16xbf16")) == n_sums
    vectors = {"gated_deltanet": "8xf32", "attention": "4xf32"}
    n_vectors = {"gated_deltanet": 1, "attention": 2}
    shared = {("all_reduce", vectors[name]): n_vectors[name]} if name in vectors else {}
    assert found == shared


@pytest.mark.parametrize("remat", ["none", "recurrence"])
def test_chunks_of_time(remat: Remat) -> None:
    """A sum for each wave and pass, of all layers that run in it."""
    config = dataclasses.replace(config_of("default", hidden=None), depth=2)
    execution = Execution(dtype="float32", remat=remat, time_chunks=3)
    params, run = divided(dataclasses.replace(config, execution=execution))
    check(run, config)
    waves = {f"{n}x2x3x16xf32": 2 * 2 for n in (1, 2)}
    found = collectives(run.lower(params).as_text())
    assert found == {("all_reduce", of): n for of, n in waves.items()}


def test_the_state_is_that_of_a_devices_heads() -> None:
    config = config_of("default")
    divided = config.divided(2)
    model = nnx.eval_shape(lambda: LanguageModel(divided, rngs=nnx.Rngs(0)))
    (state, *_) = model.init_state(3)
    assert state.recurrent.shape == (3, 2, 4, 4)


@pytest.mark.parametrize(
    ("layer", "n", "message"),
    [
        (E88, 3, r"n_heads 4 does not divide over heads=3: heads=2 or 4 would do\."),
        (E88, 8, r"n_heads 4 does not divide over heads=8: heads=4 would do\."),
        (dataclasses.replace(E88, head_mix="weighted_sum"), 2, r"head_mix weighted_sum weights"),
        (dataclasses.replace(E88, head_mix="input_weighted"), 2, r"head_mix input_weighted"),
        (GatedDeltaNetConfig(n_heads=3), 2, r"n_heads 3 .* heads=1 or 3 would do\."),
        (Mamba2Config(head_dim=4), 2, r"n_groups 1 does not divide over heads=2: a multiple of 2"),
        (AttentionConfig(n_heads=3), 2, r"n_heads 3 does not divide over heads=2"),
        (AttentionConfig(n_heads=4, n_kv_heads=1), 2, r"n_kv_heads 1 does not divide"),
        (LSTMConfig(width=8), 2, r"lstm layers have no heads to divide over heads=2"),
    ],
)
def test_layers_that_do_not_divide(layer: MixerConfig, n: int, message: str) -> None:
    config = LMConfig(dim=16, depth=2, layers=(E88, layer) if n == 2 else (layer,))
    with pytest.raises(ValueError, match=message):
        config.divided(n)


def test_a_channel_mixer_that_does_not_divide() -> None:
    config = LMConfig(dim=16, depth=1, layers=(E88,), channel_mixer_dim=9)
    with pytest.raises(ValueError, match=r"channel_mixer_dim 9 does not divide over heads=2: "):
        config.divided(2)


def test_a_third_of_mamba2s_heads() -> None:
    """Two thirds of dim 36 in floating point are no whole number."""
    layer = Mamba2Config(head_dim=4, n_groups=3)
    assert layer.divided(3, 36).n_heads(36) == layer.n_heads(36) / 3 == 6
    config = LMConfig(dim=36, depth=1, layers=(layer,)).divided(3)
    model: Any = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    assert model.blocks[0].mixer.n_heads == 6
