"""The two ops as the tests see them: arguments, the NumPy loop, random inputs, programs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e88_jax.ops import gated_delta_rule, ssd
from tests.recurrence_calls import QUICK_TO_COMPILE
from tests.reference import linear_recurrence

quick_jit = functools.partial(
    jax.jit, compiler_options=QUICK_TO_COMPILE if jax.default_backend() == "cpu" else None
)
"""`jax.jit` of a program that runs once or twice; a GPU's programs are tested as they are used."""

Array = np.ndarray
Tensors = dict[str, Any]


OPTIONS = ("initial_state", "segment_ids", "lengths")


class Size(NamedTuple):
    batch: int
    time: int
    groups: int
    heads: int
    n_key: int
    n_value: int


SIZE = Size(3, 65, 2, 6, 5, 7)
"""Past one chunk by a step. Tests that are not about sizes use it, and share its programs."""


class Call(NamedTuple):
    """Arguments of an op, and the cotangents of its results."""

    arrays: Tensors
    segment_ids: Array | None
    lengths: Array | None
    cotangents: tuple[Array, Array]

    def changed(self, **arrays: Any) -> "Call":
        return self._replace(arrays=self.arrays | arrays)

    def without(self, *options: str) -> "Call":
        arrays = {name: x for name, x in self.arrays.items() if name not in options}
        return self._replace(arrays=arrays, **{x: None for x in options if x in self._fields})

    def steps(self, start: int, stop: int) -> "Call":
        """Steps [start, stop), of rows that do not end in them."""
        arrays = {
            name: x if x.ndim == 1 or name == "initial_state" else x[:, start:stop]
            for name, x in self.arrays.items()
        }
        ids = None if self.segment_ids is None else self.segment_ids[:, start:stop]
        lengths = None if self.lengths is None else np.full_like(self.lengths, stop - start)
        d_out, d_final_state = self.cotangents
        return Call(arrays, ids, lengths, (d_out[:, start:stop], d_final_state))


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    name: str
    function: Callable[..., Any]
    reference: Callable[..., Tensors]
    roles: Mapping[str, str]
    """Names of q, k, v, the write gate, and what decides a step's decay."""
    draw: Callable[[np.random.Generator, Size], Tensors]
    """Arrays without the initial state, in float64."""
    extreme_decays: Callable[[Tensors], Tensors]
    """The arrays with decays of 0, near 0, near 1 and of 1, mixed in every sequence."""

    @property
    def narrow(self) -> tuple[str, ...]:
        """Arrays that may be bfloat16."""
        return tuple(self.roles[x] for x in ("q", "k", "v"))

    def __str__(self) -> str:
        return self.name


def _unit(rng: np.random.Generator, *shape: int) -> Array:
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _draw_gated_delta_rule(rng: np.random.Generator, size: Size) -> Tensors:
    batch, time, groups, heads, n_key, n_value = size
    return {
        "q": _unit(rng, batch, time, groups, n_key),
        "k": _unit(rng, batch, time, groups, n_key),
        "v": rng.normal(size=(batch, time, heads, n_value)),
        "log_decay": -rng.exponential(0.05, (batch, time, heads)),
        "write_gate": rng.uniform(0.1, 1.8, (batch, time, heads)),
    }


def _draw_ssd(rng: np.random.Generator, size: Size) -> Tensors:
    batch, time, groups, heads, n_key, n_value = size
    return {
        "x": rng.normal(size=(batch, time, heads, n_value)),
        "dt": rng.exponential(0.1, (batch, time, heads)),
        "a": -rng.uniform(0.3, 2.0, heads),
        "b": rng.normal(size=(batch, time, groups, n_key)),
        "c": rng.normal(size=(batch, time, groups, n_key)),
    }


def _extreme_log_decay(arrays: Tensors) -> Tensors:
    return arrays | {"log_decay": -_in_turn([1e3, 1e-9, 0, 0.05, 1e6, 5], arrays["log_decay"])}


def _extreme_dt(arrays: Tensors) -> Tensors:
    dt = _in_turn([0.1, 1e-13, 0, 5e-6, 5e-4, 1.0], arrays["dt"])
    return arrays | {"dt": dt, "a": 1e4 * arrays["a"]}


def _in_turn(values: list[float], like: Array) -> Array:
    """`[B, T, H]`, at another value for each step and head."""
    _, time, heads = like.shape
    turn = np.arange(time)[:, None] + np.arange(heads)
    return np.array(values)[turn % len(values)] + np.zeros_like(like)


GATED_DELTA_RULE = Op(
    "gated_delta_rule",
    gated_delta_rule,
    linear_recurrence.gated_delta_rule,
    {"q": "q", "k": "k", "v": "v", "gate": "write_gate", "decay": "log_decay"},
    _draw_gated_delta_rule,
    _extreme_log_decay,
)
SSD = Op(
    "ssd",
    ssd,
    linear_recurrence.ssd,
    {"q": "c", "k": "b", "v": "x", "gate": "dt", "decay": "dt"},
    _draw_ssd,
    _extreme_dt,
)
OPS = (GATED_DELTA_RULE, SSD)


def make_call(op: Op, size: Size = SIZE) -> Call:
    """A call with every option: packed documents, rows that end, an initial state."""
    rng = np.random.default_rng(size)
    batch, time, _, heads, n_key, n_value = size
    state = (batch, heads, n_key, n_value)
    arrays = op.draw(rng, size) | {"initial_state": rng.normal(size=state)}
    ids = np.cumsum(rng.random((batch, time)) < 0.08, axis=1) % 3
    ids[0] += np.arange(time) >= time // 2  # a document starts in row 0 at least
    lengths = np.full(batch, time)
    lengths[1:2] -= time // 4
    out = rng.normal(size=(batch, time, heads, n_value))
    cotangents = out, rng.normal(size=state)
    return Call(arrays, ids.astype(np.int32), lengths.astype(np.int32), cotangents)


def expected(op: Op, call: Call) -> Tensors:
    """`out`, `final_state` and the gradient `d_x` of each array, by the NumPy loop."""
    return op.reference(call.arrays, *call.cotangents, call.segment_ids, call.lengths)


def dtype_of(op: Op, name: str, dtype: str) -> str:
    """An argument's dtype where q's is `dtype`."""
    return dtype if name in op.narrow or dtype == "float64" else "float32"


def tensors(op: Op, call: Call, dtype: str) -> Tensors:
    return {name: jnp.asarray(x, dtype_of(op, name, dtype)) for name, x in call.arrays.items()}


@functools.cache
def program(op: Op, implementation: Any) -> Any:
    """Results and gradients, compiled once for each set of shapes."""

    @quick_jit
    def run(arrays: Tensors, segment_ids: Any, lengths: Any, cotangents: Any) -> Tensors:
        return results_and_gradients(op, implementation, arrays, segment_ids, lengths, cotangents)

    return run


def results_and_gradients(
    op: Op, implementation: Any, arrays: Tensors, segment_ids: Any, lengths: Any, cotangents: Any
) -> Tensors:
    """`out`, `final_state` and the gradient `d_x` of each array, by the op."""

    def f(arrays: Tensors) -> Any:
        options = {"segment_ids": segment_ids, "lengths": lengths}
        return op.function(**arrays, **options, implementation=implementation)

    (out, final_state), pullback = jax.vjp(f, arrays)
    (grads,) = pullback(cotangents)
    return {"out": out, "final_state": final_state} | {f"d_{x}": grads[x] for x in grads}


def evaluate(op: Op, implementation: Any, call: Call, dtype: str) -> Tensors:
    """`program` in NumPy."""
    with jax.enable_x64(dtype == "float64"):
        d_out, d_final_state = call.cotangents
        wide = "float64" if dtype == "float64" else "float32"
        cotangents = jnp.asarray(d_out, dtype), jnp.asarray(d_final_state, wide)
        rows = (None if x is None else jnp.asarray(x) for x in (call.segment_ids, call.lengths))
        results = program(op, implementation)(tensors(op, call, dtype), *rows, cotangents)
        return {name: np.asarray(x) for name, x in results.items()}


def rounded(x: Array) -> Array:
    """To bfloat16."""
    return np.asarray(jnp.asarray(x, "bfloat16").astype("float32"))
