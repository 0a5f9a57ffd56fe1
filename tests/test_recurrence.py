import logging
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax import kernels, recurrence
from e88_jax.recurrence import e88_recurrence
from pallas_kernels import target
from tests.recurrence_calls import EVERY_OPTION, make_inputs, tensors
from tests.recurrence_contract import RecurrenceContract


class TestScan(RecurrenceContract):
    implementation = "scan"


def small_call(**changes: Any) -> tuple[Any, Any]:
    """B 2, T 5, H 3, N 4, V 6 with every option, and the changes given."""
    inputs = make_inputs(5, 4, 6, EVERY_OPTION, batch=2)
    arguments = {**tensors(inputs, "float32"), "segment_ids": jnp.asarray(inputs.segment_ids)}
    return e88_recurrence(**{**arguments, **changes})


def zeros(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.zeros(shape, dtype)


# What is wrong, and every number that the message must hold.
BAD_CALLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "q of rank 3": ({"q": zeros(2, 5, 12)}, ["q must be", "(2, 5, 12)"]),
    "v of rank 3": ({"v": zeros(2, 5, 18)}, ["v must be", "(2, 5, 18)"]),
    "no time": (
        {"q": zeros(2, 0, 3, 4), "v": zeros(2, 0, 3, 6)},
        ["(2, 0, 3, 4)", "(2, 0, 3, 6)"],
    ),
    "k of another N": ({"k": zeros(2, 5, 3, 8)}, ["k must", "(2, 5, 3, 4)", "(2, 5, 3, 8)"]),
    "v of another H": ({"v": zeros(2, 5, 1, 6)}, ["v must", "(2, 5, 3, 6)", "(2, 5, 1, 6)"]),
    "decay per key": ({"decay": zeros(2, 5, 3, 4)}, ["decay must", "(2, 5, 3)", "(2, 5, 3, 4)"]),
    "write_gate of another T": (
        {"write_gate": zeros(2, 4, 3)},
        ["write_gate must", "(2, 5, 3)", "(2, 4, 3)"],
    ),
    "initial_state transposed": (
        {"initial_state": zeros(2, 3, 6, 4)},
        ["initial_state must", "(2, 3, 4, 6)", "(2, 3, 6, 4)"],
    ),
    "initial_state without heads": (
        {"initial_state": zeros(2, 4, 6)},
        ["initial_state must", "(2, 3, 4, 6)", "(2, 4, 6)"],
    ),
    "segment_ids per head": (
        {"segment_ids": zeros(2, 5, 3, dtype="int32")},
        ["segment_ids must", "(2, 5)", "(2, 5, 3)"],
    ),
    "q of float16": ({"q": zeros(2, 5, 3, 4, dtype="float16")}, ["q must be", "float16"]),
    "k of another dtype": (
        {"k": zeros(2, 5, 3, 4, dtype="bfloat16")},
        ["k must", "float32", "bfloat16"],
    ),
    "v of another dtype": (
        {"v": zeros(2, 5, 3, 6, dtype="bfloat16")},
        ["v must", "float32", "bfloat16"],
    ),
    "decay of bfloat16": (
        {"decay": zeros(2, 5, 3, dtype="bfloat16")},
        ["decay must", "float32", "bfloat16"],
    ),
    "write_gate of bfloat16": (
        {"write_gate": zeros(2, 5, 3, dtype="bfloat16")},
        ["write_gate must", "float32", "bfloat16"],
    ),
    "initial_state of bfloat16": (
        {"initial_state": zeros(2, 3, 4, 6, dtype="bfloat16")},
        ["initial_state must", "float32", "bfloat16"],
    ),
    "segment_ids of floats": ({"segment_ids": zeros(2, 5)}, ["segment_ids must", "float32"]),
    "saved_state_interval of 0": (
        {"saved_state_interval": 0},
        ["saved_state_interval must", "1", "0"],
    ),
    "saved_state_interval of -7": (
        {"saved_state_interval": -7},
        ["saved_state_interval must", "1", "-7"],
    ),
    "unknown implementation": ({"implementation": "cuda"}, ["implementation must", "scan", "cuda"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    changes, fragments = BAD_CALLS[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011  (fragments below)
        small_call(**changes)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_bad_input_is_named_before_the_implementation_refuses() -> None:
    with pytest.raises(ValueError, match=re.escape("(2, 5, 3, 8)")):
        small_call(k=zeros(2, 5, 3, 8), implementation="mosaic_gpu")


def test_the_small_call_is_good() -> None:
    out, final_state = small_call()
    assert (out.shape, final_state.shape) == ((2, 5, 3, 6), (2, 3, 4, 6))


def test_float64_takes_float32_decay() -> None:
    """The layer may compute its decay in float32 whatever the dtype of q."""
    with jax.enable_x64(True):
        arrays = tensors(make_inputs(3, 4, 6), "float64")
        out, _ = e88_recurrence(**arrays | {"decay": arrays["decay"].astype("float32")})
        assert out.dtype == jnp.float64


class TestChoice:
    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """A GPU, with kernels that take only T = 5."""

        def picky(q: Any, *args: Any, **options: Any) -> Any:
            if q.shape[1] != 5:
                raise NotImplementedError(f"picky takes T = 5, got {q.shape[1]}")
            return "picky", "result"

        monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "mosaic_gpu", picky)
        kernels.log_once.cache_clear()
        with target.use(target.H100):
            yield

    def call(self, time: int, **options: Any) -> Any:
        return e88_recurrence(**tensors(make_inputs(time, 4, 6), "float32"), **options)

    def test_the_fastest_that_can_is_taken(self, caplog: pytest.LogCaptureFixture) -> None:
        assert self.call(5) == ("picky", "result")
        assert not caplog.records

    def test_falls_back_and_says_so_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            results = [self.call(3) for _ in range(3)]
        expected = self.call(3, implementation="scan")
        for result in results:
            np.testing.assert_array_equal(result[0], expected[0])
        (record,) = [r for r in caplog.records if r.name.startswith("e88_jax")]
        assert "picky takes T = 5, got 3" in record.getMessage()

    def test_a_named_one_does_not_fall_back(self) -> None:
        with pytest.raises(NotImplementedError, match="got 3"):
            self.call(3, implementation="mosaic_gpu")

    def test_without_a_gpu_the_scan_is_taken(self, caplog: pytest.LogCaptureFixture) -> None:
        with target.use(target.CPU):
            result = self.call(5)
        expected = self.call(5, implementation="scan")
        np.testing.assert_array_equal(result[0], expected[0])
        assert not caplog.records

    def test_bad_input_does_not_fall_back(self) -> None:
        with pytest.raises(ValueError, match="saved_state_interval"):
            self.call(3, saved_state_interval=0)


def test_the_gpu_kernel_refuses_where_it_is_missing() -> None:
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu.*scan"):
        small_call(implementation="mosaic_gpu")


def test_the_default_runs_on_this_platform() -> None:
    default, scan = small_call(), small_call(implementation="scan")
    np.testing.assert_allclose(default[0], scan[0], rtol=1e-5, atol=1e-6)
