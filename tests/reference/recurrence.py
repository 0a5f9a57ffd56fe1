"""The recurrence and its gradients as a float64 loop in NumPy, one batch row and head at a time.

Written from the formulas alone and sharing nothing with `e88_jax`: what every implementation is
held to.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Inputs(NamedTuple):
    """What the recurrence reads; shapes as `e88_recurrence` takes them."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    decay: np.ndarray
    write_gate: np.ndarray | None = None
    initial_state: np.ndarray | None = None
    segment_ids: np.ndarray | None = None
    linear_state: bool = False


class Result(NamedTuple):
    out: np.ndarray
    final_state: np.ndarray
    before: np.ndarray
    """S_{t-1} as step t reads it (zeros where a document starts), [B, T, H, N, V]."""
    after: np.ndarray
    """S_t, [B, T, H, N, V]."""


def run(inputs: Inputs) -> Result:
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, time, heads, n_state = q.shape
    n_value = v.shape[-1]
    out = np.zeros((batch, time, heads, n_value))
    before = np.zeros((batch, time, heads, n_state, n_value))
    after = np.zeros_like(before)
    final_state = np.zeros((batch, heads, n_state, n_value))
    for b in range(batch):
        for h in range(heads):
            S = np.zeros((n_state, n_value))
            if inputs.initial_state is not None:
                S = np.array(inputs.initial_state[b, h], np.float64)
            for t in range(time):
                if _starts_document(inputs, b, t):
                    S = np.zeros((n_state, n_value))
                before[b, t, h] = S
                read = S.T @ k[b, t, h]
                correction = _beta(inputs, b, t, h) * (v[b, t, h] - read)
                S = inputs.decay[b, t, h] * S + np.outer(k[b, t, h], correction)
                if not inputs.linear_state:
                    S = np.tanh(S)
                after[b, t, h] = S
                out[b, t, h] = S.T @ q[b, t, h]
            final_state[b, h] = S
    return Result(out, final_state, before, after)


def gradients(inputs: Inputs, d_out: np.ndarray, d_final_state: np.ndarray) -> Inputs:
    """Of `sum(out * d_out) + sum(final_state * d_final_state)`; None where the input is None."""
    result = run(inputs)
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, time, heads, _ = q.shape
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    d_decay = np.zeros_like(inputs.decay)
    d_beta = np.zeros_like(inputs.decay)
    d_initial = np.zeros_like(result.final_state)
    for b in range(batch):
        for h in range(heads):
            dS = np.array(d_final_state[b, h], np.float64)
            for t in reversed(range(time)):
                old, new = result.before[b, t, h], result.after[b, t, h]
                beta = _beta(inputs, b, t, h)
                error = v[b, t, h] - old.T @ k[b, t, h]
                dq[b, t, h] = new @ d_out[b, t, h]
                dS = dS + np.outer(q[b, t, h], d_out[b, t, h])
                dP = dS if inputs.linear_state else dS * (1 - new**2)
                e = dP.T @ k[b, t, h]
                d_decay[b, t, h] = np.sum(dP * old)
                d_beta[b, t, h] = np.sum(e * error)
                dv[b, t, h] = beta * e
                dk[b, t, h] = dP @ (beta * error) - old @ (beta * e)
                dS = inputs.decay[b, t, h] * dP - np.outer(k[b, t, h], beta * e)
                if _starts_document(inputs, b, t):
                    dS = np.zeros_like(dS)
            d_initial[b, h] = dS
    return Inputs(
        dq,
        dk,
        dv,
        d_decay,
        write_gate=None if inputs.write_gate is None else d_beta,
        initial_state=None if inputs.initial_state is None else d_initial,
    )


def _starts_document(inputs: Inputs, b: int, t: int) -> bool:
    ids = inputs.segment_ids
    return ids is not None and t > 0 and bool(ids[b, t] != ids[b, t - 1])


def _beta(inputs: Inputs, b: int, t: int, h: int) -> float:
    return 1.0 if inputs.write_gate is None else float(inputs.write_gate[b, t, h])


def rms_ratio(x: ArrayLike, reference: ArrayLike) -> float:
    """`||x - reference|| / ||reference||` over the whole tensor."""
    reference = np.asarray(reference, np.float64)
    difference = np.asarray(x).astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))
