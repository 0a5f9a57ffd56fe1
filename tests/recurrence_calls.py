"""Inputs of the recurrence in tests, and how an implementation is called on them."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax import documents
from e88_jax.naive import Inputs, rms_ratio
from e88_jax.recurrence import e88_recurrence

# Of ||x - reference|| / ||reference||, per tensor.
BOUNDS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 4e-3}

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
"""For programs that run once or twice: JAX's own optimizations, without those of LLVM."""

EVERY_OPTION = ("write_gate", "initial_state", "segment_ids")
OPTIONS = [
    (),
    ("write_gate",),
    ("initial_state",),
    ("segment_ids",),
    ("linear_state",),
    EVERY_OPTION,
    (*EVERY_OPTION, "linear_state"),
]
# (T, N, V): one step, across and short of a saved state, non-square states, prime lengths.
SIZES = [(1, 4, 7), (2, 12, 4), (31, 4, 4), (33, 12, 20), (67, 32, 8)]

Tensors = dict[str, Any]


def make_inputs(
    time: int,
    n_state: int,
    n_value: int,
    options: tuple[str, ...] = (),
    *,
    batch: int = 3,
    heads: int = 3,
    seed: int = 0,
) -> Inputs:
    """Inputs that keep the tanh away from saturation, where gradients vanish and errors hide."""
    rng = np.random.default_rng([seed, time, n_state, n_value])
    per_step = (batch, time, heads)

    def unit(*shape: int) -> np.ndarray:
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    ids = np.cumsum(rng.random((batch, time)) < 0.15, axis=1)
    ids[0] += np.arange(time) >= time // 2  # a restart in row 0 at least
    return Inputs(
        q=unit(*per_step, n_state),
        k=unit(*per_step, n_state),
        v=0.6 * rng.normal(size=(*per_step, n_value)),
        decay=rng.uniform(0.8, 1.0, per_step),
        write_gate=rng.uniform(0.3, 1.0, per_step) if "write_gate" in options else None,
        initial_state=(
            rng.uniform(-0.6, 0.6, (batch, heads, n_state, n_value))
            if "initial_state" in options
            else None
        ),
        # An id that comes back is a new document all the same.
        segment_ids=(ids % 3).astype(np.int32) if "segment_ids" in options else None,
        linear_state="linear_state" in options,
    )


def make_cotangents(inputs: Inputs, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch, _, heads, n_state = inputs.q.shape
    d_out = rng.normal(size=inputs.v.shape)
    return d_out, rng.normal(size=(batch, heads, n_state, inputs.v.shape[-1]))


def tensors(inputs: Inputs, dtype: str) -> Tensors:
    """Differentiated inputs as JAX arrays: q, k, v in dtype, the rest float32 or float64."""
    wide = "float64" if dtype == "float64" else "float32"
    dtypes = {"q": dtype, "k": dtype, "v": dtype}
    names = ("q", "k", "v", "decay", "write_gate", "initial_state")
    given = {name: getattr(inputs, name) for name in names}
    return {
        name: cast(value, dtypes.get(name, wide))
        for name, value in given.items()
        if value is not None
    }


def cast(x: np.ndarray, dtype: str) -> jax.Array:
    """x as a JAX array, without `jnp.asarray`, which compiles a program for each shape."""
    return jax.device_put(x.astype(jnp.dtype(dtype)))


def slice_time(arrays: Tensors, start: int, stop: int | None) -> Tensors:
    """Steps [start, stop) of everything that has a time axis; not the initial state."""
    return {
        name: x if name == "initial_state" else x[:, start:stop]
        for name, x in arrays.items()
        if name != "initial_state" or start == 0
    }


def assert_tensors_close(actual: Tensors, expected: Tensors, bound: float) -> None:
    assert actual.keys() == expected.keys()
    ratios = {name: rms_ratio(actual[name], expected[name]) for name in expected}
    assert all(ratio < bound for ratio in ratios.values()), ratios


def rows_by(
    recurrence: Any, arrays: Tensors, segment_ids: Any = None, lengths: Any = None, **options: Any
) -> Any:
    """The op, as `e88_recurrence` makes it of a recurrence alone."""
    x = documents.Inputs(**{"write_gate": None, "initial_state": None, **arrays})
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    options = {"linear_state": False, "saved_state_interval": 32, **options}
    return documents.of_rows(functools.partial(recurrence, **options), x, segment_ids, lengths)


def vjp_arguments(inputs: Inputs) -> Any:
    """float32 arguments of `results_and_gradient`."""
    cotangents = tuple(cast(x, "float32") for x in make_cotangents(inputs))
    return tensors(inputs, "float32"), jax.device_put(inputs.segment_ids), cotangents


@functools.cache  # one compilation for each set of shapes
def _evaluator(test_class: "type[RecurrenceCalls]", options: tuple[Any, ...], dtype: str) -> Any:
    compiler_options = QUICK_TO_COMPILE if dtype in test_class.quick_to_compile else None

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def run(arrays: Tensors, segment_ids: Any, cotangents: tuple[Any, Any]) -> Tensors:
        def f(arrays: Tensors) -> Any:
            return test_class().call(arrays, segment_ids, **dict(options))

        (out, final_state), pullback = jax.vjp(f, arrays)
        (grads,) = pullback(cotangents)
        return {"out": out, "final_state": final_state} | {f"d_{n}": g for n, g in grads.items()}

    return run


class RecurrenceCalls:
    """Inherit it, and set what follows."""

    implementation: Any
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    sizes: list[tuple[int, int, int]] = SIZES
    n_value: int = 6
    rows: Mapping[str, int] = MappingProxyType({"batch": 3, "heads": 3})
    compares_runs: bool = True
    """Whether runs are compared with one another, besides with NumPy."""
    supports_vmap: bool = True
    supports_sharding: bool = True
    # float64 is for the formulas; what users run is compiled as they compile it.
    quick_to_compile: tuple[str, ...] = ("float64",)
    saved_state_intervals: tuple[int, ...] = (1, 5, 32, 1000)
    kept_every: Mapping[int, int] = MappingProxyType({16: 16, 64: 64})
    """Steps between the states that are kept where `saved_state_interval` is so many."""
    uses_xla_memory: bool = True
    """Whether XLA's analysis counts all the device memory that a program uses."""

    def call(
        self, arrays: Tensors, segment_ids: Any = None, lengths: Any = None, **options: Any
    ) -> Any:
        return e88_recurrence(
            **arrays,
            segment_ids=segment_ids,
            lengths=None if lengths is None else jnp.array(lengths, jnp.int32),
            implementation=self.implementation,
            **options,
        )

    def evaluate(
        self, inputs: Inputs, cotangents: tuple[Any, Any], dtype: str, **options: Any
    ) -> Tensors:
        """`out`, `final_state` and the gradient `d_x` of each input, in NumPy."""
        # Few steps between saved states: implementations may write those out, and compile longer.
        options = {"linear_state": inputs.linear_state, "saved_state_interval": 4, **options}
        run = _evaluator(type(self), tuple(sorted(options.items())), dtype)
        wide = "float64" if dtype == "float64" else "float32"
        d_out, d_final_state = cotangents
        ids = None if inputs.segment_ids is None else jax.device_put(inputs.segment_ids)
        d_arrays = cast(d_out, dtype), cast(d_final_state, wide)
        results = run(tensors(inputs, dtype), ids, d_arrays)
        return {name: np.asarray(x) for name, x in results.items()}

    def require(self, dtype: str) -> None:
        if dtype not in self.dtypes:
            pytest.skip(f"{self.implementation} does not take {dtype}")

    def require_runs(self) -> None:
        if not self.compares_runs:
            pytest.skip(f"{self.implementation} is compared with NumPy alone")

    @property
    def best_dtype(self) -> str:
        return self.dtypes[0]

    def inputs(self, time: int, options: tuple[str, ...] = (), **rows: int) -> Inputs:
        """Tests that are not about time take 33 steps, and share compiled programs."""
        return make_inputs(time, 4, self.n_value, options, **{**self.rows, **rows})
