"""The recurrence and its gradients as loops over time in NumPy, float64, from the formulas alone.

`selfcheck` and the tests compare every implementation with it. Imports no JAX.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray


class Inputs(NamedTuple):
    """Arguments of `e88_recurrence`, or the gradients of its arrays."""

    q: Array  # [B, T, H, N]
    k: Array  # [B, T, H, N]
    v: Array  # [B, T, H, V]
    decay: Array  # [B, T, H]
    write_gate: Array | None = None  # [B, T, H]
    initial_state: Array | None = None  # [B, H, N, V]
    segment_ids: Array | None = None  # [B, T]
    linear_state: bool = False


class Step(NamedTuple):
    """Inputs of one step, or their gradients, for any number of heads and rows."""

    q: Array  # [..., N]
    k: Array  # [..., N]
    v: Array  # [..., V]
    decay: Array  # [...]
    write_gate: Array  # [...]


class Result(NamedTuple):
    out: Array  # [B, T, H, V]
    final_state: Array  # [B, H, N, V]
    states: list[tuple[Array, Array]]
    """The state `[B, H, N, V]` before and after each step."""


def step(S: Array, x: Step, linear_state: bool) -> tuple[Array, Array]:
    """The state `[..., N, V]` after a step from S, and its output `[..., V]`."""
    d = x.write_gate[..., None] * (x.v - _read(S, x.k))
    P = x.decay[..., None, None] * S + _outer(x.k, d)
    after = P if linear_state else np.tanh(P)
    return after, _read(after, x.q)


def step_gradient(
    before: Array, after: Array, x: Step, linear_state: bool, d_out: Array, dS: Array
) -> tuple[Step, Array]:
    """The gradients of `step`: of its inputs and of the state before it.

    Args:
        before, after: the state before the step, and after it.
        x, linear_state: arguments of the step.
        d_out: gradient of its output.
        dS: gradient of the state after the step, from later steps.
    """
    beta = x.write_gate[..., None]
    delta = x.v - _read(before, x.k)
    dS = dS + _outer(x.q, d_out)
    dP = dS if linear_state else dS * (1 - after**2)
    e = _read(dP, x.k)
    d = Step(
        q=_along(after, d_out),
        k=_along(dP, beta * delta) - _along(before, beta * e),
        v=beta * e,
        decay=np.sum(dP * before, axis=(-2, -1)),
        write_gate=np.sum(e * delta, axis=-1),
    )
    return d, x.decay[..., None, None] * dP - _outer(x.k, beta * e)


def run(inputs: Inputs) -> Result:
    """The recurrence over all steps."""
    batch, time, heads, n_state = inputs.q.shape
    state = np.zeros((batch, heads, n_state, inputs.v.shape[-1]))
    if inputs.initial_state is not None:
        state = np.asarray(inputs.initial_state, np.float64)
    out = np.zeros(inputs.v.shape)
    states: list[tuple[Array, Array]] = []
    for t in range(time):
        before = state * _goes_on(inputs, t)
        state, out[:, t] = step(before, _step_of(inputs, t), inputs.linear_state)
        states.append((before, state))
    return Result(out, state, states)


def gradients(inputs: Inputs, d_out: Array, d_final_state: Array) -> Inputs:
    """Gradients of `sum(out * d_out) + sum(final_state * d_final_state)`; None for arrays that are
    None or not differentiable."""
    states, dS = run(inputs).states, np.asarray(d_final_state, np.float64)
    steps: list[Step] = []
    for t in reversed(range(inputs.q.shape[1])):
        x = _step_of(inputs, t)
        d, dS = step_gradient(*states[t], x, inputs.linear_state, d_out[:, t], dS)
        dS = dS * _goes_on(inputs, t)
        steps.insert(0, d)
    d = Step(*(np.stack(x, axis=1) for x in zip(*steps, strict=True)))
    return Inputs(
        *d[:4],
        write_gate=None if inputs.write_gate is None else d.write_gate,
        initial_state=None if inputs.initial_state is None else dS,
    )


def _step_of(inputs: Inputs, t: int) -> Step:
    beta = np.ones_like(inputs.decay) if inputs.write_gate is None else inputs.write_gate
    arrays = inputs.q, inputs.k, inputs.v, inputs.decay, beta
    return Step(*(np.asarray(x[:, t], np.float64) for x in arrays))


def _goes_on(inputs: Inputs, t: int) -> Array:
    """`[B, 1, 1, 1]`: 0 where step t starts a document."""
    ids = inputs.segment_ids
    same = np.ones(len(inputs.q), bool) if ids is None or t == 0 else ids[:, t] == ids[:, t - 1]
    return same.astype(np.float64)[:, None, None, None]


def _outer(x: Array, y: Array) -> Array:
    return x[..., :, None] * y[..., None, :]


def _read(S: Array, key: Array) -> Array:
    """S^T key."""
    return np.einsum("...nv,...n->...v", S, key)


def _along(S: Array, value: Array) -> Array:
    """S value."""
    return np.einsum("...nv,...v->...n", S, value)


def rms_ratio(x: ArrayLike, reference: ArrayLike) -> float:
    """`||x - reference|| / ||reference||` over the whole tensor; 0 where both are zeros."""
    reference = np.asarray(reference, np.float64)
    error = np.linalg.norm(np.asarray(x).astype(np.float64) - reference)
    scale = np.linalg.norm(reference)
    if scale == 0:  # such as decay's gradient where the state before is zero
        return 0.0 if error == 0 else np.inf
    return float(error / scale)
