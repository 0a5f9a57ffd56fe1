"""Heads over devices: what head-major parameters are for."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from e88_jax.model import LanguageModel
from tests.reference.configs import lm_config

HEADS_AXIS = {
    "qkv": 1,
    "decay": 1,
    "gate": 1,
    "write_gate": 1,
    "taps": 1,
    "A_log": 0,
    "dt_bias": 0,
    "value_residual": 0,
    "projection": 0,
}
"""Axis of a parameter, by its name or that of the module whose kernel it is."""
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 16)).astype(np.int32)
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def spec_of(path: tuple[Any, ...]) -> P:
    *_, module, name = path
    axis = HEADS_AXIS.get(str(module if name == "kernel" else name))
    return P() if "mixer" not in path or axis is None else P(*[None] * axis, "heads")


def collectives(compiled: Any) -> dict[str, int]:
    """Count of each kind in the program."""
    text = compiled.as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


OPTIONS: dict[str, dict[str, Any]] = {
    "options": {"write_gate": True, "conv_size": 3, "value_residual": True},
    "nothing joined": {"decay_mode": "constant", "conv_size": 3, "value_residual": True},
}
N_SHARDED = {"options": 9, "nothing joined": 5}
"""Parameters of a layer, the first of which are all that a layer by default has, and more."""


class Program(NamedTuple):
    """Loss, state and gradient of a model of one layer, with its heads over four devices."""

    compiled: Any
    actual: Any
    expected: Any
    """Results on one device."""


@functools.cache
def program_of(name: str) -> Program:
    execution = {"dtype": "float32", "implementation": "scan", "saved_state_interval": 4}
    config = lm_config(dim=16, n_heads=8, vocab_size=32, **OPTIONS[name], **execution)
    graphdef, params = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))

    def loss(params: Any, tokens: Any) -> Any:
        logits, state = nnx.merge(graphdef, params)(tokens)
        return jnp.mean(jnp.square(logits)), state

    gradient = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(gradient)(params, TOKENS)
    mesh = Mesh(np.array(jax.devices()[:4]), ("heads",))
    put = functools.partial(NamedSharding, mesh)
    shardings = nnx.from_flat_state(
        [(path, param.replace(put(spec_of(path)))) for path, param in nnx.to_flat_state(params)]
    )
    n_sharded = sum(s.spec != P() for s in jax.tree.leaves(shardings))
    assert n_sharded == N_SHARDED[name]
    params = jax.device_put(params, shardings)
    run = jax.jit(gradient, in_shardings=(shardings, put(P())))
    compiled = run.lower(params, TOKENS).compile()
    return Program(compiled, compiled(params, jnp.asarray(TOKENS)), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_are_those_of_one_device(name: str) -> None:
    program = program_of(name)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        program.actual,
        program.expected,
    )


JOINED = pytest.mark.xfail(
    strict=True,
    reason="InputProjections joins kernels along their columns, where shards of q, k and v and of "
    "the decay lie apart",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("options", marks=JOINED),
        "nothing joined",
    ],
)
def test_no_head_moves_between_devices(name: str) -> None:
    """Heads meet in sums alone: of a layer's output, and of the gradient of its input."""
    found = collectives(program_of(name).compiled)
    assert found == {name: 2 if name == "all-reduce" else 0 for name in COLLECTIVES}
