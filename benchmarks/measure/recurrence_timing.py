"""Timing of the recurrence: sizes, inputs, and the programs that are timed."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .timing import ClockSampler, Numbers, time_calls

L2_BYTES = 50 * 2**20
"""L2 cache of an H100 or H200. Inputs must not stay there from one call to the next."""
MAX_INPUT_SETS = 16
PASSES = ("forward", "backward", "forward+backward")
CANNOT_RUN = (NotImplementedError, jax.errors.JaxRuntimeError)
"""Exceptions of a program that is refused, does not compile, or does not fit in memory."""

Recurrence = Callable[..., tuple[jax.Array, jax.Array]]
"""`e88_recurrence` with its options given."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call; N = V."""

    name: str
    B: int
    T: int
    H: int
    N: int

    @property
    def elements(self) -> int:
        """State elements over all steps: B * T * H * N * V."""
        return self.B * self.T * self.H * self.N**2


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_inputs(shape: Shape, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """Normalised q and k, normal v, decay in (0.9, 1), and the gradient of out."""
    keys = jax.random.split(key, 5)
    per_step = (shape.B, shape.T, shape.H)
    q, k, v, d_out = (jax.random.normal(x, (*per_step, shape.N)) for x in keys[:4])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    narrow = {"q": q, "k": k, "v": v, "d_out": d_out}
    decay = jax.random.uniform(keys[4], per_step, minval=0.9, maxval=1.0)
    return {name: x.astype(dtype) for name, x in narrow.items()} | {"decay": decay}


def make_programs(recurrence: Recurrence) -> dict[str, Any]:
    """The programs that are timed: forward, and forward + backward."""

    @jax.jit
    def forward(d_out: jax.Array, **arrays: jax.Array) -> Any:
        del d_out
        return recurrence(**arrays)

    @jax.jit
    def forward_backward(d_out: jax.Array, **arrays: jax.Array) -> Any:
        out, pullback = jax.vjp(lambda arrays: recurrence(**arrays)[0], arrays)
        return out, pullback(d_out)

    return {"forward": forward, "forward+backward": forward_backward}


class Compiled(NamedTuple):
    """A compiled program."""

    program: Callable[..., Any]
    seconds: float
    """Compilation time."""


def compile_passes(
    recurrence: Recurrence, shape: Shape, dtype: str
) -> tuple[dict[str, Compiled], str | None]:
    """The programs that are timed, and what stopped those that are missing."""
    inputs = jax.eval_shape(functools.partial(make_inputs, shape, dtype), jax.random.key(0))
    compiled: dict[str, Compiled] = {}
    try:
        for name, program in make_programs(recurrence).items():
            began = time.perf_counter()
            done = program.lower(**inputs).compile()
            compiled[name] = Compiled(done, round(time.perf_counter() - began, 1))
    except CANNOT_RUN as error:
        return compiled, one_line(error)
    return compiled, None


def time_passes(
    programs: tuple[dict[str, Compiled], str | None],
    shape: Shape,
    dtype: str,
    repetitions: int,
    clock: ClockSampler,
    say: Callable[[str], None],
) -> tuple[dict[str, Numbers], str | None]:
    """Numbers of each pass, and what stopped those that are missing.

    Backward is what the gradients add to the forward pass. `say` hears of each program timed.

    Args:
        programs: as `compile_passes` returns them.
    """
    compiled, stopped_by = programs
    passes: dict[str, Numbers] = {}
    size = 4 * shape.B * shape.T * shape.H * shape.N * jnp.dtype(dtype).itemsize
    n_sets = min(math.ceil(2 * L2_BYTES / size), MAX_INPUT_SETS)
    try:
        input_sets = [make_inputs(shape, dtype, jax.random.key(seed)) for seed in range(n_sets)]
        for name, (program, seconds) in compiled.items():
            passes[name] = time_calls(program, input_sets, repetitions, clock)
            passes[name] |= {"compile_seconds": seconds, "input_sets": n_sets}
            say(f"{name}: {passes[name]['ms']:.3f} ms, compiled in {seconds:.1f} s")
    except CANNOT_RUN as error:
        return passes, one_line(error)
    if stopped_by is not None:
        return passes, stopped_by
    both = passes["forward+backward"]
    ms = round(both["ms"] - passes["forward"]["ms"], 6)
    backward = {"ms": ms, "clock_mhz": both["clock_mhz"]}
    return {name: {"backward": backward, **passes}[name] for name in PASSES}, None


def one_line(error: Exception) -> str:
    """The message of `error`, its line breaks taken out."""
    return " ".join(str(error).split())
