"""Contract of every implementation of the recurrence, for documents in a row and rows that end."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from e88_jax import naive
from e88_jax.naive import Inputs
from tests.recurrence_calls import (
    BOUNDS,
    EVERY_OPTION,
    RecurrenceCalls,
    Tensors,
    assert_tensors_close,
    make_cotangents,
)


class DocumentsContract(RecurrenceCalls):
    """Each document and each row is as if alone."""

    def test_packed_documents_equal_separate_runs(self) -> None:
        self.require_runs()
        lengths = [1, 10, 10, 12]  # alike where a document may be: a program less
        starts = np.cumsum([0, *lengths])
        time = int(starts[-1])
        inputs = self.inputs(time, ("write_gate", "initial_state"))
        ids = np.tile(np.repeat([7, 2, 7, 0], lengths).astype(np.int32), (inputs.q.shape[0], 1))
        d_out, d_final_state = make_cotangents(inputs)
        with jax.enable_x64(self.best_dtype == "float64"):
            packed = self.evaluate(
                inputs._replace(segment_ids=ids), (d_out, d_final_state), self.best_dtype
            )
            per_step: dict[str, list[Any]] = {}
            final: Tensors = {}
            for i, (start, stop) in enumerate(itertools.pairwise(starts)):
                document = Inputs(
                    *(x[:, start:stop] for x in inputs[:4]),
                    write_gate=inputs.write_gate[:, start:stop],  # type: ignore[index]
                    initial_state=inputs.initial_state if i == 0 else None,
                )
                # Only the last document's state comes out of the packed run.
                d_state = d_final_state * (i == len(lengths) - 1)
                separate = self.evaluate(document, (d_out[:, start:stop], d_state), self.best_dtype)
                if i == 0:
                    final["d_initial_state"] = separate.pop("d_initial_state")
                final["final_state"] = separate.pop("final_state")
                for name, x in separate.items():
                    per_step.setdefault(name, []).append(x)
            separate = final | {name: np.concatenate(x, 1) for name, x in per_step.items()}
        assert_tensors_close(packed, separate, BOUNDS[self.best_dtype])

    @pytest.mark.parametrize("linear_state", [False, True])
    def test_rows_that_end(self, linear_state: bool) -> None:
        """Each row is as if alone, whatever lies after its end, NaN included."""
        time, lengths = 33, (33, 18, 5, 0)
        rows = {"batch": 4, "heads": self.rows["heads"]}
        inputs = self.inputs(time, EVERY_OPTION, **rows)._replace(linear_state=linear_state)
        d_out, d_final_state = make_cotangents(inputs)
        past_end = np.arange(time)[None, :] >= np.array(lengths)[:, None]
        names = ("q", "k", "v", "decay", "write_gate")
        padded = inputs._replace(
            **{name: np.array(getattr(inputs, name)) for name in names},
        )
        for name in names:
            getattr(padded, name)[past_end] = np.nan
        dtype = self.best_dtype
        with jax.enable_x64(dtype == "float64"):
            actual = self.evaluate(padded, (d_out, d_final_state), dtype, lengths=lengths)
        for row, length in enumerate(lengths):
            own = {name: x[row] for name, x in actual.items()}
            for name in own.keys() - {"final_state", "d_initial_state"}:
                assert not np.any(own[name][length:]), name
            if not length:
                given = inputs.initial_state[row]  # pyright: ignore[reportOptionalSubscript]
                np.testing.assert_array_equal(
                    own["final_state"], given.astype(own["final_state"].dtype)
                )
                np.testing.assert_allclose(own["d_initial_state"], d_final_state[row], rtol=1e-6)
                continue
            alone = Inputs(
                *(x[row : row + 1, :length] for x in inputs[:5]),  # pyright: ignore[reportOptionalSubscript]
                initial_state=inputs.initial_state[row : row + 1],  # pyright: ignore[reportOptionalSubscript]
                segment_ids=inputs.segment_ids[row : row + 1, :length],  # pyright: ignore[reportOptionalSubscript]
                linear_state=linear_state,
            )
            cotangents = d_out[row : row + 1, :length], d_final_state[row : row + 1]
            expected = naive.run(alone)
            wanted: Tensors = {"out": expected.out, "final_state": expected.final_state}
            for name, x in naive.gradients(alone, *cotangents)._asdict().items():
                if isinstance(x, np.ndarray):
                    wanted[f"d_{name}"] = x
            got = {
                name: x[None] if name in ("final_state", "d_initial_state") else x[None, :length]
                for name, x in own.items()
            }
            assert_tensors_close(got, wanted, BOUNDS[dtype])

    @pytest.mark.parametrize("spoil", ["q", "k", "v", "decay", "write_gate", "initial_state"])
    def test_documents_are_apart_where_one_is_not_finite(self, spoil: str) -> None:
        inputs = self.inputs(20, EVERY_OPTION)
        ids = np.zeros((inputs.q.shape[0], 20), np.int32)
        ids[:, 7:13], ids[:, 13:] = 1, 2
        inputs = inputs._replace(segment_ids=ids)
        cotangents = make_cotangents(inputs)
        spoilt = np.array(getattr(inputs, spoil))
        # Head 0 of the second document from its third step on, or of the first from its start.
        first, step, stop = (0, 0, 7) if spoil == "initial_state" else (7, 9, 13)
        spoilt[(0, 0) if spoil == "initial_state" else (0, step, 0)] = np.inf
        clean = self.evaluate(inputs, cotangents, "float32")
        dirty = self.evaluate(inputs._replace(**{spoil: spoilt}), cotangents, "float32")
        clean, dirty = ({name: np.array(x) for name, x in xs.items()} for xs in (clean, dirty))
        spoilt_out = dirty["out"][0, step : step + 1 if spoil == "q" else stop, 0]
        assert np.all(np.isnan(spoilt_out))
        spoilt_out[...] = 0
        for name, x in dirty.items():
            assert np.all(np.isfinite(x)), name
            for y in (x, clean[name]):
                if name == "d_initial_state":
                    y[0, 0] = 0
                elif name != "final_state":
                    y[0, first:stop, 0] = 0
            np.testing.assert_array_equal(x, clean[name], err_msg=name)

    @pytest.mark.parametrize("linear_state", [False, True])
    def test_nothing_leaks_through_a_restart(self, linear_state: bool) -> None:
        inputs = self.inputs(33, EVERY_OPTION)._replace(linear_state=linear_state)
        start = 7
        ids = np.zeros((inputs.q.shape[0], 33), np.int32)
        ids[:, start:] = 1
        inputs = inputs._replace(segment_ids=ids)
        # Weigh the second document alone: the first must get no gradient.
        d_out, d_final_state = make_cotangents(inputs)
        d_out[:, :start] = 0
        dirty = {}
        for name in ("q", "k", "v", "initial_state"):
            x = np.array(getattr(inputs, name))
            x[:, : start if name != "initial_state" else None] = 100.0
            dirty[name] = x
        clean = self.evaluate(inputs, (d_out, d_final_state), "float32")
        dirtied = self.evaluate(inputs._replace(**dirty), (d_out, d_final_state), "float32")
        assert not np.array_equal(clean["out"][:, :start], dirtied["out"][:, :start])
        for name, x in dirtied.items():
            if name == "d_initial_state":
                assert not np.any(x)
            elif name == "final_state":
                np.testing.assert_array_equal(x, clean[name])
            else:
                np.testing.assert_array_equal(x[:, start:], clean[name][:, start:], err_msg=name)
                assert name == "out" or not np.any(x[:, :start]), name
