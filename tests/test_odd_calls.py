"""Calls that nobody should make: each is refused by a sentence of ours that names the argument."""

import functools
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import e88_jax
from e88_jax import (
    E88LM,
    E88Config,
    E88Mixer,
    LMConfig,
    MixerState,
    count_params,
    e88_recurrence,
    hardware,
    interop,
    selfcheck,
    sizing,
    weight_decay_mask,
)

LAYER = E88Config(dim=8, n_heads=2, n_state=4, conv_size=2, dtype="float32")
MODEL = LMConfig(layer=LAYER, depth=2, vocab_size=19)


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
FLOATS = {"float16": np.ones((1, 3, 2, 4), np.float16), "integers": np.ones((1, 3, 2, 4), int)}

BOOLS = [name for name, value in vars(LAYER).items() if isinstance(value, bool)]

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
        {"dim": 8, "n_heads": 2},
        dict.fromkeys(("dim", "n_heads", "n_state", "saved_state_interval"), NOT_SIZES)
        | {"conv_size": without(NOT_SIZES, "None") | {"1": 1}}
        | {"expansion": NOT_NUMBERS | {"1.3": 1.3, "2**31": 2**31}}
        | dict.fromkeys(
            (
                "write_gate",
                "linear_state",
                "output_norm",
                "value_residual",
                "tie_kv",
                "use_silu",
                "use_l2_norm",
            ),
            NOT_BOOLS,
        )
        | {name: NOT_CHOICES | {"None": None} for name in ("output_gate", "decay_mode", "head_mix")}
        | {"implementation": NOT_CHOICES}
        | {"dtype": NOT_CHOICES | {"float": float, "f2": np.float16, "int8": jnp.dtype("int8")}},
    ),
    "model config": (
        LMConfig,
        {"layer": LAYER, "depth": 2},
        {"layer": NOT_CONFIGS | {"model": MODEL}}
        | dict.fromkeys(("depth", "vocab_size"), NOT_SIZES)
        | {"channel_mixer_dim": without(NOT_SIZES, "None")}
        | {"remat": NOT_CHOICES | {"None": None}},
    ),
    "E88Mixer": (
        E88Mixer,
        {"config": LAYER, "rngs": nnx.Rngs(0)},
        {"config": NOT_CONFIGS | {"of a model": MODEL}, "rngs": NOT_RNGS},
    ),
    "E88LM": (
        E88LM,
        {"config": MODEL, "rngs": nnx.Rngs(0)},
        {"config": NOT_CONFIGS | {"of a layer": LAYER}, "rngs": NOT_RNGS},
    ),
    "count_params": (
        count_params,
        {},
        {"model": NOT_CONFIGS | {"config": MODEL, "class of models": E88LM}},
    ),
    "weight_decay_mask": (
        weight_decay_mask,
        {},
        {"params": {"None": None, "number": 5, "text": "abc", "array": x}},
    ),
    "hardware.find": (hardware.find, {}, {"name": {"None": None, "5": 5, "list": ["h100"]}}),
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
            "config": NOT_CONFIGS | {"of a layer": LAYER},
            "gpu": {"name": "h100"},
            "batch": NOT_SIZES,
            "length": NOT_SIZES,
        },
    ),
    "sizing.training_memory": (
        sizing.training_memory,
        {"config": MODEL, "batch": 2, "length": 3},
        {
            "config": NOT_CONFIGS | {"of a layer": LAYER},
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
        {"config": NOT_CONFIGS | {"of a layer": LAYER}, "dtype": NOT_CHOICES | {"None": None}},
    ),
    **{
        f"sizing.{function.__name__}": (function, {}, {"config": NOT_CONFIGS | {"other": other}})
        for function, other in (
            (sizing.count_params, LAYER),
            (sizing.d_inner_of, LAYER),
            (sizing.training_flops, LAYER),
            (sizing.state_per_layer, MODEL),
        )
    },
    "sizing.find_preset": (
        sizing.find_preset,
        {},
        {"name": {"None": None, "5": 5, "list": []}},
    ),
    "mixer_from_torch": (
        interop.mixer_from_torch,
        {"state_dict": {}, "config": LAYER},
        {
            "state_dict": {"None": None, "list": [], "number": 5, "layer": LAYER},
            "config": NOT_CONFIGS | {"of a model": MODEL},
        },
    ),
    "mixer_to_torch": (
        interop.mixer_to_torch,
        {},
        {
            "mixer": NOT_CONFIGS
            | {"shapes": nnx.eval_shape(lambda: E88Mixer(LAYER, rngs=nnx.Rngs(0)))}
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
    for name in ("layer config", "model config", "sizing.check", "sizing.training_memory"):
        function, good, _ = CALLS[name]
        function(**good)
    jax.eval_shape(lambda: e88_recurrence(**OP))


@pytest.fixture(scope="module")
def model() -> E88LM:
    return E88LM(MODEL, rngs=nnx.Rngs(0))


TOKENS = np.zeros((1, 3), np.int32)
NOT_TOKENS = NOT_ARRAYS | {
    "floats": np.zeros((1, 3), np.float32),
    "bools": np.zeros((1, 3), bool),
    "1-D": np.zeros(3, np.int32),
    "3-D": np.zeros((1, 3, 1), np.int32),
    "no time": np.zeros((1, 0), np.int32),
    "negative": [[0, -1, 0]],
    "of a larger vocabulary": np.full((1, 3), 19),
    "negative on the device": jnp.full((1, 3), -1),
}


def test_lengths(model: E88LM) -> None:
    odd = without(NOT_ARRAYS, "None") | {
        "floats": [1.0],
        "2-D": [[3]],
        "of two rows": [3, 3],
        "beyond the end": [4],
        "negative": [-1],
        "negative on the device": jnp.array([-1]),
    }
    x = np.ones((1, 3, 8), np.float32)
    for what, lengths in odd.items():
        for function, first in ((model, TOKENS), (model.blocks[0].mixer, x)):
            assert fault_of("lengths", function, first, lengths=lengths) is None, what
        assert fault_of("lengths", e88_recurrence, **{**OP, "lengths": lengths}) is None, what
    # What is past a row's end is not read, and may be anything.
    for tokens in ([[5, 0, -1]], np.array([[5, 0, 19]])):
        jax.eval_shape(functools.partial(model, tokens, lengths=[2]))
        assert fault_of("tokens", model, tokens, lengths=[3]) is None


def test_tokens(model: E88LM) -> None:
    for what, tokens in NOT_TOKENS.items():
        assert fault_of("tokens", model, tokens) is None, what
    for tokens in (TOKENS, TOKENS.tolist(), TOKENS.astype(np.uint8), jnp.asarray(TOKENS)):
        logits, _ = jax.eval_shape(functools.partial(model, tokens))
        assert logits.shape == (1, 3, 19)
    # Traced, they cannot be looked at; no error, and no wait for them.
    jax.eval_shape(model, jax.ShapeDtypeStruct((1, 3), jnp.int32))


def states(model: E88LM) -> dict[str, Any]:
    good = jax.tree.map(np.asarray, model.init_state(1))
    recurrent, conv = good[0]
    layer = {
        "tuple": (recurrent, conv),
        "dictionary": {"recurrent": recurrent, "conv": conv},
        "array": recurrent,
        "None": None,
        "another batch": model.init_state(2)[0],
        "no convolution": MixerState(recurrent, {}),
        "one convolution more": MixerState(recurrent, {**conv, "x": conv["q"]}),
        "None inside": MixerState(recurrent, {**conv, "q": None}),
        "None for all": MixerState(None, conv),  # pyright: ignore[reportArgumentType]
        "text": MixerState("abc", conv),  # pyright: ignore[reportArgumentType]
        "number": MixerState(0.5, conv),  # pyright: ignore[reportArgumentType]
        "list": MixerState(recurrent, [conv["q"]] * 3),  # pyright: ignore[reportArgumentType]
        "another dtype": MixerState(recurrent.astype(jnp.bfloat16), conv),
        "another dtype of a convolution": MixerState(
            recurrent, {**conv, "q": conv["q"].astype(jnp.bfloat16)}
        ),
        "transposed": MixerState(recurrent.transpose(1, 0, 2, 3), conv),
    }
    whole = {
        "one layer": good[:1],
        "a layer's": good[0],
        "number": 5,
        "dictionary": {0: good[0], 1: good[1]},
        "text": "zeros",
        "nothing": (),
    }
    return {**{f"{what} in a layer": (state, good[1]) for what, state in layer.items()}, **whole}


def test_states(model: E88LM) -> None:
    for what, state in states(model).items():
        fault = fault_of("state", jax.eval_shape, functools.partial(model, TOKENS, state))
        assert fault is None, (what, fault)
    mixer, inputs = model.blocks[0].mixer, np.ones((1, 3, 8), np.float32)
    for what, state in states(model).items():
        if isinstance(state, tuple) and state and what.endswith("in a layer"):
            fault = fault_of("state", jax.eval_shape, functools.partial(mixer, inputs, state[0]))
            assert (fault is None) == (state[0] is not None), (what, fault)
    held = jax.tree.map(np.asarray, model.init_state(1))
    for state in (model.init_state(1), held, list(held)):
        jax.eval_shape(functools.partial(model, TOKENS, state))
    for batch in without(NOT_SIZES, "2**31").values():
        assert fault_of("batch", model.init_state, batch) is None
        assert fault_of("batch", mixer.init_state, batch) is None


def test_inputs_of_a_layer(model: E88LM) -> None:
    mixer = model.blocks[0].mixer
    good = np.ones((1, 3, 8), np.float32)
    odd = NOT_ARRAYS | {
        "integers": np.ones((1, 3, 8), int),
        "bools": np.ones((1, 3, 8), bool),
        "2-D": good[0],
        "another dim": good[..., 1:],
        "no row": good[:0],
    }
    for what, x in odd.items():
        assert fault_of("x", mixer, x) is None, what
    for x in (good, good.tolist(), good.astype(np.float64), good.astype(np.float16)):
        y, _ = jax.eval_shape(functools.partial(mixer, x))
        assert (y.shape, y.dtype) == ((1, 3, 8), jnp.float32)
    ids = without(NOT_ARRAYS, "None") | {"floats": np.ones((1, 3)), "1-D": np.ones(3, int)}
    for what, segment_ids in ids.items():
        assert fault_of("segment_ids", mixer, good, None, segment_ids) is None, what
        assert fault_of("segment_ids", model, TOKENS, None, segment_ids) is None, what
    jax.eval_shape(lambda: model(TOKENS, None, [[0, 0, 1]]))


def test_lists_and_numpy_arrays_are_arrays_to_the_op() -> None:
    for convert in (jnp.asarray, np.asarray, np.ndarray.tolist):
        out, state = jax.eval_shape(
            lambda convert=convert: e88_recurrence(**{name: convert(x) for name, x in OP.items()})
        )
        assert (out.shape, state.shape) == ((1, 3, 2, 4), (1, 2, 4, 4))
    out, _ = jax.eval_shape(
        lambda: e88_recurrence(**OP, saved_state_interval=np.int64(2), linear_state=np.True_)
    )
    assert out.dtype == jnp.float32


def test_a_transformation_hides_no_error() -> None:
    names = ("q", "k", "v", "decay")
    odd = [jnp.asarray(OP[name]) for name in names[:3]] + [jnp.ones((1, 2, 2))]
    fault = functools.partial(fault_of, "decay must have shape (1, 3, 2)")
    assert fault(jax.jit(e88_recurrence), *odd) is None
    assert fault(jax.vmap(e88_recurrence), *(x[None] for x in odd)) is None
    loss = lambda *arrays: jnp.sum(e88_recurrence(*arrays)[0])  # noqa: E731
    assert fault(jax.grad(loss), *odd) is None


def test_rngs_may_not_be_missing() -> None:
    for kind, config in ((E88Mixer, LAYER), (E88LM, MODEL)):
        with pytest.raises(TypeError, match="rngs"):
            kind(config)


def test_arrays_of_a_state_dictionary() -> None:
    weights = interop.mixer_to_torch(E88Mixer(LAYER, rngs=nnx.Rngs(0)))

    class OnAGpu:
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    odd = {
        "None": None,
        "text": "abc",
        "ragged": [[1.0], [2.0, 3.0]],
        "tensor": OnAGpu(),
        "integers": [1, 2],
        "complex": [1j, 1j],
        "nan": [1.0, math.nan],
        "inf": np.array([1e300, 1.0]),
        "number": 1.0,
    }
    for what, array in odd.items():
        fault = fault_of("A_log", interop.mixer_from_torch, {**weights, "A_log": array}, LAYER)
        assert fault is None, (what, fault)
    extra = {**weights, 3: np.ones(2), "x": np.ones(2)}
    assert fault_of("3, x", interop.mixer_from_torch, extra, LAYER) is None
    given = {key: jnp.asarray(x) for key, x in weights.items()} | {"A_log": [1.0, 2.0]}
    mixer = interop.mixer_from_torch(given, LAYER)
    assert mixer.A_log[...].tolist() == [1, 2]
    mixer.join_projections()
    assert fault_of("mixer", interop.mixer_to_torch, mixer) is None
