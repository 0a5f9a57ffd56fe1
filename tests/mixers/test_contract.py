"""The contract of mixers, for each kind."""

from typing import Any

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
