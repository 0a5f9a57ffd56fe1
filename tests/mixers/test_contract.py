"""The contract of mixers, for each kind."""

from typing import Any

from e88_jax.mixers.baselines import AttentionConfig, LSTMConfig
from tests.mixers.contract import MixerContract
from tests.reference.configs import E88_OPTIONS, Layer, e88_layer, name_of
from tests.reference.toy_mixer import ToyConfig


class TestE88(MixerContract):
    layers = {  # noqa: RUF012
        name_of(options): e88_layer(**options)
        for options in (
            {},
            {"conv_size": 4, "expansion": 2.0, "head_mix": "input_weighted"},
            {
                "linear_state": True,
                "output_norm": True,
                "decay_mode": "constant",
                "output_gate": "none",
                "head_mix": "weighted_sum",
            },
            E88_OPTIONS[-1],
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
    """Windows that are shorter than a call, and longer than all tokens."""

    layers = {  # noqa: RUF012
        "window=5+qk_norm=False+n_kv_heads=2": attention(window=5, qk_norm=False, n_kv_heads=2),
        "window=2": attention(window=2),
        "window=19": attention(window=19, n_kv_heads=1),
    }


class TestAttention(CachedContract):
    """All tokens before a token are seen: the cache is longer than the tokens of a test."""

    layers = {  # noqa: RUF012
        "default": attention(),
        "qk_norm=False+n_kv_heads=3": attention(qk_norm=False, n_kv_heads=3),
    }
    context = 19
    counted_context = 1
