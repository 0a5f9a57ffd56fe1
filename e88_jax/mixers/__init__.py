"""Mixers over time, by kind. Imports no JAX: a kind's module is imported when it is asked for."""

import importlib
from typing import cast

from e88_jax.checks import require_choice
from e88_jax.mixers.base import MixerConfig

MIXERS: dict[str, str] = {
    "e88": "e88_jax.config:E88Config",
    "gated_deltanet": "e88_jax.mixers.baselines:GatedDeltaNetConfig",
    "mamba2": "e88_jax.mixers.baselines:Mamba2Config",
    "attention": "e88_jax.mixers.baselines:AttentionConfig",
    "lstm": "e88_jax.mixers.baselines:LSTMConfig",
}
"""`module:name` of each kind's configuration. A new mixer is a file of its own and a line here."""


def config_type(kind: str) -> type[MixerConfig]:
    """The configuration's type of a kind of mixer.

    Raises:
        ValueError: no such kind; the message lists those there are.
    """
    require_choice("kind", kind, tuple(MIXERS))
    module, _, name = MIXERS[kind].partition(":")
    return cast(type[MixerConfig], getattr(importlib.import_module(module), name))
