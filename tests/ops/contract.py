"""Contract of every implementation of the linear recurrences, as one class to inherit.

A test class names its op and its implementation, and inherits the rest:

    class TestScan(LinearRecurrenceContract):
        op = SSD
        implementation = "scan"
"""

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from tests.ops.inputs import (
    OPTIONS,
    SIZE,
    Call,
    Op,
    Size,
    Tensors,
    dtype_of,
    evaluate,
    expected,
    make_call,
    rounded,
    tensors,
)
from tests.recurrence_calls import BOUNDS, assert_tensors_close


class LinearRecurrenceContract:
    """Inherit it, and set what follows."""

    op: Op
    implementation: Any
    parts: tuple[int, ...] = (63, 1, 65)
    """Steps of the parts that a whole run is cut into: their programs are those of `sizes`."""
    sizes: tuple[Size, ...] = (Size(2, 64, 3, 3, 12, 5),)
    """Sizes besides those of the parts and of the whole."""
    border: int = 64
    """A step that a chunk, or what is recomputed at once, starts with."""
    short: int = 65
    """Steps of tests that compile programs of their own."""
    long: Size = Size(1, 500, 1, 2, 12, 20)
    """Many chunks, whose errors could add up in float32. The rounding of a scan is the loop's."""

    @property
    def whole(self) -> int:
        return sum(self.parts)

    def call(self, time: int = SIZE.time) -> Call:
        return make_call(self.op, SIZE._replace(time=time))

    def evaluate(self, call: Call, dtype: str = "float64") -> Tensors:
        return evaluate(self.op, self.implementation, call, dtype)

    def check(self, call: Call, dtype: str = "float64", wanted: Tensors | None = None) -> None:
        """Results and all gradients against the NumPy loop, of the call itself by default."""
        wanted = dict(expected(self.op, call) if wanted is None else wanted)
        actual = self.evaluate(call, dtype)
        # From a zero state, one step has no gradient of the decay to compare with.
        for name in [name for name, x in wanted.items() if not np.any(x)]:
            assert not np.any(actual.pop(name)), name
            del wanted[name]
        assert {"out", "final_state"} < wanted.keys()
        assert_tensors_close(actual, wanted, BOUNDS[dtype])

    # Against the NumPy loop.

    def test_sizes(self) -> None:
        for time in {*self.parts, self.whole}:
            self.check(self.call(time))
        for size in self.sizes:
            self.check(make_call(self.op, size))

    def test_float32(self) -> None:
        self.check(make_call(self.op, self.long), "float32")

    @pytest.mark.parametrize("left_out", [OPTIONS, OPTIONS[:2], OPTIONS[2:]], ids=str)
    def test_options(self, left_out: tuple[str, ...]) -> None:
        self.check(self.call(self.short).without(*left_out))

    def test_bfloat16(self) -> None:
        """The loop has the same rounded inputs."""
        call = self.call(self.short)
        call = call.changed(**{name: rounded(call.arrays[name]) for name in self.op.narrow})
        d_out, d_final_state = call.cotangents
        self.check(call._replace(cotangents=(rounded(d_out), d_final_state)), "bfloat16")

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_decays_of_0_and_1(self, dtype: str) -> None:
        call = self.call()
        self.check(call._replace(arrays=self.op.extreme_decays(call.arrays)), dtype)

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("gates", [(2.0,), (0.0, 1e-9, 2.0, 1.999)], ids=str)
    def test_equal_keys(self, gates: tuple[float, ...], dtype: str) -> None:
        """A delta rule's write gate of 2 reflects what the same key holds, step after step: terms
        of a Neumann series of a chunk would grow to 1e29."""
        call = self.call()
        key, gate = self.op.roles["k"], self.op.roles["gate"]
        k, beta = (call.arrays[name] for name in (key, gate))
        self.check(
            call.changed(
                **{
                    key: np.broadcast_to(k[:, :1], k.shape),
                    gate: np.resize(np.repeat(gates, beta.shape[-1]), beta.shape[1:])
                    + np.zeros_like(beta),
                }
            ),
            dtype,
        )

    # Time: splits, documents, rows that end.

    def test_whole_run_equals_split_runs(self) -> None:
        call = self.call(self.whole)
        ids = np.array(call.segment_ids)
        starts = [0, *itertools.accumulate(self.parts)]
        # A document that ends where a part ends is the next part's to start.
        for start in starts[1:-1]:
            ids[:, start:] += ids[:, start - 1 : start] - ids[:, start : start + 1]
        assert np.any(ids[:, 1:] != ids[:, :-1])
        call = call._replace(segment_ids=ids, lengths=np.full_like(call.lengths, self.whole))
        bounds = list(itertools.pairwise(starts))
        states = [call.arrays["initial_state"]]
        for start, stop in bounds:
            part = call.steps(start, stop).changed(initial_state=states[-1])
            states.append(self.evaluate(part)["final_state"])
        # The gradient of a part's initial state is that of the final state of the part before.
        d_state, results = call.cotangents[1], []
        for (start, stop), state in reversed([*zip(bounds, states[:-1], strict=True)]):
            part = call.steps(start, stop).changed(initial_state=state)
            results.insert(
                0, self.evaluate(part._replace(cotangents=(part.cotangents[0], d_state)))
            )
            d_state = results[0]["d_initial_state"]
        joined = _joined(results) | {"final_state": states[-1], "d_initial_state": d_state}
        assert_tensors_close(joined, self.evaluate(call), BOUNDS["float64"])

    def test_packed_documents_equal_separate_runs(self) -> None:
        call = self.call(self.whole)
        starts = [0, *itertools.accumulate(self.parts)]
        ids = np.broadcast_to(
            np.repeat([7, 2, 7, 0, 1][: len(self.parts)], self.parts), (SIZE.batch, self.whole)
        )
        full = np.full_like(call.lengths, self.whole)
        call = call._replace(segment_ids=ids.astype(np.int32), lengths=full)
        d_final_state = call.cotangents[1]
        results = []
        for start, stop in itertools.pairwise(starts):
            part = call.steps(start, stop)
            if start:
                part = part.changed(initial_state=np.zeros_like(d_final_state))
            # Only the last document's state comes out of the packed run.
            d_state = d_final_state * (stop == self.whole)
            results.append(self.evaluate(part._replace(cotangents=(part.cotangents[0], d_state))))
        first, last = results[0], results[-1]
        ends = {"final_state": last["final_state"], "d_initial_state": first["d_initial_state"]}
        assert_tensors_close(self.evaluate(call), _joined(results) | ends, BOUNDS["float64"])

    def test_documents_start_about_a_border(self) -> None:
        """At a chunk's first step, at the one before and at the one after."""
        call = self.call(self.whole)
        ids = np.zeros((3, self.whole), np.int32)
        for row, start in enumerate((self.border, self.border - 1, self.border + 1)):
            ids[row, start:] = 1
        self.check(call._replace(segment_ids=ids))
        # One step a document.
        self.check(
            call._replace(segment_ids=np.tile(np.arange(self.whole, dtype=np.int32), (3, 1)))
        )

    @pytest.mark.parametrize("lengths", [(65, 64, 63), (31, 1, 0)], ids=str)
    def test_rows_that_end(self, lengths: tuple[int, ...]) -> None:
        """What lies after a row's end is not read, NaN included."""
        call = self.call()._replace(lengths=np.array(lengths, np.int32))
        wanted = expected(self.op, call)
        past_end = np.arange(SIZE.time) >= np.array(lengths)[:, None]
        padded = {name: np.array(x) for name, x in call.arrays.items()}
        for x in padded.values():
            if x.shape[:2] == past_end.shape:
                x[past_end] = np.nan
        self.check(call._replace(arrays=padded), wanted=wanted)
        results = self.evaluate(call._replace(arrays=padded))
        for name, x in results.items():
            if x.shape[:2] == past_end.shape:
                assert not np.any(x[past_end]), name
        if 0 in lengths:
            row, start = lengths.index(0), call.arrays["initial_state"]
            np.testing.assert_array_equal(results["final_state"][row], start[row])

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("spoil", ["q", "k", "v", "gate", "decay", "initial_state"])
    def test_documents_are_apart_where_one_is_not_finite(self, spoil: str, value: float) -> None:
        """Results that depend on the value are NaN; all else is as if they were not weighed."""
        name = self.op.roles.get(spoil, spoil)
        call = self.call()
        ids = np.zeros((SIZE.batch, SIZE.time), np.int32)
        ids[:, 20:45], ids[:, 45:] = 1, 2
        call = call._replace(segment_ids=ids, lengths=np.full_like(call.lengths, SIZE.time))
        # The second document of row 0, and the last of row 1. Heads 0 to 2 share a key.
        spoilt = np.array(call.arrays[name])
        heads = slice(0, 3) if spoil in ("q", "k") else slice(0, 1)
        out_is_nan = np.zeros((SIZE.batch, SIZE.time, SIZE.heads), bool)
        state_is_nan = np.zeros((SIZE.batch, SIZE.heads), bool)
        if spoil == "initial_state":
            spoilt[0, 0, 1, 2] = value
            out_is_nan[0, :20, 0] = True
        else:
            spoilt[0, 30, 0, ...] = spoilt[1, 50, 0, ...] = value
            out_is_nan[0, 30 : 31 if spoil == "q" else 45, heads] = True
            out_is_nan[1, 50 : 51 if spoil == "q" else None, heads] = True
            state_is_nan[1, heads] = spoil != "q"
        dirty = self.evaluate(call.changed(**{name: spoilt}), "float32")
        out_is_nan, state_is_nan = out_is_nan[..., None], state_is_nan[..., None, None]
        for result, is_nan in (("out", out_is_nan), ("final_state", state_is_nan)):
            shape = dirty[result].shape
            np.testing.assert_array_equal(
                np.isnan(dirty[result]), np.broadcast_to(is_nan, shape), err_msg=result
            )
        d_out, d_final_state = call.cotangents
        weighed = d_out * ~out_is_nan, d_final_state * ~state_is_nan
        clean = self.evaluate(call._replace(cotangents=weighed), "float32")
        for results in (dirty, clean):
            results["out"] = np.where(out_is_nan, 0, results["out"])
            results["final_state"] = np.where(state_is_nan, 0, results["final_state"])
        for name, x in dirty.items():
            np.testing.assert_array_equal(x, clean[name], err_msg=name)

    # Steps, dtypes, programs.

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
    def test_dtypes_of_results(self, dtype: str) -> None:
        """The same of one step and of many, whatever the options."""
        with jax.enable_x64(dtype == "float64"):
            for time, left_out in itertools.product((1, 2), ((), OPTIONS)):
                call = self.call(time).without(*left_out)
                arrays, rows = tensors(self.op, call, dtype), (call.segment_ids, call.lengths)
                out, final_state = jax.eval_shape(self.run, arrays, *rows)
                batch, _, _, heads, n_key, n_value = SIZE
                assert out.shape == (batch, time, heads, n_value)
                assert final_state.shape == (batch, heads, n_key, n_value)
                wanted = dtype_of(self.op, self.op.roles["v"], dtype)
                assert (out.dtype, final_state.dtype) == (
                    wanted,
                    "float64" if dtype == "float64" else "float32",
                )

    def run(self, arrays: Tensors, segment_ids: Any = None, lengths: Any = None) -> Any:
        rows = {"segment_ids": segment_ids, "lengths": lengths}
        return self.op.function(**arrays, **rows, implementation=self.implementation)

    def test_runs_are_bitwise_equal(self) -> None:
        first, second = (self.evaluate(self.call(), "float32") for _ in range(2))
        for name, x in first.items():
            np.testing.assert_array_equal(x, second[name], err_msg=name)


def _joined(results: list[Tensors]) -> Tensors:
    """Results of one step after the other; gradients of what is not per step are sums."""
    per_step = [name for name in results[0] if name not in ("final_state", "d_initial_state")]
    return {
        name: sum(x[name] for x in results)
        if results[0][name].ndim == 1
        else np.concatenate([x[name] for x in results], axis=1)
        for name in per_step
    }
