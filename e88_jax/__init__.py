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
    from e88_jax import fused as fused
    from e88_jax import generate as generate
    from e88_jax import hardware as hardware
    from e88_jax import interop as interop
    from e88_jax import mixer as mixer
    from e88_jax import model as model
    from e88_jax import precision as precision
    from e88_jax import projection as projection
    from e88_jax import recurrence as recurrence
    from e88_jax import reference as reference
    from e88_jax import selfcheck as selfcheck
    from e88_jax import short_conv as short_conv
    from e88_jax import sizing as sizing
    from e88_jax.config import E88Config as E88Config
    from e88_jax.config import LMConfig as LMConfig
    from e88_jax.mixer import E88Mixer as E88Mixer
    from e88_jax.mixer import MixerState as MixerState
    from e88_jax.model import E88LM as E88LM
    from e88_jax.model import LMState as LMState
    from e88_jax.model import count_params as count_params
    from e88_jax.model import weight_decay_mask as weight_decay_mask
    from e88_jax.recurrence import e88_recurrence as e88_recurrence

__version__ = "0.1.0"

_HOME = {
    "E88Config": "config",
    "LMConfig": "config",
    "E88Mixer": "mixer",
    "MixerState": "mixer",
    "E88LM": "model",
    "LMState": "model",
    "count_params": "model",
    "weight_decay_mask": "model",
    "e88_recurrence": "recurrence",
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
