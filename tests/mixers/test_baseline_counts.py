"""Parameters and states as the baselines' configurations count them, against the layers."""

from typing import Any

import jax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from e88_jax.mixers.base import Execution, MixerConfig
from e88_jax.mixers.baselines import AttentionConfig, LSTMConfig
from tests.reference.configs import n_params

sizes = st.integers(1, 7)
dims = st.integers(1, 40)


@st.composite
def attentions(draw: st.DrawFn) -> AttentionConfig:
    groups, shared = draw(sizes), draw(sizes)
    return AttentionConfig(
        n_heads=groups * shared,
        head_dim=2 * draw(sizes),
        n_kv_heads=None if shared == 1 and draw(st.booleans()) else groups,
        qk_norm=draw(st.booleans()),
        window=draw(st.none() | sizes),
        rope_base=draw(st.sampled_from([10_000.0, 1e6])),
    )


@st.composite
def lstms(draw: st.DrawFn) -> LSTMConfig:
    return LSTMConfig(width=draw(st.integers(1, 40)))


def check(config: MixerConfig, dim: int) -> None:
    mixer: Any = nnx.eval_shape(lambda: config.build(dim, Execution(), rngs=nnx.Rngs(0)))
    assert config.count_params(dim) == n_params(mixer)
    state = jax.eval_shape(lambda: mixer.init_state(1, 1))
    counted = [x.size for x in jax.tree.leaves(state) if x.dtype.kind == "f" or x.ndim > 1]
    assert config.state_size(dim) == sum(counted)
    flops = config.flops_per_token(dim)
    assert flops.matmul == 6 * config.count_params(dim)
    assert flops.recurrence > config.state_size(dim)


@pytest.mark.parametrize("configs", [attentions(), lstms()], ids=["attention", "lstm"])
def test_any_configuration_is_counted_exactly(configs: st.SearchStrategy[MixerConfig]) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(configs, dims)
    def counted(config: MixerConfig, dim: int) -> None:
        check(config, dim)

    counted()


def test_layers_of_known_sizes() -> None:
    """GPT-2's attention without biases, and an LSTM by the sum of its matrices."""
    gpt_2 = AttentionConfig(n_heads=12, head_dim=64, qk_norm=False)
    assert gpt_2.count_params(768) == 4 * 768**2
    assert gpt_2.state_size(768) == 2 * 768
    # 4 D MACs per token seen, of 1,024: 2 forward, 4 backward.
    assert gpt_2.flops_per_token(768) == (24 * 768**2, 6 * 2 * 768 * 1024)
    llama = AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128, window=4096)
    assert llama.count_params(4096) == 2 * 4096**2 + 2 * 4096 * 1024 + 2 * 128
    assert llama.state_size(4096) == 2 * 4096 * 1024
    assert LSTMConfig(width=5).count_params(3) == 4 * 5 * 3 + 4 * 5 * 5 + 4 * 5 + 5 * 3
    assert LSTMConfig(width=5).state_size(3) == 10
