"""`e88_jax.ops` and their gradients as loops over time in NumPy, float64, from the formulas alone.

    S_t = alpha_t A_t S_{t-1} + beta_t k_t v_t^T      A_t = I - beta_t k_t k_t^T by the delta rule,
    o_t = S_t^T q_t                                   else A_t = I

With G the gradient of S_t, from o_t and from later steps:

    dq = S_t do                     dlog_alpha = alpha <G, A S_{t-1}>
    dv = beta G^T k                 dS_{t-1} = alpha A^T G
    dk = beta G v - beta (dA + dA^T) k          dA = alpha G S_{t-1}^T by the delta rule,
    dbeta = k^T G v - k^T dA k                  else dA = 0
"""

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Tensors = dict[str, Any]


class Heads(NamedTuple):
    """Arguments of one recurrence with a q and a k for each head, or their gradients."""

    q: Array  # [B, T, H, K]
    k: Array  # [B, T, H, K]
    v: Array  # [B, T, H, V]
    log_decay: Array  # [B, T, H]
    write_gate: Array  # [B, T, H]
    initial_state: Array  # [B, H, K, V]


class Rows(NamedTuple):
    """Where a step starts from zeros, and where a row has not ended: `[B, T]` bool."""

    starts: Array
    live: Array


class Run(NamedTuple):
    out: Array  # [B, T, H, V]
    befores: list[Array]
    """The state `[B, H, K, V]` that each step starts from."""
    final_state: Array  # [B, H, K, V]


def rows_of(batch: int, time: int, segment_ids: Any, lengths: Any) -> Rows:
    starts, live = np.zeros((batch, time), bool), np.ones((batch, time), bool)
    for row in range(batch):
        for t in range(time):
            if segment_ids is not None and t:
                starts[row, t] = segment_ids[row][t] != segment_ids[row][t - 1]
            if lengths is not None:
                live[row, t] = t < lengths[row]
    return Rows(starts & live, live)


def transition(x: Heads, t: int, delta_rule: bool) -> Array:
    """A_t, `[B, H, K, K]`."""
    k, beta = x.k[:, t], x.write_gate[:, t, :, None, None]
    eye = np.eye(k.shape[-1])
    return eye - beta * _outer(k, k) if delta_rule else np.broadcast_to(eye, (*k.shape, len(eye)))


def run(x: Heads, rows: Rows, delta_rule: bool) -> Run:
    state = x.initial_state
    out, befores = np.zeros(x.v.shape), []
    for t in range(x.q.shape[1]):
        before = np.where(_of_rows(rows.starts, t), 0, state)
        alpha, beta = np.exp(x.log_decay[:, t]), x.write_gate[:, t]
        decayed = alpha[..., None, None] * (transition(x, t, delta_rule) @ before)
        after = decayed + beta[..., None, None] * _outer(x.k[:, t], x.v[:, t])
        befores.append(before)
        state = np.where(_of_rows(rows.live, t), after, state)
        read = np.einsum("bhkv,bhk->bhv", after, x.q[:, t])
        out[:, t] = np.where(rows.live[:, t, None, None], read, 0)
    return Run(out, befores, state)


def gradients(x: Heads, rows: Rows, delta_rule: bool, d_out: Array, d_final_state: Array) -> Heads:
    """Gradients of `sum(out * d_out) + sum(final_state * d_final_state)`."""
    done = run(x, rows, delta_rule)
    d = Heads(*(np.zeros_like(y) for y in x))
    dS = d_final_state
    for t in reversed(range(x.q.shape[1])):
        q, k, v, d_o, before = x.q[:, t], x.k[:, t], x.v[:, t], d_out[:, t], done.befores[t]
        alpha, beta = np.exp(x.log_decay[:, t]), x.write_gate[:, t]
        A, wide = transition(x, t, delta_rule), alpha[..., None, None]
        after = wide * (A @ before) + beta[..., None, None] * _outer(k, v)
        G = dS + _outer(q, d_o)
        dA = wide * (G @ _transposed(before)) if delta_rule else np.zeros_like(A)
        Gv, both = _times(G, v), dA + _transposed(dA)
        of_step = {
            "q": _times(after, d_o),
            "k": beta[..., None] * (Gv - _times(both, k)),
            "v": beta[..., None] * _times(_transposed(G), k),
            "log_decay": alpha * np.sum(G * (A @ before), axis=(-2, -1)),
            "write_gate": np.sum(k * (Gv - _times(dA, k)), axis=-1),
        }
        for name, gradient in of_step.items():
            live = rows.live[:, t].reshape(-1, *[1] * (gradient.ndim - 1))
            getattr(d, name)[:, t] = np.where(live, gradient, 0)
        earlier = np.where(_of_rows(rows.starts, t), 0, wide * (_transposed(A) @ G))
        dS = np.where(_of_rows(rows.live, t), earlier, dS)
    return d._replace(initial_state=dS)


def gated_delta_rule(
    arrays: Tensors,
    d_out: Array,
    d_final_state: Array,
    segment_ids: Any = None,
    lengths: Any = None,
) -> Tensors:
    """`out`, `final_state` and the gradient `d_x` of each array that is given."""
    arrays = _wide(arrays)
    q, k, v, log_decay, write_gate = (arrays[name] for name in Heads._fields[:5])
    heads = _heads(q, k, v, log_decay, write_gate, arrays.get("initial_state"))
    results, d = _results(heads, True, d_out, d_final_state, segment_ids, lengths)
    groups = arrays["q"].shape[2]
    of_arguments = d._asdict() | {x: _sum_of_groups(getattr(d, x), groups) for x in ("q", "k")}
    return results | {f"d_{name}": of_arguments[name] for name in arrays}


def ssd(
    arrays: Tensors,
    d_out: Array,
    d_final_state: Array,
    segment_ids: Any = None,
    lengths: Any = None,
) -> Tensors:
    """`out`, `final_state` and the gradient `d_x` of each array that is given."""
    arrays = _wide(arrays)
    a, b, c, dt, x = (arrays[name] for name in ("a", "b", "c", "dt", "x"))
    heads = _heads(c, b, x, dt * a, dt, arrays.get("initial_state"))
    results, d = _results(heads, False, d_out, d_final_state, segment_ids, lengths)
    of_arguments = {
        "x": d.v,
        "dt": d.write_gate + d.log_decay * a,
        "a": np.sum(d.log_decay * dt, axis=(0, 1)),
        "b": _sum_of_groups(d.k, b.shape[2]),
        "c": _sum_of_groups(d.q, b.shape[2]),
        "initial_state": d.initial_state,
    }
    return results | {f"d_{name}": of_arguments[name] for name in arrays}


def _wide(arrays: Tensors) -> Tensors:
    return {name: np.asarray(x).astype(np.float64) for name, x in arrays.items()}


def _heads(q: Array, k: Array, v: Array, decay: Array, gate: Array, state: Any) -> Heads:
    """Head h of v has the q and k of head h // R."""
    repeats = v.shape[2] // q.shape[2]
    q, k = (np.repeat(x, repeats, axis=2) for x in (q, k))
    zeros = np.zeros((len(q), v.shape[2], q.shape[-1], v.shape[-1]))
    return Heads(q, k, v, decay, gate, zeros if state is None else state)


def _results(
    x: Heads, delta_rule: bool, d_out: Array, d_final_state: Array, ids: Any, lengths: Any
) -> tuple[Tensors, Heads]:
    rows = rows_of(x.q.shape[0], x.q.shape[1], ids, lengths)
    done = run(x, rows, delta_rule)
    d = gradients(x, rows, delta_rule, d_out, d_final_state)
    return {"out": done.out, "final_state": done.final_state}, d


def _sum_of_groups(x: Array, groups: int) -> Array:
    batch, time, _, n_key = x.shape
    return np.sum(x.reshape(batch, time, groups, -1, n_key), axis=3)


def _of_rows(x: Array, t: int) -> Array:
    return x[:, t, None, None, None]


def _outer(x: Array, y: Array) -> Array:
    return x[..., :, None] * y[..., None, :]


def _times(matrix: Array, x: Array) -> Array:
    return np.einsum("...ij,...j->...i", matrix, x)


def _transposed(matrix: Array) -> Array:
    return np.swapaxes(matrix, -1, -2)
