"""Values that arguments must not have, and what is wrong with how a call refuses one."""

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import e88_jax
from e88_jax import E88Config
from tests.reference.configs import e88_layer, lm_config

LAYER = e88_layer(dim=8, n_heads=2, conv_size=2, dtype="float32")
MODEL = lm_config(
    dim=8, n_heads=2, conv_size=2, dtype="float32", depth=2, vocab_size=19, saved_state_interval=2
)


class Unprintable:
    """An object whose text must not be asked for."""

    def __repr__(self) -> str:
        raise AssertionError("an error needs no repr of an unknown object")


NOT_ARRAYS = {
    "None": None,
    "number": 0.9,
    "text": "abc",
    "dictionary": {},
    "ragged list": [[1.0], [2.0, 3.0]],
    "object": object(),
    "class": int,
    "text array": np.array(["a"]),
    "object array": np.array([None]),
    "shape": jax.ShapeDtypeStruct((1, 3), jnp.int32),
    "key": jax.random.key(0),
    "flat list": [1.0, 2.0],
    "complex": np.ones((1, 3, 2, 4), np.complex64),
    "empty": np.zeros((0, 3), np.float32),
    "no axis": np.float32(1),
    "beyond int32": [[2**40, 0, 0]],
    "int64 beyond int32": np.full((1, 3), 2**40),
}
NOT_SIZES = {
    "0": 0,
    "-1": -1,
    "2.5": 2.5,
    "4.0": 4.0,
    "nan": math.nan,
    "inf": math.inf,
    "'4'": "4",
    "True": True,
    "NumPy's True": np.True_,
    "None": None,
    "[4]": [4],
    "array of 2": np.array([4, 4]),
    "NumPy float": np.float32(4),
    "complex": 4 + 0j,
    "2**31": 2**31,
    "huge": 10**5000,
    "class": int,
    "dictionary": {},
}
NOT_NUMBERS = {
    "nan": math.nan,
    "inf": -math.inf,
    "'1'": "1",
    "True": True,
    "None": None,
    "[1]": [1.0],
    "complex": 1j,
    "huge": 10**400,
    "0": 0,
    "-1": -1.0,
}
NOT_BOOLS = {"0": 0, "1": 1, "'no'": "no", "None": None, "1.0": 1.0, "[]": [], "nan": math.nan}
NOT_CHOICES = {
    "unknown": "Silu",
    "empty": "",
    "5": 5,
    "True": True,
    "list": ["silu"],
    "set": {"silu"},
    "array": np.array(["silu", "none"]),
    "object": Unprintable(),
}
NOT_CONFIGS = {
    "None": None,
    "dictionary": {"dim": 8},
    "number": 5,
    "text": "h72n32-500m",
    "class": E88Config,
}
NOT_RNGS = {
    "None": None,
    "seed": 0,
    "key": jax.random.key(0),
    "no stream for params": nnx.Rngs(dropout=0),
}


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


x = np.ones((1, 3, 2, 4), np.float32)
OP = {
    "q": x,
    "k": x,
    "v": x,
    "decay": np.full((1, 3, 2), 0.9, np.float32),
    "write_gate": np.full((1, 3, 2), 0.5, np.float32),
    "initial_state": np.zeros((1, 2, 4, 4), np.float32),
    "segment_ids": np.zeros((1, 3), np.int32),
    "lengths": np.array([2], np.int32),
}
"""Arguments of `e88_recurrence`."""


def fault_of(named: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """What is wrong with the refusal of a call, if anything: it must be a ValueError or TypeError
    that this package raises and that has the argument's name in it."""
    try:
        function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        message = str(error)
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(Path(e88_jax.__file__).parent):
            return f"raised in {raised_in}: {message}"
        return None if named in message and len(message) < 400 else message
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"
