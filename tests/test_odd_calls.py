"""Calls that nobody should make: each is refused by a sentence of ours that names the argument."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax import (
    E88Config,
    E88Mixer,
    Execution,
    LanguageModel,
    LMConfig,
    e88_recurrence,
    hardware,
    interop,
    selfcheck,
    sizing,
    weight_decay_mask,
)
from e88_jax.optim import muon_dimensions
from tests.reference.odd import (
    LAYER,
    MODEL,
    NOT_ARRAYS,
    NOT_BOOLS,
    NOT_CHOICES,
    NOT_CONFIGS,
    NOT_NUMBERS,
    NOT_RNGS,
    NOT_SIZES,
    OP,
    fault_of,
    without,
)

FLOATS = {"float16": np.ones((1, 3, 2, 4), np.float16), "integers": np.ones((1, 3, 2, 4), int)}

NOT_PARAMS = {"None": None, "number": 5, "text": "abc", "array": OP["q"]}
BOOLS = [name for name, value in vars(LAYER.config).items() if isinstance(value, bool)]

# Odd values of each argument of a call that works.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, dict[str, Any]]]] = {
    "op": (
        e88_recurrence,
        OP,
        dict.fromkeys(("q", "k", "v", "decay"), NOT_ARRAYS | FLOATS)
        | {
            name: without(NOT_ARRAYS, "None") | FLOATS
            for name in ("write_gate", "initial_state", "segment_ids")
        }
        | {"linear_state": NOT_BOOLS, "saved_state_interval": NOT_SIZES}
        | {"implementation": NOT_CHOICES},
    ),
    "layer config": (
        E88Config,
        {"n_heads": 2},
        dict.fromkeys(("n_heads", "n_state"), NOT_SIZES)
        | {"conv_size": without(NOT_SIZES, "None") | {"1": 1}}
        | {"expansion": NOT_NUMBERS | {"1.3": 1.3, "2**31": 2**31}}
        | dict.fromkeys(BOOLS, NOT_BOOLS)
        | {
            name: NOT_CHOICES | {"None": None} for name in ("output_gate", "decay_mode", "head_mix")
        },
    ),
    "execution": (
        Execution,
        {},
        {
            "saved_state_interval": NOT_SIZES,
            "implementation": NOT_CHOICES,
            "remat": NOT_CHOICES | {"None": None},
            "dtype": NOT_CHOICES | {"float": float, "f2": np.float16, "int8": jnp.dtype("int8")},
        },
    ),
    "model config": (
        LMConfig,
        {"dim": 8, "depth": 2, "layers": (LAYER.config,)},
        {"layers": NOT_CONFIGS | {"a layer": LAYER.config, "model": MODEL, "none": ()}}
        | {"execution": NOT_CONFIGS | {"of a layer": LAYER.config}}
        | dict.fromkeys(("dim", "depth", "vocab_size"), NOT_SIZES)
        | {"channel_mixer_dim": without(NOT_SIZES, "None")}
        | {"embedding_std": NOT_NUMBERS | {"0": 0.0}},
    ),
    "one of the layers of a model": (
        LMConfig,
        {"dim": 8, "depth": 2, "layers": (LAYER.config,)},
        {"layers": {name: (x,) for name, x in NOT_CONFIGS.items()} | {"model": (MODEL,)}},
    ),
    "E88Mixer": (
        E88Mixer,
        {**LAYER._asdict(), "rngs": nnx.Rngs(0)},
        {
            "config": NOT_CONFIGS | {"of a model": MODEL},
            "dim": NOT_SIZES,
            "execution": NOT_CONFIGS | {"of a layer": LAYER.config},
            "rngs": NOT_RNGS,
        },
    ),
    "LanguageModel": (
        LanguageModel,
        {"config": MODEL, "rngs": nnx.Rngs(0)},
        {"config": NOT_CONFIGS | {"of a layer": LAYER.config}, "rngs": NOT_RNGS},
    ),
    "weight_decay_mask": (
        weight_decay_mask,
        {},
        {"params": NOT_PARAMS},
    ),
    "muon_dimensions": (
        muon_dimensions,
        {},
        {"params": NOT_PARAMS | {"arrays": {"kernel": OP["q"]}}},
    ),
    "hardware.find_gpu": (
        hardware.find_gpu,
        {},
        {"name": {"None": None, "5": 5, "list": ["h100"]}},
    ),
    "optimal_n_state": (
        hardware.optimal_n_state,
        {"memory_bandwidth_GBps": 1000, "tensor_tflops": 100, "shared_mem_KB": 100},
        dict.fromkeys(("memory_bandwidth_GBps", "tensor_tflops", "shared_mem_KB"), NOT_NUMBERS),
    ),
    "sizing.solve": (
        sizing.solve,
        {"params": 10**8},
        {
            "params": NOT_NUMBERS,
            "gpu": {"name": "h100", "5": 5, "dictionary": {}},
            "depth": without(NOT_SIZES, "None"),
            "n_state": without(NOT_SIZES, "None") | {"30": 30, "132": 132},
            "vocab_size": NOT_SIZES,
            "gate": NOT_CHOICES | {"None": None},
        },
    ),
    "sizing.parse_params": (
        sizing.parse_params,
        {},
        {"text": {"None": None, "number": 5, "list": []}},
    ),
    "sizing.balance": (
        sizing.balance,
        {"dim": 8, "d_inner": 8},
        {"dim": NOT_SIZES, "d_inner": NOT_SIZES},
    ),
    "sizing.calc_e88_params": (
        sizing.calc_e88_params,
        {"dim": 8, "n_heads": 2, "n_state": 4, "depth": 2},
        dict.fromkeys(("dim", "n_heads", "n_state", "depth", "vocab_size"), NOT_SIZES),
    ),
    "sizing.check": (
        sizing.check,
        {"config": MODEL},
        {
            "config": NOT_CONFIGS | {"of a layer": LAYER.config},
            "gpu": {"name": "h100"},
            "batch": NOT_SIZES,
            "length": NOT_SIZES,
        },
    ),
    "sizing.training_memory": (
        sizing.training_memory,
        {"config": MODEL, "batch": 2, "length": 3},
        {
            "config": NOT_CONFIGS | {"of a layer": LAYER.config},
            "batch": NOT_SIZES,
            "length": NOT_SIZES,
            "dtype": NOT_CHOICES | {"None": None},
            "implementation": NOT_CHOICES | {"None": None},
            "moments": without(NOT_SIZES, "0"),
        },
    ),
    "sizing.state_bytes": (
        sizing.state_bytes,
        {"config": MODEL},
        {
            "config": NOT_CONFIGS | {"of a layer": LAYER.config},
            "dtype": NOT_CHOICES | {"None": None},
        },
    ),
    **{
        f"sizing.{function.__name__}": (function, {}, {"config": NOT_CONFIGS | {"other": other}})
        for function, other in (
            (sizing.d_inner_of, LAYER.config),
            (sizing.e88_layer, LAYER.config),
        )
    },
    "sizing.find_preset": (
        sizing.find_preset,
        {},
        {"name": {"None": None, "5": 5, "list": []}},
    ),
    "mixer_from_torch": (
        interop.mixer_from_torch,
        {"state_dict": {}, **LAYER._asdict()},
        {
            "state_dict": {"None": None, "list": [], "number": 5, "layer": LAYER.config},
            "config": NOT_CONFIGS | {"of a model": MODEL},
            "dim": NOT_SIZES,
            "execution": NOT_CONFIGS | {"of a layer": LAYER.config},
        },
    ),
    "mixer_to_torch": (
        interop.mixer_to_torch,
        {},
        {
            "mixer": NOT_CONFIGS
            | {"shapes": nnx.eval_shape(lambda: E88Mixer(*LAYER, rngs=nnx.Rngs(0)))}
        },
    ),
    "selfcheck.run_checks": (
        selfcheck.run_checks,
        {"implementations": ["scan"]},
        {
            "implementations": {
                "text": "scan",
                "none": [],
                "unknown": ["triton"],
                "number": 5,
                "numbers": [5],
            },
            "quick": NOT_BOOLS,
            "report": {"None": None, "text": "print"},
        },
    ),
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in CALLS for argument in CALLS[name][2]]
)
def test_an_odd_argument_is_named(name: str, argument: str) -> None:
    function, good, odd = CALLS[name]
    faults = {
        what: fault
        for what, value in odd[argument].items()
        if (fault := fault_of(argument, function, **{**good, argument: value}))
    }
    assert faults == {}


def test_what_is_odd_is_odd_only_there() -> None:
    """The calls that odd values are put into work."""
    assert sum(len(values) for call in CALLS.values() for values in call[2].values()) > 800
    for name in (
        "layer config",
        "execution",
        "model config",
        "sizing.check",
        "sizing.training_memory",
    ):
        function, good, _ = CALLS[name]
        function(**good)
    jax.eval_shape(lambda: e88_recurrence(**OP))


def test_rngs_may_not_be_missing() -> None:
    calls: list[tuple[Any, Any]] = [(E88Mixer, LAYER), (LanguageModel, (MODEL,))]
    for kind, arguments in calls:
        with pytest.raises(TypeError, match="rngs"):
            kind(*arguments)
