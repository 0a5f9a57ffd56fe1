import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax import naive, recurrence, selfcheck
from e88_jax.reference import scan_recurrence
from e88_jax.selfcheck import Case

EVERY_OPTION = ("write_gate", "initial_state", "segment_ids")
SMALL = Case((2, 5, 3, 4, 6), "float32", EVERY_OPTION)


def test_the_scan_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.main(["--quick", "--implementation", "scan"]) == 0
    device, _, header, *rows, _, summary = capsys.readouterr().out.splitlines()
    assert jax.__version__ in device
    assert header.split() == ["implementation", "case", "worst", "ratio", "bound"]
    for row, case in zip(rows, selfcheck.QUICK, strict=True):
        assert row.startswith("scan ")
        assert str(case) in row
        assert row.endswith("OK")
    assert summary.startswith("OK")
    assert f"scan {len(rows)} passed, 0 failed" in summary


def test_all_that_the_op_takes_is_among_the_cases() -> None:
    assert {case.shape[1] for case in selfcheck.FULL} == {1, 31, 67, 129}
    sizes = [n for case in selfcheck.FULL for n in case.shape[3:]]
    assert (min(sizes), max(sizes)) == (4, 128)
    for dtype in ("float32", "bfloat16"):
        cases = [case for case in selfcheck.FULL if case.dtype == dtype]
        used = {option for case in cases for option in case.options}
        assert used == {*EVERY_OPTION, "linear_state"}
        assert {case.saved_state_interval for case in cases} == {16, 32, 64}
        assert len({case.extreme for case in cases}) == 4


UNSATURATED = [
    case
    for case in selfcheck.FULL
    if "linear_state" not in case.options and case.extreme != "inputs of 1e4"
]


@pytest.mark.parametrize("case", UNSATURATED, ids=str)
def test_gradients_reach_the_past(case: Case) -> None:
    """A saturated tanh has no gradient, and would hide a wrong one."""
    inputs = selfcheck.make_inputs(case).items()
    arrays: dict[str, Any] = {name: x for name, x in inputs if not name.startswith("d_")}
    assert np.max(np.abs(naive.run(naive.Inputs(**arrays)).final_state)) < 0.95


# Implementations that are wrong in one way: what they return, given the scan's arguments.

_runs = itertools.count(1)


def wrong_gradient_of_k(q: Any, k: Any, *args: Any, **options: Any) -> Any:
    scaled = k + 0.01 * (k - jax.lax.stop_gradient(k))  # k itself, with 1.01 of its gradient
    return scan_recurrence(q, scaled, *args, **options)


def no_gradient_from_the_final_state(*args: Any, **options: Any) -> Any:
    out, final_state = scan_recurrence(*args, **options)
    return out, jax.lax.stop_gradient(final_state)


def documents_leak(*args: Any, **options: Any) -> Any:
    arguments: list[Any] = [*args[:-2], None, args[-1]]
    return scan_recurrence(*arguments, **options)


def one_nan(*args: Any, **options: Any) -> Any:
    out, final_state = scan_recurrence(*args, **options)
    return out, final_state.at[0, 0, 0, 0].set(jnp.nan)


def another_result_each_time(*args: Any, **options: Any) -> Any:
    out, final_state = scan_recurrence(*args, **options)
    noise = jax.pure_callback(
        lambda: np.float32(1 + 1e-6 * next(_runs)), jax.ShapeDtypeStruct((), jnp.float32)
    )
    return noise * out, final_state


def crash(*_args: Any, **_options: Any) -> Any:
    raise RuntimeError("illegal\ninstruction")


WRONG: dict[Callable[..., Any], str] = {
    wrong_gradient_of_k: "FAIL: d_k is off by 1.0e-02",
    no_gradient_from_the_final_state: "d_initial_state is off by",
    documents_leak: "out is off by",
    one_nan: "NaN or inf in final_state",
    another_result_each_time: "two runs differ in out",
    crash: "FAIL: RuntimeError: illegal instruction",
}


def use(monkeypatch: pytest.MonkeyPatch, **implementations: Callable[..., Any]) -> None:
    monkeypatch.setattr(recurrence, "IMPLEMENTATIONS", implementations)
    monkeypatch.setattr(selfcheck, "QUICK", (SMALL,))


def test_wrong_implementations_are_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, right=scan_recurrence, **{wrong.__name__: wrong for wrong in WRONG})
    assert selfcheck.main(["--quick"]) == 1
    *_, summary = lines = capsys.readouterr().out.splitlines()
    right, *rows = lines[-len(WRONG) - 3 : -2]
    assert right.startswith("right ")
    assert right.endswith("OK")
    assert summary.startswith("FAIL")
    for row, (wrong, finding) in zip(rows, WRONG.items(), strict=True):
        assert row.startswith(f"{wrong.__name__} ")
        assert finding in row
        assert f"{wrong.__name__} 0 passed, 1 failed" in summary


def test_nothing_but_nan_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(*args: Any, **options: Any) -> Any:
        return jax.tree.map(lambda x: x * jnp.nan, scan_recurrence(*args, **options))

    use(monkeypatch, nan=nan)
    extreme = dataclasses.replace(SMALL, extreme="inputs of 1e4")
    monkeypatch.setattr(selfcheck, "QUICK", (SMALL, extreme))
    for result in selfcheck.run_checks(quick=True, report=lambda _: None):
        assert "NaN or inf in out" in result.failures[0]


def refuse(*_args: Any, **_options: Any) -> Any:
    raise NotImplementedError("needs a GPU")


def test_an_implementation_that_the_machine_lacks_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, missing=refuse, scan=scan_recurrence)
    monkeypatch.setattr(selfcheck, "QUICK", (SMALL, SMALL))
    assert selfcheck.main(["--quick"]) == 0
    output = capsys.readouterr().out
    assert output.count("needs a GPU") == 1
    assert "not available here: implementation='missing' needs a GPU; use" in output
    assert "missing not available here; scan 2 passed" in output.splitlines()[-1]


def test_nothing_checked_is_not_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, missing=refuse, scan=scan_recurrence)
    assert selfcheck.main(["--quick", "--implementation", "missing"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOTHING CHECKED")


def test_single_refusals_are_listed_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def picky(q: Any, *args: Any, **options: Any) -> Any:
        if q.shape[1] != 5:
            raise NotImplementedError(f"takes T = 5, got {q.shape[1]}")
        return scan_recurrence(q, *args, **options)

    use(monkeypatch, picky=picky)
    other = Case((1, 1, 1, 4, 4), "bfloat16")
    monkeypatch.setattr(selfcheck, "QUICK", (other, SMALL, other))
    assert selfcheck.main(["--quick"]) == 0
    *_, before, passed, after, _, summary = capsys.readouterr().out.splitlines()
    assert passed.endswith("OK")
    for row in (before, after):
        assert str(other) in row
        assert "refused: implementation='picky' takes T = 5, got 1; use" in row
    assert "picky 1 passed, 0 failed, 2 refused" in summary


def test_unknown_implementations_are_named() -> None:
    with pytest.raises(ValueError, match=r"scan.*triton"):
        selfcheck.run_checks(["triton"])
