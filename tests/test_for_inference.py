"""A model laid out for decoding: the same numbers, from weights that are read faster."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.config import LMConfig
from e88_jax.interop import mixer_to_torch
from e88_jax.model import LanguageModel
from pallas_kernels import target
from tests.reference.configs import e88_mixers, lm_config
from tests.sampling.common import PROMPT, run


@functools.cache
def build(config: LMConfig) -> LanguageModel:
    return LanguageModel(config, rngs=nnx.Rngs(0))


def flat(module: nnx.Module) -> dict[str, Any]:
    return {"/".join(map(str, p)): x for p, x in nnx.to_flat_state(nnx.state(module))}


@pytest.mark.parametrize("device", [target.CPU, target.H100], ids=lambda x: x.platform)
@pytest.mark.parametrize("head_mix", ["concat", "input_weighted", "per_head"])
def test_weights_of_matmuls_are_read_narrow(head_mix: Any, device: target.Target) -> None:
    options: dict[str, Any] = {"conv_size": 3, "write_gate": True, "head_mix": head_mix}
    model = build(lm_config(dtype="bfloat16", vocab_size=19, channel_mixer_dim=8, **options))
    with target.use(device):
        decoder = model.for_inference()
    params = flat(decoder)
    dtypes = {path: str(x.dtype) for path, x in params.items()}
    narrow = {"mixer/inputs/joined", "mixer/heads/projection"}
    narrow |= {f"channel_mixer/{name}_proj" for name in ("up", "gate", "down")}
    expected = {f"blocks/0/{name}/kernel" for name in narrow}
    assert {path for path, dtype in dtypes.items() if dtype == "bfloat16"} == expected
    assert set(dtypes.values()) == {"bfloat16", "float32"}
    down = params["blocks/0/channel_mixer/down_proj/kernel"]
    assert down.shape == ((12, 8) if device is target.H100 else (8, 12))
    if head_mix == "per_head" and device is target.CPU:
        tokens = jnp.zeros((2, 5), jnp.int32)
        logits, _ = run(model, tokens)
        same, _ = run(decoder, tokens)
        np.testing.assert_array_equal(logits, same)


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"output_gate": "none", "decay_mode": "none"}, (1,)),
        ({"tie_kv": True, "write_gate": True, "head_mix": "input_weighted"}, (5,)),
        ({"head_mix": "per_head", "decay_mode": "simple", "conv_size": 2}, (1, 5)),
    ],
    ids=str,
)
def test_it_computes_the_same(options: dict[str, Any], lengths: tuple[int, ...]) -> None:
    model = build(lm_config(dtype="float32", channel_mixer_dim=8, **options))
    decoder = model.for_inference().for_inference()  # as it is already
    for length in lengths:
        tokens = jnp.asarray(PROMPT[:, :length])
        expected, state = run(model, tokens)
        logits, its_state = run(decoder, tokens)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            its_state,
            state,
        )


def test_the_trained_model_stays_as_it_is() -> None:
    """Bit for bit, whatever is done to the other; and it can be trained on, and exported."""
    model = build(lm_config(dtype="bfloat16", depth=2, channel_mixer_dim=8, conv_size=2))
    graphdef, before = nnx.graphdef(model), jax.tree.map(np.array, nnx.state(model))
    weights = [mixer_to_torch(mixer) for mixer in e88_mixers(model)]
    decoder = model.for_inference()
    nnx.update(decoder, jax.tree.map(lambda x: 0 * x, nnx.state(decoder)))
    assert nnx.graphdef(model) == graphdef
    chex.assert_trees_all_equal(nnx.state(model), before)
    assert [x.dtype for x in jax.tree.leaves(nnx.state(model))] == [
        x.dtype for x in jax.tree.leaves(before)
    ]
    for mixer, expected in zip(e88_mixers(model), weights, strict=True):
        chex.assert_trees_all_equal(mixer_to_torch(mixer), expected)


def test_what_is_trained_on_does_not_change_it() -> None:
    model = nnx.clone(build(lm_config(dtype="float32", conv_size=2, output_norm=True)))
    decoder = model.for_inference()
    expected, _ = run(decoder, jnp.asarray(PROMPT))
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model)))
    np.testing.assert_array_equal(run(decoder, jnp.asarray(PROMPT))[0], expected)


def test_twice_is_the_same() -> None:
    model = build(lm_config(dtype="float32", channel_mixer_dim=8, write_gate=True))
    once, again = model.for_inference(), model.for_inference()
    twice = once.for_inference()
    for other in (again, twice):
        assert nnx.graphdef(other) == nnx.graphdef(once)
        chex.assert_trees_all_equal(nnx.state(other), nnx.state(once))
    assert type(once) is LanguageModel
    assert once.config == model.config
