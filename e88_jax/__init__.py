"""E88, a nonlinear matrix-state recurrent layer for language models, in JAX.

Names and modules are imported on first use, so that what needs no JAX (`e88_jax.config`) starts at
once.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from e88_jax import activation as activation
    from e88_jax import checks as checks
    from e88_jax import config as config
    from e88_jax import decay as decay
    from e88_jax import documents as documents
    from e88_jax import hardware as hardware
    from e88_jax import head_mix as head_mix
    from e88_jax import head_parallel as head_parallel
    from e88_jax import implementations as implementations
    from e88_jax import interop as interop
    from e88_jax import mixers as mixers
    from e88_jax import model as model
    from e88_jax import ops as ops
    from e88_jax import optim as optim
    from e88_jax import precision as precision
    from e88_jax import projection as projection
    from e88_jax import recurrence as recurrence
    from e88_jax import reference as reference
    from e88_jax import sampling as sampling
    from e88_jax import selfcheck as selfcheck
    from e88_jax import short_conv as short_conv
    from e88_jax import sizing as sizing
    from e88_jax import xla as xla
    from e88_jax.config import E88Config as E88Config
    from e88_jax.config import LMConfig as LMConfig
    from e88_jax.mixers.attention import AttentionMixer as AttentionMixer
    from e88_jax.mixers.base import Execution as Execution
    from e88_jax.mixers.baselines import AttentionConfig as AttentionConfig
    from e88_jax.mixers.baselines import GatedDeltaNetConfig as GatedDeltaNetConfig
    from e88_jax.mixers.baselines import LSTMConfig as LSTMConfig
    from e88_jax.mixers.baselines import Mamba2Config as Mamba2Config
    from e88_jax.mixers.e88 import E88Mixer as E88Mixer
    from e88_jax.mixers.e88 import E88State as E88State
    from e88_jax.mixers.gated_deltanet import GatedDeltaNetMixer as GatedDeltaNetMixer
    from e88_jax.mixers.lstm import LSTMMixer as LSTMMixer
    from e88_jax.mixers.mamba2 import Mamba2Mixer as Mamba2Mixer
    from e88_jax.model import LanguageModel as LanguageModel
    from e88_jax.model import LMState as LMState
    from e88_jax.ops.gated_delta_rule import gated_delta_rule as gated_delta_rule
    from e88_jax.ops.ssd import ssd as ssd
    from e88_jax.optim import weight_decay_mask as weight_decay_mask
    from e88_jax.recurrence import e88_recurrence as e88_recurrence
    from e88_jax.sampling import generate as generate
    from e88_jax.sampling import generate_stream as generate_stream
    from e88_jax.xla import xla_options as xla_options

__version__ = "0.1.0"

_HOME = {
    "E88Config": "config",
    "LMConfig": "config",
    "Execution": "mixers.base",
    "E88Mixer": "mixers.e88",
    "E88State": "mixers.e88",
    "AttentionConfig": "mixers.baselines",
    "AttentionMixer": "mixers.attention",
    "GatedDeltaNetConfig": "mixers.baselines",
    "GatedDeltaNetMixer": "mixers.gated_deltanet",
    "LSTMConfig": "mixers.baselines",
    "LSTMMixer": "mixers.lstm",
    "Mamba2Config": "mixers.baselines",
    "Mamba2Mixer": "mixers.mamba2",
    "LanguageModel": "model",
    "LMState": "model",
    "weight_decay_mask": "optim",
    "e88_recurrence": "recurrence",
    "gated_delta_rule": "ops.gated_delta_rule",
    "ssd": "ops.ssd",
    "generate": "sampling",
    "generate_stream": "sampling",
    "xla_options": "xla",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


_MODULES = tuple(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
