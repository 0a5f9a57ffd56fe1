"""Cost of a state size: the recurrence and one layer's training step at constant d_inner."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

from benchmarks.measure.layer_step import make_layer_step
from benchmarks.measure.recurrence_timing import (
    CANNOT_RUN,
    Shape,
    compile_passes,
    make_inputs,
    one_line,
    time_passes,
)
from benchmarks.measure.timing import ClockSampler, Numbers, time_calls
from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.base import Execution
from e88_jax.recurrence import Implementation, e88_recurrence

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The sizes of n_state to time, and the sizes and options common to them."""

    n_states: tuple[int, ...]
    """Ascending."""
    d_inner: int
    """n_heads * n_state, as nearly as whole heads allow."""
    dim: int
    batch_size: int
    seq_len: int
    dtype: Literal["float32", "bfloat16"]
    implementation: Implementation
    repetitions: int

    def shape(self, n_state: int) -> Shape:
        """Shape of the recurrence; N = V = n_state."""
        heads = max(1, round(self.d_inner / n_state))
        return Shape(f"n_state {n_state}", self.batch_size, self.seq_len, heads, n_state)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Timings of one n_state, and reasons for those that are missing."""

    shape: Shape
    passes: dict[str, Numbers]
    """Passes of the recurrence: forward, backward, forward+backward."""
    training_step: Numbers | None
    missing: dict[str, str]
    """Reason by what is missing: "recurrence" or "training step"."""

    def row(self) -> Row:
        """The derived numbers, flat; None for those that are missing.

        `ps_per_element` is picoseconds for each element of the state at each step, of which there
        are `elements` = B * T * H * N * V. Tokens per second of the recurrence are of forward and
        backward together.
        """
        shape, tokens = self.shape, self.shape.B * self.shape.T

        def ms(name: str) -> float | None:
            return self.passes[name]["ms"] if name in self.passes else None

        def ps_per_element(name: str) -> float | None:
            return _ratio(ms(name), shape.elements / 1e9, 4)

        step_ms = None if self.training_step is None else self.training_step["ms"]
        return {
            "n_state": shape.N,
            "n_heads": shape.H,
            "d_inner": shape.H * shape.N,
            "elements": shape.elements,
            "forward_ms": ms("forward"),
            "backward_ms": ms("backward"),
            "backward_over_forward": _ratio(ms("backward"), ms("forward"), 3),
            "forward_ps_per_element": ps_per_element("forward"),
            "backward_ps_per_element": ps_per_element("backward"),
            "both_ps_per_element": ps_per_element("forward+backward"),
            "recurrence_tokens_per_second": _ratio(1e3 * tokens, ms("forward+backward"), 1),
            "training_step_ms": step_ms,
            "training_step_tokens_per_second": _ratio(1e3 * tokens, step_ms, 1),
            "missing": "; ".join(f"{what}: {why}" for what, why in self.missing.items()) or None,
        }

    def to_dict(self) -> dict[str, Any]:
        """The row, the timings it comes from, and what is missing, for JSON."""
        timings = {**self.passes}
        if self.training_step is not None:
            timings["training step"] = self.training_step
        return {**self.row(), "timings": timings, "missing": self.missing}


def _ratio(over: float | None, under: float | None, digits: int) -> float | None:
    return None if over is None or under is None else round(over / under, digits)


def refusal(implementation: Implementation, dtype: str) -> str | None:
    """Reason for which an implementation does not take `dtype` on this device; None if it does."""
    shape = Shape("", B=1, T=2, H=1, N=32)  # within the limits of every implementation
    inputs = jax.eval_shape(lambda: make_inputs(shape, dtype, jax.random.key(0)))
    del inputs["d_out"]
    try:
        jax.eval_shape(functools.partial(e88_recurrence, implementation=implementation), **inputs)
    except NotImplementedError as error:
        return str(error)
    return None


def measure(
    setting: Setting, n_state: int, clock: ClockSampler, say: Callable[[str], None]
) -> Measurement:
    """Times one n_state; a program that is refused or does not fit is missing from the result.

    Args:
        setting: sizes and options.
        n_state: N = V.
        clock: running.
        say: called with progress.
    """
    shape = setting.shape(n_state)
    missing = {}

    def doing(what: str) -> None:
        say(f"{shape.name} {what}")

    doing("recurrence")
    recurrence = functools.partial(e88_recurrence, implementation=setting.implementation)
    compiled = compile_passes(recurrence, shape, setting.dtype)
    passes, reason = time_passes(compiled, shape, setting.dtype, setting.repetitions, clock, doing)
    if reason is not None:
        missing["recurrence"] = reason
    doing("training step")
    training_step = None
    try:
        training_step = _time_training_step(setting, shape, clock)
    except CANNOT_RUN as error:
        missing["training step"] = one_line(error)
    return Measurement(shape, passes, training_step, missing)


def _time_training_step(setting: Setting, shape: Shape, clock: ClockSampler) -> Numbers:
    model = LMConfig(
        dim=setting.dim,
        depth=1,
        layers=(E88Config(n_heads=shape.H, n_state=shape.N),),
        execution=Execution(dtype=setting.dtype, implementation=setting.implementation),
    )
    step, state, x = make_layer_step(model, shape.B, shape.T)

    def next_step(x: jax.Array) -> Any:
        nonlocal state
        state, loss = step(state, x)
        return state, loss

    return time_calls(next_step, [{"x": x}], setting.repetitions, clock)
