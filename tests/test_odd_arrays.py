"""Arrays that nobody should pass: each is refused by a sentence of ours that names the argument."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import e88_jax
from e88_jax import E88Mixer, LanguageModel, interop
from tests.reference.odd import LAYER, MODEL, NOT_ARRAYS, NOT_SIZES, OP, fault_of, without

State: Any = e88_jax.E88State
op: Any = e88_jax.e88_recurrence


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(MODEL, rngs=nnx.Rngs(0))


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


def test_lengths(model: Any) -> None:
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
        assert fault_of("lengths", op, **{**OP, "lengths": lengths}) is None, what
    # What is past a row's end is not read, and may be anything.
    for tokens in ([[5, 0, -1]], np.array([[5, 0, 19]])):
        jax.eval_shape(functools.partial(model, tokens, lengths=[2]))
        assert fault_of("tokens", model, tokens, lengths=[3]) is None


def test_tokens(model: Any) -> None:
    for what, tokens in NOT_TOKENS.items():
        assert fault_of("tokens", model, tokens) is None, what
    for tokens in (TOKENS, TOKENS.tolist(), TOKENS.astype(np.uint8), jnp.asarray(TOKENS)):
        logits, _ = jax.eval_shape(functools.partial(model, tokens))
        assert logits.shape == (1, 3, 19)
    # Traced, they cannot be looked at; no error, and no wait for them.
    jax.eval_shape(model, jax.ShapeDtypeStruct((1, 3), jnp.int32))


def states(model: Any) -> dict[str, Any]:
    good = jax.tree.map(np.asarray, model.init_state(1))
    recurrent, conv = good[0]
    layer = {
        "tuple": (recurrent, conv),
        "dictionary": {"recurrent": recurrent, "conv": conv},
        "array": recurrent,
        "None": None,
        "another batch": model.init_state(2)[0],
        "no convolution": State(recurrent, None),
        "a convolution's by name": State(recurrent, {"q": conv}),
        "one convolution more": State(recurrent, (conv, conv)),
        "None for all": State(None, conv),
        "text": State("abc", conv),
        "number": State(0.5, conv),
        "list": State(recurrent, [conv] * 3),
        "another dtype": State(recurrent.astype(jnp.bfloat16), conv),
        "another dtype of a convolution": State(recurrent, conv.astype(jnp.bfloat16)),
        "a convolution without heads": State(recurrent, conv.reshape(*conv.shape[:2], -1)),
        "transposed": State(recurrent.transpose(1, 0, 2, 3), conv),
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


def test_states(model: Any) -> None:
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


def test_inputs_of_a_layer(model: Any) -> None:
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
            lambda convert=convert: op(**{name: convert(x) for name, x in OP.items()})
        )
        assert (out.shape, state.shape) == ((1, 3, 2, 4), (1, 2, 4, 4))
    out, _ = jax.eval_shape(
        lambda: op(**OP, saved_state_interval=np.int64(2), linear_state=np.True_)
    )
    assert out.dtype == jnp.float32


def test_a_transformation_hides_no_error() -> None:
    names = ("q", "k", "v", "decay")
    odd = [jnp.asarray(OP[name]) for name in names[:3]] + [jnp.ones((1, 2, 2))]
    fault = functools.partial(fault_of, "decay must have shape (1, 3, 2)")
    assert fault(jax.jit(op), *odd) is None
    assert fault(jax.vmap(op), *(x[None] for x in odd)) is None
    loss = lambda *arrays: jnp.sum(op(*arrays)[0])  # noqa: E731
    assert fault(jax.grad(loss), *odd) is None


def test_arrays_of_a_state_dictionary() -> None:
    weights = interop.mixer_to_torch(E88Mixer(*LAYER, rngs=nnx.Rngs(0)))

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
        fault = fault_of("A_log", interop.mixer_from_torch, {**weights, "A_log": array}, *LAYER)
        assert fault is None, (what, fault)
    extra = {**weights, 3: np.ones(2), "x": np.ones(2)}
    assert fault_of("3, x", interop.mixer_from_torch, extra, *LAYER) is None
    given: dict[str, Any] = {key: jnp.asarray(x) for key, x in weights.items()} | {
        "A_log": [1.0, 2.0]
    }
    mixer = interop.mixer_from_torch(given, *LAYER)
    assert mixer.decay.A_log[...].tolist() == [1, 2]
    assert fault_of("mixer", interop.mixer_to_torch, mixer.for_inference()) is None
