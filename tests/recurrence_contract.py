"""Contract of every implementation of the recurrence, as one class to inherit.

A test class names its implementation, sets the capability flags that differ, and inherits the rest:

    class TestScan(RecurrenceContract):
        implementation = "scan"
"""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from e88_jax import naive
from e88_jax.naive import Inputs
from tests.recurrence_calls import (
    BOUNDS,
    EVERY_OPTION,
    OPTIONS,
    QUICK_TO_COMPILE,
    SIZES,
    Tensors,
    assert_tensors_close,
    cast,
    make_cotangents,
    make_inputs,
    slice_time,
    tensors,
    vjp_arguments,
)
from tests.recurrence_documents import DocumentsContract


class RecurrenceContract(DocumentsContract):
    """Inherit it, and set what `RecurrenceCalls` has."""

    # Against the NumPy loop.

    def check_against_numpy(self, inputs: Inputs, dtype: str, **options: Any) -> None:
        self.require(dtype)
        cotangents = make_cotangents(inputs)
        expected = naive.run(inputs)
        if not inputs.linear_state:
            largest = max(np.max(np.abs(after)) for _, after in expected.states)
            assert 1 - largest**2 > 0.05, "saturated: gradients would vanish"
        d_inputs = naive.gradients(inputs, *cotangents)
        wanted = {"out": expected.out, "final_state": expected.final_state}
        wanted |= {
            f"d_{name}": grad
            for name, grad in d_inputs._asdict().items()
            if isinstance(grad, np.ndarray)
        }
        with jax.enable_x64(dtype == "float64"):
            actual = self.evaluate(inputs, cotangents, dtype, **options)
        # From a zero state, one step has no gradient of decay to compare with.
        for name in [name for name, grad in wanted.items() if not np.any(grad)]:
            assert not np.any(actual.pop(name)), name
            del wanted[name]
        assert {"out", "final_state", "d_q", "d_k", "d_v"} <= wanted.keys()
        assert_tensors_close(actual, wanted, BOUNDS[dtype])

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_sizes(self, size: tuple[int, int, int], dtype: str) -> None:
        if size not in self.sizes:
            pytest.skip(f"{self.implementation} does not take (T, N, V) = {size}")
        inputs = make_inputs(*size, EVERY_OPTION, **self.rows)
        self.check_against_numpy(inputs, dtype, saved_state_interval=32)

    @pytest.mark.parametrize("options", OPTIONS, ids="+".join)
    def test_options(self, options: tuple[str, ...]) -> None:
        inputs = self.inputs(33, options)
        self.check_against_numpy(inputs, self.best_dtype)

    def test_decay_of_exactly_zero_and_one(self) -> None:
        inputs = self.inputs(33, EVERY_OPTION)
        decay = np.array(inputs.decay)
        decay[:, ::4], decay[:, 1::4] = 0.0, 1.0
        inputs = inputs._replace(decay=decay)
        self.check_against_numpy(inputs, self.best_dtype)

    @pytest.mark.parametrize("linear_state", [False, True])
    def test_bfloat16_against_float32(self, linear_state: bool) -> None:
        self.require("bfloat16")
        inputs = self.inputs(33, EVERY_OPTION)._replace(linear_state=linear_state)

        def rounded(x: np.ndarray) -> np.ndarray:
            return np.asarray(cast(x, "bfloat16")).astype("float32")

        inputs = inputs._replace(q=rounded(inputs.q), k=rounded(inputs.k), v=rounded(inputs.v))
        d_out, d_final_state = make_cotangents(inputs)
        cotangents = rounded(d_out), d_final_state
        assert_tensors_close(
            self.evaluate(inputs, cotangents, "bfloat16"),
            RecurrenceContract.evaluate(_Scan(), inputs, cotangents, "float32"),
            BOUNDS["bfloat16"],
        )

    @pytest.mark.parametrize("options", [EVERY_OPTION, ("initial_state", "linear_state")])
    def test_numerical_gradients(self, options: tuple[str, ...]) -> None:
        self.require("float64")
        inputs = make_inputs(5, 3, 2, options, batch=2, heads=1)
        d_out, d_final_state = make_cotangents(inputs)
        with jax.enable_x64(True):
            arrays = tensors(inputs, "float64")

            @jax.jit
            def loss(*values: Any) -> Any:
                out, final_state = self.call(
                    dict(zip(arrays, values, strict=True)),
                    None if inputs.segment_ids is None else jax.device_put(inputs.segment_ids),
                    linear_state=inputs.linear_state,
                    saved_state_interval=2,
                )
                return jnp.sum(out * d_out) + jnp.sum(final_state * d_final_state)

            # chex multiplies atol by the first argument's size.
            atol = 1e-7 / arrays["q"].size
            chex.assert_numerical_grads(
                loss, tuple(arrays.values()), order=1, atol=atol, rtol=1e-7, modes=("rev",)
            )

    # Time: splits, documents, saved states.

    def test_whole_run_equals_split_runs(self) -> None:
        self.require_runs()
        inputs = self.inputs(33, EVERY_OPTION)
        whole_time = inputs.q.shape[1]
        bounds = [0, 1, 12, whole_time]
        with jax.enable_x64(self.best_dtype == "float64"):
            arrays = tensors(inputs, self.best_dtype)
            cotangents = make_cotangents(inputs)
            d_out, d_final_state = (cast(x, str(arrays["decay"].dtype)) for x in cotangents)

            # A document that ends where a part ends is the next part's to start: only whole runs
            # see that change of id, so here documents change inside the parts.
            ids = np.array(inputs.segment_ids)
            for start in bounds[1:-1]:
                ids[:, start:] += ids[:, start - 1 : start] - ids[:, start : start + 1]
            assert np.any(ids[:, 1:] != ids[:, :-1])

            @functools.partial(jax.grad, has_aux=True)
            def split(arrays: Tensors) -> Any:
                state = arrays["initial_state"]
                outs = []
                for start, stop in itertools.pairwise(bounds):
                    part = slice_time(arrays, start, stop) | {"initial_state": state}
                    out, state = self.call(part, jax.device_put(ids[:, start:stop]))
                    outs.append(out)
                out = jnp.concatenate(outs, axis=1)
                loss = jnp.sum(out * d_out) + jnp.sum(state * d_final_state)
                return loss, {"out": out, "final_state": state}

            program = jax.jit(split, compiler_options=QUICK_TO_COMPILE)
            grads, results = program(arrays)
            actual = results | {f"d_{name}": x for name, x in grads.items()}
            # The program that other tests run too.
            whole = self.evaluate(inputs._replace(segment_ids=ids), cotangents, self.best_dtype)
            assert_tensors_close(actual, whole, BOUNDS[self.best_dtype])

    def test_saved_state_interval_changes_nothing(self) -> None:
        self.require_runs()
        inputs = self.inputs(67, EVERY_OPTION)
        cotangents = make_cotangents(inputs)
        bound = 1e-13 if self.best_dtype == "float64" else 1e-6
        with jax.enable_x64(self.best_dtype == "float64"):
            first, *others = self.saved_state_intervals
            expected = self.evaluate(
                inputs, cotangents, self.best_dtype, saved_state_interval=first
            )
            for every in others:
                actual = self.evaluate(
                    inputs, cotangents, self.best_dtype, saved_state_interval=every
                )
                assert_tensors_close(actual, expected, bound)

    @pytest.mark.parametrize("options", [(), EVERY_OPTION], ids="+".join)
    def test_one_step_returns_the_same_structure(self, options: tuple[str, ...]) -> None:
        batch, heads = self.rows["batch"], self.rows["heads"]

        def shapes(time: int) -> Any:
            arrays = tensors(self.inputs(time, options), "float32")
            ids = jnp.zeros((batch, time), jnp.int32) if "segment_ids" in options else None
            return jax.eval_shape(self.call, arrays, ids)

        one, many = shapes(1), shapes(2)
        assert jax.tree.structure(one) == jax.tree.structure(many)
        out, final_state = (batch, 1, heads, self.n_value), (batch, heads, 4, self.n_value)
        assert [x.shape for x in one] == [out, final_state]
        assert [x.dtype for x in one] == [x.dtype for x in many]

    # Dtypes and extremes.

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
    def test_dtypes(self, dtype: str) -> None:
        self.require(dtype)
        inputs = self.inputs(33, EVERY_OPTION)
        wide = "float64" if dtype == "float64" else "float32"
        with jax.enable_x64(dtype == "float64"):
            results = self.evaluate(inputs, make_cotangents(inputs), dtype)
        narrow = {"out", "d_q", "d_k", "d_v"}
        wanted = {name: dtype if name in narrow else wide for name in results}
        assert {name: str(x.dtype) for name, x in results.items()} == wanted

    @pytest.mark.parametrize("decay", [0.0, 1.0])
    @pytest.mark.parametrize("linear_state", [False, True])
    def test_zero_keys(self, decay: float, linear_state: bool) -> None:
        inputs = self.inputs(33, ("initial_state",))._replace(linear_state=linear_state)
        S_0 = inputs.initial_state
        assert S_0 is not None
        inputs = inputs._replace(k=np.zeros_like(inputs.k), decay=np.full_like(inputs.decay, decay))
        results = self.evaluate(inputs, make_cotangents(inputs), "float32")
        chex.assert_tree_all_finite(results)
        assert not np.any(results["d_v"])  # nothing is written
        if decay == 1 and linear_state:
            np.testing.assert_allclose(results["final_state"], S_0, rtol=1e-6)
        if decay == 0:
            assert not np.any(results["final_state"])

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_huge_inputs_give_no_nan(self, dtype: str) -> None:
        self.require(dtype)
        inputs = self.inputs(33, EVERY_OPTION)
        huge = {name: 1e4 * getattr(inputs, name) for name in ("q", "k", "v", "initial_state")}
        inputs = inputs._replace(**huge)
        results = self.evaluate(inputs, make_cotangents(inputs), dtype)
        chex.assert_tree_all_finite(results)
        assert np.max(np.abs(results["final_state"])) == 1

    # Programs: transformations, sharding, memory.

    def results_and_gradient(self, arrays: Tensors, ids: Any, cotangents: tuple[Any, Any]) -> Any:
        results, pullback = jax.vjp(lambda a: self.call(a, ids, saved_state_interval=4), arrays)
        return *results, *pullback(cotangents)

    def check_against_one_program(self, actual: Any, inputs: Inputs) -> None:
        """`results_and_gradient`, transformed, against what it is as it stands."""
        out, final_state, gradient = actual
        actual = {"out": out, "final_state": final_state}
        actual |= {f"d_{name}": x for name, x in gradient.items()}
        expected = self.evaluate(inputs, make_cotangents(inputs), "float32")
        assert actual.keys() == expected.keys()
        for name, x in actual.items():
            np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)

    def test_runs_are_bitwise_equal(self) -> None:
        inputs = make_inputs(67, 12, 8, EVERY_OPTION, **self.rows)
        cotangents = make_cotangents(inputs)
        first, second = (self.evaluate(inputs, cotangents, "float32") for _ in range(2))
        for name, x in first.items():
            np.testing.assert_array_equal(x, second[name], err_msg=name)

    def test_jit_changes_nothing(self) -> None:
        self.require_runs()
        inputs = self.inputs(9, EVERY_OPTION)
        arrays, ids = tensors(inputs, "float32"), jax.device_put(inputs.segment_ids)
        for eager, jitted in zip(
            self.call(arrays, ids), jax.jit(self.call)(arrays, ids), strict=True
        ):
            np.testing.assert_allclose(eager, jitted, rtol=1e-6, atol=1e-7)

    def test_vmap(self) -> None:
        if not self.supports_vmap:
            pytest.skip(f"{self.implementation} does not support vmap")
        inputs = self.inputs(9, EVERY_OPTION, batch=8)
        nested = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), vjp_arguments(inputs))
        mapped = jax.jit(jax.vmap(self.results_and_gradient))(*nested)
        mapped = jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), mapped)
        self.check_against_one_program(mapped, inputs)

    def test_data_parallel_without_gathering(self) -> None:
        if not self.supports_sharding:
            pytest.skip(f"{self.implementation} does not support sharded inputs")
        n_devices = jax.device_count()
        if n_devices < 2:
            pytest.skip("needs two devices")
        inputs = self.inputs(9, EVERY_OPTION, batch=2 * n_devices)
        arguments = vjp_arguments(inputs)
        mesh = jax.make_mesh((n_devices,), ("data",), axis_types=(AxisType.Auto,))
        by_batch = NamedSharding(mesh, PartitionSpec("data"))
        compiled = (
            jax.jit(self.results_and_gradient, out_shardings=by_batch)
            .lower(*jax.device_put(arguments, by_batch))
            .compile()
        )
        program = str(compiled.as_text())
        assert "ENTRY" in program  # it is the program's text
        for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
            assert collective not in program
        sharded = compiled(*jax.device_put(arguments, by_batch))
        for actual in jax.tree.leaves(sharded):
            assert len(actual.sharding.device_set) == n_devices
        self.check_against_one_program(sharded, inputs)

    def test_memory_grows_with_checkpoints_only(self) -> None:
        if not self.uses_xla_memory:
            pytest.skip(f"XLA does not know what memory {self.implementation} uses")
        heads, n_state, n_value = 4, 64, 64  # few heads might be padded
        state_bytes = heads * 4 * n_state * n_value
        # A step of q, k, v, out and decay, beta.
        step_bytes = heads * 4 * (2 * n_state + 2 * n_value + 2)

        @functools.cache
        def temporary(time: int, saved_state_interval: int) -> int:
            """Bytes of working memory of the compiled gradient, arguments and results excluded."""

            def loss(arrays: Tensors) -> Any:
                out, final_state = self.call(arrays, saved_state_interval=saved_state_interval)
                return jnp.sum(out * out) + jnp.sum(final_state * final_state)

            def array(*shape: int) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(shape, jnp.float32)

            arrays = {
                "q": array(1, time, heads, n_state),
                "k": array(1, time, heads, n_state),
                "v": array(1, time, heads, n_value),
                "decay": array(1, time, heads),
                "write_gate": array(1, time, heads),
            }
            analysis = jax.jit(jax.grad(loss)).lower(arrays).compile().memory_analysis()
            assert analysis is not None
            return analysis.temp_size_in_bytes

        # Long enough that what is kept for all steps, and not what one segment needs for a while,
        # decides the most that is in use at once.
        time = 8192

        def per_step(saved_state_interval: int) -> float:
            twice = temporary(2 * time, saved_state_interval)
            return (twice - temporary(time, saved_state_interval)) / time

        # All states would be state_bytes a step. Saved states are a fraction of that, and copies of
        # the inputs and gradients in the order that the implementation wants come on top.
        states = {every: state_bytes / kept for every, kept in self.kept_every.items()}
        for every, of_step in states.items():
            assert per_step(every) < of_step + 3 * step_bytes < state_bytes
        # Saved states may be bfloat16: half of what float32 takes.
        close, far = [*states][-2:]
        saved = (per_step(close) - per_step(far)) / (states[close] - states[far])
        assert 0.45 < saved < 1.2
        assert temporary(time, 64) < time * state_bytes / 3


class _Scan(RecurrenceContract):
    implementation = "scan"
