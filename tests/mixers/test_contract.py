"""The contract of mixers, for each kind.

Few layers of a kind, whose options act on state, documents and lengths of rows: every option by
itself is compared with NumPy in the tests of each mixer.
"""

from typing import Any

from e88_jax.mixers.baselines import AttentionConfig, GatedDeltaNetConfig, LSTMConfig, Mamba2Config
from tests.mixers.contract import MixerContract
from tests.reference.configs import Layer, e88_layer, name_of
from tests.reference.toy_mixer import ToyConfig


class TestE88(MixerContract):
    layers = {  # noqa: RUF012
        name_of(options): e88_layer(**options)
        for options in (
            {
                "conv_size": 4,
                "expansion": 2.0,
                "write_gate": True,
                "value_residual": True,
                "head_mix": "input_weighted",
            },
            {
                "linear_state": True,
                "output_norm": True,
                "decay_mode": "constant",
                "output_gate": "none",
                "tie_kv": True,
                "head_mix": "per_head",
            },
        )
    }

    def counted(self, state: Any) -> Any:
        return state.recurrent


class TestGatedDeltaNet(MixerContract):
    layers = {  # noqa: RUF012
        "grouped": Layer(
            GatedDeltaNetConfig(
                n_heads=2,
                head_dim=6,
                expand_v=0.5,
                n_value_heads=4,
                conv_size=3,
                negative_eigenvalues=True,
            ),
            10,
            e88_layer().execution,
        )
    }

    def counted(self, state: Any) -> Any:
        return state.recurrent


class TestMamba2(MixerContract):
    layers = {  # noqa: RUF012
        "grouped": Layer(
            Mamba2Config(expand=1.5, d_state=3, head_dim=3, n_groups=2, conv_size=2),
            12,
            e88_layer().execution,
        )
    }

    def counted(self, state: Any) -> Any:
        return state.recurrent


class TestToy(MixerContract):
    layers = {"default": Layer(ToyConfig(), 10, e88_layer().execution)}  # noqa: RUF012


class TestLSTM(MixerContract):
    layers = {"default": Layer(LSTMConfig(width=7), 10, e88_layer().execution)}  # noqa: RUF012


def attention(**options: Any) -> Layer:
    return Layer(AttentionConfig(n_heads=6, head_dim=4, **options), 10, e88_layer().execution)


class CachedContract(MixerContract):
    """Of a mixer whose state is a cache of keys and values, and the position."""

    # Zeros of a longer sum change the order in which it is taken.
    no_state_is_bitwise = False

    def counted(self, state: Any) -> Any:
        return state.keys, state.values


class TestAttentionOfAWindow(CachedContract):
    """A window that is shorter than a call: a longer one is a cache as below."""

    layers = {  # noqa: RUF012
        "window=5+qk_norm=False+n_kv_heads=2": attention(window=5, qk_norm=False, n_kv_heads=2),
    }


class TestAttention(CachedContract):
    """All tokens before a token are seen: the cache is longer than the tokens of a test."""

    layers = {"n_kv_heads=3": attention(n_kv_heads=3)}  # noqa: RUF012
    context = 19
    counted_context = 1
