"""Check of every implementation of the recurrence on this machine, and of a layer's other kernels:
`python -m e88_jax.selfcheck`.

To be run on a new GPU, and after a change of driver or JAX: a wrong gradient is easy to see here
and hard to see in a loss.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from e88_jax import checked_here, command, naive, recurrence, selfcheck_layers
from e88_jax.checks import require_bool, require_choice, shown
from e88_jax.selfcheck_layers import LayerCase
from e88_jax.typed import jit, vjp
from pallas_kernels import target

BOUNDS = {"float32": 2e-5, "bfloat16": 4e-3}
"""Largest ||x - reference|| / ||reference|| that passes, by the dtype of q, k and v. Rounding a
result to bfloat16 alone gives 1.7e-3."""

Arrays = dict[str, np.ndarray]
Extreme = Literal["decay 0 and 1", "zero keys", "inputs of 1e4"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the recurrence, checked with its gradients."""

    shape: tuple[int, int, int, int, int]
    """B, T, H, N, V."""
    dtype: str
    """Dtype of q, k and v."""
    options: tuple[str, ...] = ()
    """Options used, among write_gate, initial_state, segment_ids and linear_state."""
    saved_state_interval: int = 32
    extreme: Extreme | None = None

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}{n}" for letter, n in zip("BTHNV", self.shape, strict=True))
        words = [f"every {self.saved_state_interval}", *(_SHORT[option] for option in self.options)]
        words += [] if self.extreme is None else [self.extreme]
        return f"{sizes:20} {self.dtype:8} {', '.join(words)}"


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of one case on one implementation."""

    implementation: str
    case: Case | LayerCase
    refusal: str | None = None
    """Reason for which the implementation does not take the call; then nothing else is set."""
    worst: str = ""
    """The result, or `d_x` for the gradient of an input x, whose ratio is largest."""
    ratio: float | None = None
    """||x - reference|| / ||reference|| of the worst; None if only NaN and inf are looked for."""
    failures: tuple[str, ...] = ()
    """Findings, in words."""


_EVERY = ("write_gate", "initial_state", "segment_ids")
_SHORT = {
    "write_gate": "gate",
    "initial_state": "state",
    "segment_ids": "ids",
    "linear_state": "linear",
}
_SMALL = (2, 67, 5, 12, 20)
_EXTREMES: tuple[Extreme, ...] = ("decay 0 and 1", "zero keys", "inputs of 1e4")

# T of one step, short of a saved state and past one; N and V that differ or are no multiples of 8.
FULL = (
    Case((1, 1, 1, 4, 4), "float32"),
    *(Case((3, 1, 5, 36, 20), dtype, _EVERY) for dtype in BOUNDS),
    Case((2, 31, 5, 16, 16), "bfloat16"),
    Case((1, 31, 1, 9, 30), "float32", _EVERY),
    *(Case((3, 67, 5, 32, 32), dtype) for dtype in BOUNDS),
    Case((2, 67, 1, 48, 12), "bfloat16", _EVERY),
    *(Case((1, 129, 5, 64, 64), dtype, _EVERY, 64) for dtype in BOUNDS),
    Case((2, 129, 1, 50, 100), "bfloat16", _EVERY),
    *(Case((1, 67, 1, 128, 128), dtype) for dtype in BOUNDS),
    Case((1, 31, 1, 128, 4), "float32", _EVERY),
    # Many heads, so that blocks share a thread block.
    Case((3, 67, 67, 32, 32), "bfloat16", _EVERY),
    # So many that blocks have some states in device memory: in bfloat16 those with 99 KB of shared
    # memory, in float32 those with 227 KB too.
    *(Case((8, 31, 40, 64, 64), dtype, _EVERY) for dtype in BOUNDS),
    *(Case(_SMALL, "float32", (option,), 16) for option in _SHORT),
    *(Case(_SMALL, dtype, (*_EVERY, "linear_state"), 16) for dtype in BOUNDS),
    # Cases that share a compilation for each dtype.
    *(Case(_SMALL, dtype, _EVERY, 16) for dtype in BOUNDS),
    *(Case(_SMALL, dtype, _EVERY, 16, extreme) for dtype in BOUNDS for extreme in _EXTREMES),
)
QUICK = (
    Case((1, 1, 1, 4, 4), "float32"),
    Case((3, 67, 5, 32, 32), "bfloat16"),
    *(Case(_SMALL, dtype, _EVERY, 16) for dtype in BOUNDS),
    *(Case(_SMALL, "float32", _EVERY, 16, extreme) for extreme in _EXTREMES),
)


def run_checks(
    implementations: Sequence[str] | None = None,
    quick: bool = False,
    report: Callable[[str], object] = print,
) -> list[Result]:
    """Checks each implementation on each case: results and gradients against `reference`, bitwise
    equality of two runs, NaN and inf; with "mosaic_gpu" the other kernels of a layer too.

    Args:
        implementations: names in `e88_jax.recurrence`; None is all of them.
        quick: a few cases instead of all.
        report: called with each line of the table as soon as it is known.

    Returns:
        One result for each implementation and case. `Result.refusal` tells what an implementation
        does not take, which is no failure.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown implementation, or none.
    """
    known = tuple(recurrence.IMPLEMENTATIONS)
    if implementations is None:
        implementations = known
    given: Any = implementations
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"implementations must be a list of names, got {shown(given)}.")
    if not given:
        raise ValueError(f"implementations must be at least one of {', '.join(known)}; got none.")
    names = [require_choice("implementations", name, known) for name in implementations]
    quick = require_bool("quick", quick)
    if not callable(report):
        raise TypeError(f"report must be a function of a line, got {shown(report)}.")
    cases: dict[str, Sequence[Case | LayerCase]] = dict.fromkeys(names, QUICK if quick else FULL)
    if "mosaic_gpu" in cases:
        others = selfcheck_layers.QUICK if quick else selfcheck_layers.FULL
        cases["mosaic_gpu"] = *cases["mosaic_gpu"], *others
    name_width = max(len("implementation"), *map(len, names))
    case_width = max(len(str(case)) for own in cases.values() for case in own)

    def show(*columns: str) -> None:
        name, case, worst, ratio, bound, verdict = columns
        report(
            f"{name:{name_width}}  {case:{case_width}}  {worst:15}  {ratio:>7}  {bound:>7}  "
            f"{verdict}".rstrip()
        )

    show("implementation", "case", "worst", "ratio", "bound", "")
    results: list[Result] = []
    for name in names:
        of_recurrence = _evaluator(name)
        waiting: list[Result] = []  # refusals, one line if there is nothing else
        for case in cases[name]:
            is_layer = isinstance(case, LayerCase)
            evaluate = selfcheck_layers.evaluate if is_layer else of_recurrence
            waiting.append(_check(name, evaluate, case))
            results.append(waiting[-1])
            if waiting[-1].refusal is None:
                for result in waiting:
                    show(*_columns(result))
                waiting = []
        if len(waiting) == len(cases[name]):
            report(f"{name:{name_width}}  {_NOT_AVAILABLE}: {waiting[0].refusal}")
        else:
            for result in waiting:
                show(*_columns(result))
    return results


_NOT_AVAILABLE = "not available here"


def _columns(result: Result) -> tuple[str, ...]:
    ratio, bound = "", ""
    if result.ratio is not None:
        ratio, bound = f"{result.ratio:.1e}", f"{BOUNDS[result.case.dtype]:.1e}"
    verdict = "OK"
    if result.refusal is not None:
        verdict = f"refused: {result.refusal}"
    elif result.failures:
        verdict = f"FAIL: {'; '.join(result.failures)}"
    return result.implementation, str(result.case), result.worst, ratio, bound, verdict


def _summary(results: list[Result]) -> str:
    """Counts of each implementation, in one line."""
    parts: list[str] = []
    for name in dict.fromkeys(result.implementation for result in results):
        own = [result for result in results if result.implementation == name]
        refused = sum(result.refusal is not None for result in own)
        failed = sum(bool(result.failures) for result in own)
        counts = f"{len(own) - refused - failed} passed, {failed} failed, {refused} refused"
        parts.append(f"{name} {_NOT_AVAILABLE if refused == len(own) else counts}")
    return "; ".join(parts)


def make_inputs(case: Case) -> Arrays:
    """Random inputs of the case, and cotangents `d_out` and `d_final_state`, in float64.

    q, k, v and d_out are rounded to the case's dtype, the rest to float32. Values are small enough
    to keep the tanh away from saturation, where gradients vanish and errors hide.
    """
    batch, time_, heads, n_state, n_value = case.shape
    rng = np.random.default_rng(case.shape)
    per_step = (batch, time_, heads)

    def unit(*shape: int) -> np.ndarray:
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    inputs = {
        "q": unit(*per_step, n_state),
        "k": unit(*per_step, n_state),
        "v": 0.6 * rng.normal(size=(*per_step, n_value)),
        "decay": rng.uniform(0.8, 1.0, per_step),
        "write_gate": rng.uniform(0.3, 1.0, per_step),
        "initial_state": rng.uniform(-0.6, 0.6, (batch, heads, n_state, n_value)),
        # An id that comes back starts a new document all the same.
        "segment_ids": np.cumsum(rng.random((batch, time_)) < 0.1, axis=1) % 3,
        "d_out": rng.normal(size=(*per_step, n_value)),
        "d_final_state": rng.normal(size=(batch, heads, n_state, n_value)),
    }
    if case.extreme == "decay 0 and 1":
        inputs["decay"][:, ::4], inputs["decay"][:, 1::4] = 0.0, 1.0
    elif case.extreme == "zero keys":
        inputs["k"][:] = 0.0
    elif case.extreme == "inputs of 1e4":
        for name in ("q", "k", "v", "initial_state"):
            inputs[name] *= 1e4
    return {
        name: np.asarray(jnp.asarray(x, dtype_of(name, case))).astype(np.float64)
        for name, x in inputs.items()
        if name not in _EVERY or name in case.options
    }


def dtype_of(name: str, case: Case) -> str:
    """Dtype in which an array of `make_inputs` is given."""
    if name == "segment_ids":
        return "int32"
    return case.dtype if name in ("q", "k", "v", "d_out") else "float32"


def reference(inputs: Arrays, linear_state: bool) -> Arrays:
    """Results and gradients by `naive`.

    Args:
        inputs: as `make_inputs` makes them.
        linear_state: leave out the tanh.

    Returns:
        `out`, `final_state`, and `d_x` for each differentiable input x that is given.
    """
    arrays = {name: x for name, x in inputs.items() if not name.startswith("d_")}
    x = naive.Inputs(**arrays, linear_state=linear_state)  # pyright: ignore[reportArgumentType]
    result = naive.run(x)
    d = naive.gradients(x, inputs["d_out"], inputs["d_final_state"])._asdict()
    results = {"out": result.out, "final_state": result.final_state}
    return results | {f"d_{name}": d[name] for name in arrays if d.get(name) is not None}


@functools.cache
def _inputs_and_reference(case: Case | LayerCase) -> tuple[Arrays, Arrays]:
    if isinstance(case, LayerCase):
        inputs = selfcheck_layers.make_inputs(case)
        return inputs, selfcheck_layers.reference(inputs, case)
    inputs = make_inputs(case)
    return inputs, reference(inputs, "linear_state" in case.options)


def _evaluator(name: str) -> Callable[[Arrays, Case], Arrays]:
    """Results and gradients by the implementation; compiled once for cases alike."""

    @functools.partial(jit, static_argnames=("linear_state", "saved_state_interval"))
    def run(
        arrays: dict[str, jax.Array],
        segment_ids: jax.Array | None,
        cotangents: tuple[jax.Array, jax.Array],
        **options: Any,
    ) -> dict[str, jax.Array]:
        def f(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return recurrence.e88_recurrence(
                **arrays,
                segment_ids=segment_ids,
                implementation=name,  # pyright: ignore[reportArgumentType]
                **options,
            )

        (out, final_state), pullback = vjp(f, arrays)
        d_arrays: dict[str, jax.Array] = pullback(cotangents)[0]
        return {"out": out, "final_state": final_state} | {f"d_{x}": d_arrays[x] for x in d_arrays}

    def evaluate(inputs: Arrays, case: Case) -> Arrays:
        arrays = {x: jnp.asarray(inputs[x], dtype_of(x, case)) for x in inputs}
        segment_ids = arrays.pop("segment_ids", None)
        cotangents = arrays.pop("d_out"), arrays.pop("d_final_state")
        results = run(
            arrays,
            segment_ids,
            cotangents,
            linear_state="linear_state" in case.options,
            saved_state_interval=case.saved_state_interval,
        )
        return {x: np.asarray(results[x]) for x in results}

    return evaluate


def _check(name: str, evaluate: Callable[[Arrays, Any], Arrays], case: Case | LayerCase) -> Result:
    inputs, expected = _inputs_and_reference(case)
    try:
        first, second = evaluate(inputs, case), evaluate(inputs, case)
    except NotImplementedError as error:
        return Result(name, case, refusal=_one_line(error))
    except Exception as error:  # whatever a compiler or a driver raises is a finding
        return Result(name, case, failures=(f"{type(error).__name__}: {_one_line(error)}",))
    not_finite = [x for x in expected if not np.all(np.isfinite(first[x]))]
    changed = [x for x in expected if first[x].tobytes() != second[x].tobytes()]
    failures = [f"NaN or inf in {', '.join(not_finite)}"] if not_finite else []
    failures += [f"two runs differ in {', '.join(changed)}"] if changed else []
    if case.extreme == "inputs of 1e4":  # so saturated that nothing is left to compare
        return Result(name, case, failures=tuple(failures))
    ratios = {x: naive.rms_ratio(first[x], expected[x]) for x in expected}
    bound = BOUNDS[case.dtype]
    failures += [f"{x} is off by {ratio:.1e}" for x, ratio in ratios.items() if ratio > bound]
    worst = max(ratios, key=lambda x: np.nan_to_num(ratios[x], nan=np.inf))
    return Result(name, case, worst=worst, ratio=ratios[worst], failures=tuple(failures))


def _record(device: target.Target, results: list[Result], report: Callable[[str], object]) -> None:
    """Notes that the kernels have passed here, if they have."""
    if not any(x.implementation == "mosaic_gpu" and x.refusal is None for x in results):
        return
    try:
        checked_here.record(device)
    except OSError as error:
        report(f"Not noted in {checked_here.file()}: {error}.")
    else:
        report(f"The kernels have been run here, with JAX {jax.__version__}: no more warnings.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main(args: Sequence[str] | None = None) -> int:
    """Runs the checks that the command line asks for; returns the exit code."""
    known = list(recurrence.IMPLEMENTATIONS)
    parser = argparse.ArgumentParser(
        prog="python -m e88_jax.selfcheck",
        description="Checks every implementation of the recurrence on this machine: results and "
        "gradients against a float64 loop, the same bits from two runs, no NaN or inf from extreme "
        "inputs. The other kernels of a layer are checked with mosaic_gpu.",
        epilog="Exits with 1 if a check fails or nothing could be checked, with 0 otherwise. An "
        "implementation that this machine lacks, or a call that one does not take, is listed and "
        "is no failure. In the table, gate, state, ids and linear are the options write_gate, "
        "initial_state, segment_ids and linear_state; the ratio is ||x - reference|| / "
        "||reference|| of the result or gradient x where it is largest.",
    )
    parser.add_argument(
        "--implementation",
        action="append",
        choices=known,
        metavar="NAME",
        help=f"check this one only: {' or '.join(known)}; may be given several times",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, in seconds")
    options = parser.parse_args(args)

    began = time.perf_counter()
    report = functools.partial(print, flush=True)
    device = target.current()
    packages = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ("jax", "jaxlib"))
    report(f"{device.platform} {device.name}, {packages}\n")
    if sentence := checked_here.only_compiled(device):
        report(f"{sentence} This runs them.\n")
    results = run_checks(options.implementation, options.quick, report)
    failed = any(result.failures for result in results)
    checked = any(result.refusal is None for result in results)
    verdict = "FAIL" if failed else "OK" if checked else "NOTHING CHECKED"
    report(f"\n{verdict} in {time.perf_counter() - began:.0f} s: {_summary(results)}")
    if sentence is not None and not options.quick and not failed:
        _record(device, results, report)
    return 0 if checked and not failed else 1


if __name__ == "__main__":
    command.run(main, prog="e88_jax.selfcheck")
