"""The lane programs of the backward kernel in NumPy, against a loop in float64."""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from e88_jax.naive import rms_ratio
from pallas_kernels.common.lane_ops import LaneOps, _Address
from pallas_kernels.common.sizes import round_up
from pallas_kernels.recurrence import backward_block
from pallas_kernels.recurrence.backward_lanes import (
    StepKind,
    add_d_keys,
    add_scalars,
    backpropagate,
    backpropagate_and_replay,
    replay,
)
from pallas_kernels.recurrence.mma_fragments import MMA_STEPS, Fragments, fragment_layout
from pallas_kernels.recurrence.scratch import backward_scratch
from pallas_kernels.recurrence.tuning_config import TuningConfig
from tests.reference.lane_ops_in_numpy import THREADS, NumpyLaneOps, lane_ops, memory

Arrays = dict[str, np.ndarray]
EVERY_OPTION = StepKind(has_write_gate=True, has_keep=True, has_live=True, linear_state=False)
# Bounds of ||x - reference|| / ||reference||, per tensor.
EXACT = 2e-5
TF32 = 1e-3
"""Results in float32 of mmas in tf32, which truncates by at most 2^-10."""
BFLOAT16 = 2.6e-3
"""Results rounded to bfloat16, and sums over columns of such numbers."""
D_DECAY = 4e-3
"""A sum over a whole state of terms that cancel, from states in bfloat16."""

over_dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def make_inputs(n: int, heads: int, values: int, keys: int, kind: StepKind, dtype: Any) -> Arrays:
    rng = np.random.default_rng([n, heads, values, keys])

    def unit(*shape: int) -> np.ndarray:
        x = rng.normal(size=shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)

    # Documents start every third step, in neighbouring heads at different ones.
    keep = np.add.outer(-np.arange(heads), np.arange(n)) % 3 != 1
    decay = rng.uniform(0.8, 1.0, (heads, n))
    scalars = [np.where(keep, decay, 0.0) if kind.has_keep else decay]
    if kind.has_write_gate:
        scalars.append(rng.uniform(0.3, 1.0, (heads, n)))
    if kind.has_keep:
        scalars.append(keep)
    # The row ends before the last third of the steps, of which the op has only zeros.
    live = np.arange(n) < n - n // 3 if kind.has_live else np.full(n, True)
    if kind.has_live:
        scalars.append(np.broadcast_to(live, (heads, n)))
    inputs = {
        "q": unit(n, heads, keys),
        "k": unit(n, heads, keys),
        "scalars": np.stack(scalars, axis=1).astype(np.float32),
        "delta": rng.normal(scale=0.6, size=(n, heads, values)).astype(np.float32),
        "d_out": rng.normal(size=(n, heads, values)).astype(dtype),
        "state": rng.uniform(-0.6, 0.6, (heads, values, keys)).astype(np.float32),
        "d_state": rng.normal(size=(heads, values, keys)).astype(np.float32),
    }
    for name in ("q", "k", "delta", "d_out"):
        inputs[name][~live] = 0
    return inputs


def expected(inputs: Arrays, kind: StepKind) -> Arrays:
    """Correct results; states before each step in the dtype that they are stored in."""
    x = {name: value.astype(np.float64) for name, value in inputs.items()}
    n = len(x["k"])
    scalars = list(x["scalars"].transpose(1, 2, 0)[..., None])  # of each [n, heads, 1]
    decay, ones = scalars.pop(0), np.ones((n, 1, 1))
    gate = scalars.pop(0) if kind.has_write_gate else ones
    keep = scalars.pop(0) if kind.has_keep else ones
    live = scalars.pop(0) > 0 if kind.has_live else ones > 0
    corrections = gate * x["delta"]

    state, before = x["state"], []
    for t in range(n):
        before.append(state.astype(inputs["k"].dtype).astype(np.float64))
        new = decay[t, ..., None] * state + corrections[t, ..., None] * x["k"][t, :, None]
        new = new if kind.linear_state else np.tanh(new)
        state = np.where(live[t, ..., None], new, state)

    d, after = x["d_state"], state
    rows: list[Any] = []
    for t in reversed(range(n)):
        k, d_out = x["k"][t, :, None], x["d_out"][t, ..., None]
        d_q = np.sum(after * d_out, axis=1)
        d = d + d_out * x["q"][t, :, None]
        d_sum = d if kind.linear_state else d * (1 - after**2)
        d_correction = np.sum(d_sum * k, axis=2)
        d_v = gate[t] * d_correction
        d_read = (-keep[t] * d_v)[..., None]
        d_k = np.sum(before[t] * d_read + d_sum * corrections[t, ..., None], axis=1)
        d_scalars = [np.sum(d_sum * before[t], axis=(1, 2))]
        if kind.has_write_gate:
            d_scalars.append(np.sum(d_correction * x["delta"][t], axis=1))
        rows.insert(0, (d_q, d_k, d_v, np.stack(d_scalars)))
        d = np.where(live[t, ..., None], decay[t, ..., None] * d_sum + d_read * k, d)
        after = before[t]
    d_q, d_k, d_v, d_scalars = (np.stack(row) for row in zip(*rows, strict=True))
    results = {"state": state, "d_state": d, "d_q": d_q, "d_k": d_k, "d_v": d_v}
    results["d_decay"] = d_scalars[:, 0]
    if kind.has_write_gate:
        results["d_write_gate"] = d_scalars[:, 1]
    return results | {f"before step {t}": x for t, x in enumerate(before)}


def held_by_threads(layout: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`[thread, register, element]`: which element of an array it is, by a layout of Mosaic GPU."""
    x = np.arange(math.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        outer, inner = x.shape[: -len(tile)], x.shape[-len(tile) :]
        x = x.reshape(
            *outer, *(n for size, t in zip(inner, tile, strict=True) for n in (size // t, t))
        )
        n = len(outer)
        x = x.transpose(*range(n), *range(n, x.ndim, 2), *range(n + 1, x.ndim, 2))
    dims = *layout.warp_dims, *layout.lane_dims
    x = np.moveaxis(x, (*dims, layout.vector_dim), (*range(len(dims)), -1))
    return x.reshape(THREADS, -1, x.shape[-1])


def places_of(f: Fragments, shape: tuple[int, int, int]) -> np.ndarray:
    """`[n-tile, m, column, thread]`: which element of a state it is, as the kernel unpacks one."""
    held = held_by_threads(fragment_layout(*shape).to_mgpu(), shape)
    registers = SimpleNamespace(flat=[list(x) for x in held.transpose(1, 2, 0)])
    state: Any = SimpleNamespace(registers=registers)
    with mock.patch.object(backward_block, "elements_of", list):
        return np.array(backward_block.unpacked(f, state))


def lanes_of(
    f: Fragments, shape: tuple[int, int, int]
) -> tuple[Callable[[np.ndarray], Any], Callable[[Any], np.ndarray]]:
    """From a state to its fragments, and back."""
    places = places_of(f, shape)

    def to_lanes(state: np.ndarray) -> list[list[list[np.ndarray]]]:
        return [[list(pair) for pair in unit] for unit in state.reshape(-1)[places]]

    def from_lanes(fragments: Any) -> np.ndarray:
        state = np.full(shape, np.nan)
        state.reshape(-1)[places] = fragments
        return state

    return to_lanes, from_lanes


def run(inputs: Arrays, kind: StepKind, dtype: Any, unroll: int, pipelined: bool) -> Arrays:
    """Results of the programs, called as the kernel does.

    If `pipelined`, the same steps are replayed again during backpropagation, into other memory.
    """
    n, heads, keys = inputs["k"].shape
    shape = heads, inputs["delta"].shape[2], keys
    n_scalars = 1 + kind.has_write_gate
    w = lane_ops()
    f = Fragments(w, *shape, exact=dtype == jnp.float32)
    to_lanes, from_lanes = lanes_of(f, shape)

    def empty(*shape: int, dtype: Any = np.float32) -> Any:
        return memory(np.full(shape, np.nan, dtype))

    given = {name: memory(x) for name, x in inputs.items()}
    of_kernel = backward_scratch(
        TuningConfig(*shape[:2], chunk=8),
        keys,
        inputs["scalars"].shape[1],
        kind.has_write_gate,
        dtype,
    )
    # A row more than there is room for shows what is written past the last.
    states = empty(round_up(n, MMA_STEPS) + 1, *shape, dtype=dtype)
    d_v = empty(n + 1, *shape[:2], dtype=dtype)
    d_keys = empty(2, n + 1, heads, keys, dtype=dtype)
    d_scalars = empty(n_scalars, n + 1, heads)
    partial_scalars = empty(n_scalars, n + 1, *of_kernel["partial_scalars"].shape[2:])

    state = to_lanes(inputs["state"])
    of_replay = {name: given[name] for name in ("k", "delta", "scalars")}
    of_replay["states"] = states[:n]
    after = replay(f, kind, of_replay, state, n, unroll)
    actual = {"state": from_lanes(after)}

    d, stop = to_lanes(inputs["d_state"]), n
    replayed, n_replayed = state, 0
    sums = {half: empty(4, keys // 16, 32, 4) for half in (False, True)}
    earlier_d_keys = empty(2, MMA_STEPS, heads, keys, dtype=dtype)
    states_again = empty(round_up(n, MMA_STEPS) + 1, *shape, dtype=dtype)
    while stop:
        first = (stop - 1) // MMA_STEPS * MMA_STEPS
        rows = slice(first, stop)
        at = {
            **{name: given[name][rows] for name in ("k", "q", "delta", "d_out")},
            "scalars": given["scalars"][:, :, rows],
            "states": states[first : first + MMA_STEPS],
            "d_v": d_v[rows],
            "d_keys": d_keys[:, rows],
            "partial_scalars": partial_scalars[:, rows],
        }
        if pipelined:
            others = slice(n_replayed, n_replayed + stop - first)
            of_others = {
                **{name: given[name][others] for name in ("k", "delta")},
                "scalars": given["scalars"][:, :, others],
                "states": states_again[others],
            }
            half = first % (2 * MMA_STEPS) == 0
            at |= {
                "sums": sums[half],
                "earlier_sums": sums[not half],
                "earlier_d_keys": earlier_d_keys,
            }
            d, after, replayed = backpropagate_and_replay(
                f, kind, at, of_others, d, after, replayed
            )
            n_replayed, earlier_d_keys = others.stop, at["d_keys"]
        else:
            d, after = backpropagate(f, kind, at, d, after, stop - first)
        actual[f"before step {first}"] = from_lanes(after)
        stop = first
    actual["d_state"] = from_lanes(d)
    if pipelined:
        actual["state"] = from_lanes(replayed)
        add_d_keys(f, sums[True], earlier_d_keys, MMA_STEPS)
    # The next steps' states overwrite these steps' sums.
    replay(f, kind, of_replay, state, n, unroll)
    if pipelined:
        np.testing.assert_array_equal(states_again.array[:n], states.array[:n])
    w.synchronize()
    add_scalars(f, partial_scalars[:, :n], d_scalars[:, :n])
    assert w.tanhs == (set() if kind.linear_state else {dtype != jnp.float32})

    written = {"d_v": d_v.array}
    written["d_q"], written["d_k"] = d_keys.array
    written |= zip(("d_decay", "d_write_gate"), d_scalars.array, strict=False)
    others = {
        "states": states.array,
        "states again": states_again.array,
        "partial_scalars": partial_scalars.array[0],
    }
    for name, x in (written | others).items():
        assert np.all(np.isnan(x[-1].astype(np.float32))), f"{name}: written past the steps"
    return actual | {name: x[:n] for name, x in written.items()}


def check(
    n: int,
    shape: tuple[int, int, int],
    kind: StepKind,
    dtype: Any,
    unroll: int = 1,
    pipelined: bool = False,
) -> None:
    inputs = make_inputs(n, *shape, kind, dtype)
    require_close(run(inputs, kind, dtype, unroll, pipelined), expected(inputs, kind), dtype)


def require_close(actual: Arrays, wanted: Arrays, dtype: Any) -> None:
    ratios = {name: rms_ratio(x, wanted[name]) for name, x in actual.items()}

    def bound(name: str) -> float:
        if dtype == jnp.float32:
            return EXACT
        if name in ("state", "d_state", "d_write_gate"):
            return TF32
        return D_DECAY if name == "d_decay" else BFLOAT16

    wrong = {name: x for name, x in ratios.items() if not x < bound(name)}
    assert not wrong, f"differ by so much: {wrong}; of {ratios}"


@over_dtypes
@pytest.mark.parametrize("keys", [16, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize(("heads", "values"), [(1, 32), (1, 64), (2, 16), (2, 32), (4, 8), (4, 16)])
def test_sizes(heads: int, values: int, keys: int, dtype: Any) -> None:
    # Every step is live: of the write gate's gradient there are few numbers to compare already.
    kind = dataclasses.replace(EVERY_OPTION, has_live=False)
    check(6, (heads, values, keys), kind, dtype)


@over_dtypes
@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 16, 48)])
def test_pipelined(shape: tuple[int, int, int], n: int, dtype: Any) -> None:
    check(n, shape, EVERY_OPTION, dtype, pipelined=True)


@over_dtypes
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
def test_options(flags: tuple[bool, ...], dtype: Any) -> None:
    check(5, (2, 32, 32), StepKind(*flags), dtype)


@over_dtypes
@pytest.mark.parametrize(
    ("n", "unroll"),
    [(1, 1), (2, 2), (3, 1), (4, 4), (4, 2), (8, 4), (8, 8), (15, 1), (40, 8)],
)
def test_numbers_of_steps(n: int, unroll: int, dtype: Any) -> None:
    check(n, (2, 16, 48), EVERY_OPTION, dtype, unroll)


@over_dtypes
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 32, 64), (2, 16, 48), (4, 8, 32)])
@pytest.mark.parametrize("half", ["second", "first"])
def test_halves_in_place(half: str, shape: tuple[int, int, int], n: int, dtype: Any) -> None:
    """Gradients take the place of q, k and d_out. Of the second half 3 states are held, the first
    in registers; those of the first are in memory where no barrier comes between."""
    kind = dataclasses.replace(EVERY_OPTION, has_live=False)
    inputs = make_inputs(n, *shape, kind, dtype)
    heads, _, keys = shape
    w = lane_ops()
    f = Fragments(w, *shape, exact=dtype == jnp.float32)
    to_lanes, from_lanes = lanes_of(f, shape)
    config = TuningConfig(*shape[:2], chunk=8, states_held=3, copies="async")
    of_kernel = backward_scratch(config, keys, inputs["scalars"].shape[1], True, dtype)

    def empty(*shape: int, dtype: Any = np.float32) -> Any:
        return memory(np.full(shape, np.nan, dtype))

    # A row more than there is room for shows what is written past the last.
    qk = np.full((2, n + 1, heads, keys), np.nan, dtype)
    qk[:, :n] = inputs["q"], inputs["k"]
    d_out = np.full((n + 1, *shape[:2]), np.nan, dtype)
    d_out[:n] = inputs["d_out"]
    of_keys, of_values = memory(qk), memory(d_out)
    states, own_states = empty(4, *shape, dtype=dtype), empty(n + 1, *shape, dtype=dtype)
    partial_scalars = empty(2, n + 1, *of_kernel["partial_scalars"].shape[2:])
    d_scalars = empty(2, n + 1, heads)
    own = {"k": of_keys[1, :n], "delta": memory(inputs["delta"])}
    own |= {"scalars": memory(inputs["scalars"])}

    state, first = to_lanes(inputs["state"]), None
    nothing_held = replay(f, kind, own, state, n, n)
    if half == "first":
        own |= {"own_states": own_states[:n]}
        after = replay(f, kind, own, state, n, n)
        own |= {"states": states[:3]}
    else:
        own |= {"states": states[:3]}
        after, first = replay(f, kind, own, state, n, n, first_held=1), lambda: state
    np.testing.assert_array_equal(from_lanes(nothing_held), from_lanes(after))
    own |= {"q": of_keys[0, :n], "d_out": of_values[:n], "d_v": of_values[:n]}
    own |= {"d_keys": of_keys[:, :n], "partial_scalars": partial_scalars[:, :n]}
    d, before = backpropagate(
        f, kind, own, to_lanes(inputs["d_state"]), after, n, first, in_place=True
    )
    w.synchronize()
    add_scalars(f, partial_scalars[:, :n], d_scalars[:, :n])

    memories = states.array[3], own_states.array[n], partial_scalars.array[:, n]
    for x in (qk[:, n], d_out[n], *memories):
        assert np.all(np.isnan(x.astype(np.float32))), "written past the steps"
    actual = {"d_q": qk[0, :n], "d_k": qk[1, :n], "d_v": d_out[:n]}
    actual |= {"d_decay": d_scalars.array[0, :n], "d_write_gate": d_scalars.array[1, :n]}
    actual |= {"state": from_lanes(after), "d_state": from_lanes(d)}
    require_close(actual | {"before step 0": from_lanes(before)}, expected(inputs, kind), dtype)


def test_numpy_lane_ops_are_called_as_the_real_ones() -> None:
    for name, method in inspect.getmembers(LaneOps, inspect.isfunction):
        if not name.startswith("_"):
            own, real = (inspect.signature(m) for m in (getattr(NumpyLaneOps, name), method))
            assert list(own.parameters) == list(real.parameters), name


def test_what_another_lane_has_read_is_overwritten_after_a_barrier_of_the_warp() -> None:
    for of_next_warp in (False, True):
        w = lane_ops()
        x = memory(np.zeros(THREADS, np.float32))

        def address(lane: Any, w: Any = w) -> Any:
            return w.multiply(w.divide(lane, THREADS)[1], 4)

        words = w.load(x, address(w.add(w.thread, 32 if of_next_warp else 0)), 1)
        other = address(w.bits_xor(w.thread, 1))
        with pytest.raises(AssertionError, match="not synchronized"):
            w.store(x, other, words)
        w.shuffle_xor(words[0], 1)
        with pytest.raises(AssertionError, match="not synchronized"):
            w.store(x, other, words)
        w.synchronize_warp()
        if of_next_warp:
            with pytest.raises(AssertionError, match="not synchronized"):
                w.store(x, other, words)
        else:
            w.store(x, other, words)


def test_addresses_keep_their_constants_apart() -> None:
    """In NumPy addresses are numbers, so that no other test sees these."""
    w = object.__new__(LaneOps)
    row: Any = SimpleNamespace(strides=[64, 4])
    address = w.address(row, 2, 3)
    assert (address.dynamic, address.constant) == (0, 140)
    for total in (w.add(address, 16), w.add(16, address)):
        assert (total.dynamic, total.constant) == (0, 156)
    both = w.add(w.add(_Address(5, 8), 1), _Address(3, 2))
    assert (both.dynamic, both.constant) == (8, 11)
