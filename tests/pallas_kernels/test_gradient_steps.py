"""The programs of the backward kernel, lane by lane, against a loop in float64."""

import inspect
import itertools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_reference import rms_ratio
from warp_in_numpy import THREADS, Memory, WarpInNumpy

from pallas_kernels import backward, steps
from pallas_kernels.fragments import STEPS, Fragments, fragment_layout
from pallas_kernels.geometry import Geometry
from pallas_kernels.gradient_steps import StepKind, pair_keys, replay, walk_back
from pallas_kernels.warp import Warp

Arrays = dict[str, np.ndarray]
EVERY_OPTION = StepKind(has_write_gate=True, has_keep=True, linear_state=False)
# Of ||x - reference|| / ||reference||, per tensor.
EXACT = 2e-5
FLOAT32 = 2e-4
"""Of what is computed in float32 from q and k in bfloat16."""
BFLOAT16 = 4e-3
"""Of what is rounded to bfloat16 itself, or summed from what is."""


class Precision(NamedTuple):
    """The dtypes of inputs and of the gradients of q and k."""

    inputs: Any
    d_keys: Any

    @property
    def exact(self) -> bool:
        return self.inputs == jnp.float32


PRECISIONS = {
    "float32": Precision(jnp.float32, jnp.float32),
    "bfloat16": Precision(jnp.bfloat16, jnp.bfloat16),
    "bfloat16, parts": Precision(jnp.bfloat16, jnp.float32),
}
over_precisions = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


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
    return {
        "q": unit(n, heads, keys),
        "k": unit(n, heads, keys),
        "scalars": np.stack(scalars, axis=1).astype(np.float32),
        "errors": rng.normal(scale=0.6, size=(n, heads, values)).astype(np.float32),
        "d_out": rng.normal(size=(n, heads, values)).astype(dtype),
        "state": rng.uniform(-0.6, 0.6, (heads, values, keys)).astype(np.float32),
        "d_state": rng.normal(size=(heads, values, keys)).astype(np.float32),
    }


def expected(inputs: Arrays, kind: StepKind) -> Arrays:
    """What the programs compute; the states before each step in the dtype that they are kept in."""
    x = {name: value.astype(np.float64) for name, value in inputs.items()}
    n = len(x["k"])
    scalars = list(x["scalars"].transpose(1, 2, 0)[..., None])  # of each [n, heads, 1]
    decay, ones = scalars.pop(0), np.ones((n, 1, 1))
    gate = scalars.pop(0) if kind.has_write_gate else ones
    keep = scalars.pop(0) if kind.has_keep else ones
    corrections = gate * x["errors"]

    state, before = x["state"], []
    for t in range(n):
        before.append(state.astype(inputs["k"].dtype).astype(np.float64))
        state = decay[t, ..., None] * state + corrections[t, ..., None] * x["k"][t, :, None]
        state = state if kind.linear_state else np.tanh(state)

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
            d_scalars.append(np.sum(d_correction * x["errors"][t], axis=1))
        rows.insert(0, (d_q, d_k, d_v, np.stack(d_scalars)))
        d = decay[t, ..., None] * d_sum + d_read * k
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
    """`[unit, m, column, thread]`: which element of a state it is, as the kernel unpacks one."""
    held = held_by_threads(fragment_layout(*shape).to_mgpu(), shape)
    registers = SimpleNamespace(flat=[list(x) for x in held.transpose(1, 2, 0)])
    state: Any = SimpleNamespace(registers=registers)
    with mock.patch.object(steps, "elements_of", list):
        return np.array(steps._unpacked(f, state))


def run(inputs: Arrays, kind: StepKind, precision: Precision, unroll: int, at_once: int) -> Arrays:
    """What the programs compute, called as the kernel does: back over so many steps at once."""
    n, heads, keys = inputs["k"].shape
    shape = heads, inputs["errors"].shape[2], keys
    n_scalars = 1 + kind.has_write_gate
    w = WarpInNumpy()
    f = Fragments(w, *shape, precision.exact)
    places = places_of(f, shape)

    def to_lanes(state: np.ndarray) -> list[list[list[np.ndarray]]]:
        return [[list(pair) for pair in unit] for unit in state.reshape(-1)[places]]

    def from_lanes(fragments: Any) -> np.ndarray:
        state = np.full(shape, np.nan)
        state.reshape(-1)[places] = fragments
        return state

    def empty(*shape: int, dtype: Any = np.float32) -> Memory:
        return Memory(np.full(shape, np.nan, dtype))

    given = {name: Memory(x) for name, x in inputs.items()}
    of_kernel = backward.scratch(
        Geometry(*shape[:2], chunk=8),
        keys,
        inputs["scalars"].shape[1],
        kind.has_write_gate,
        precision.inputs,
        precision.d_keys,
    )
    names = "lane_sums", "partial_sums"
    scratch = {x: empty(*of_kernel[x].shape, dtype=of_kernel[x].dtype) for x in names}
    # A row more than there are steps shows what is written past the last.
    states = empty(n + 1, *shape, dtype=precision.inputs)
    d_v = empty(n + 1, *shape[:2], dtype=precision.inputs)
    d_keys = empty(2, n + 1, heads, keys, dtype=precision.d_keys)
    d_scalars = empty(n_scalars, n + 1, heads)
    pairs = Memory(np.full((n + 1, heads, keys), -1, np.int32))
    if not precision.exact:
        pair_keys(w, given["k"], given["q"], pairs)
        w.synchronize()

    state = to_lanes(inputs["state"])
    of_replay = {name: given[name] for name in ("k", "errors", "scalars")}
    unkept = replay(f, kind, of_replay, state, n, unroll)
    after = replay(f, kind, of_replay | {"states": states[:n]}, state, n, unroll)
    actual = {"state": from_lanes(after)}
    np.testing.assert_array_equal(from_lanes(unkept), actual["state"])

    d, stop = to_lanes(inputs["d_state"]), n
    while stop:
        first = (stop - 1) // at_once * at_once
        rows = slice(first, stop)
        if precision.exact:
            of_keys = {"k": given["k"][rows], "q": given["q"][rows]}
        else:
            of_keys = {"k": pairs[first : stop + 1]}
        memory = {
            **of_keys,
            **scratch,
            "errors": given["errors"][rows],
            "scalars": given["scalars"][:, :, rows],
            "states": states[rows],
            "d_out": given["d_out"][rows],
            "d_v": d_v[rows],
            "d_keys": d_keys[:, rows],
            "d_scalars": d_scalars[:, rows],
        }
        d, after = walk_back(f, kind, memory, d, after, stop - first)
        actual[f"before step {first}"] = from_lanes(after)
        stop = first
    actual["d_state"] = from_lanes(d)
    assert w.tanhs == (set() if kind.linear_state else {not precision.exact})

    written = {"d_v": d_v.array}
    written["d_q"], written["d_k"] = d_keys.array
    written |= zip(("d_decay", "d_write_gate"), d_scalars.array, strict=False)
    for name, x in (written | {"states": states.array}).items():
        assert np.all(np.isnan(x[n].astype(np.float32))), f"{name}: written past the steps"
    return actual | {name: x[:n] for name, x in written.items()}


def check(
    n: int,
    shape: tuple[int, int, int],
    kind: StepKind,
    precision: Precision,
    unroll: int = 1,
    at_once: int = STEPS,
) -> None:
    inputs = make_inputs(n, *shape, kind, precision.inputs)
    actual = run(inputs, kind, precision, unroll, at_once)
    wanted = expected(inputs, kind)
    ratios = {name: rms_ratio(x, wanted[name]) for name, x in actual.items()}

    def bound(name: str) -> float:
        if precision.exact:
            return EXACT
        return FLOAT32 if name in ("state", "d_state", "d_write_gate") else BFLOAT16

    wrong = {name: x for name, x in ratios.items() if not x < bound(name)}
    assert not wrong, f"differ by so much: {wrong}; of {ratios}"


@over_precisions
@pytest.mark.parametrize("keys", [16, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize(("heads", "values"), [(1, 32), (1, 64), (2, 16), (2, 32), (4, 8), (4, 16)])
def test_sizes(heads: int, values: int, keys: int, precision: Precision) -> None:
    check(6, (heads, values, keys), EVERY_OPTION, precision)


@over_precisions
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
def test_options(flags: tuple[bool, bool, bool], precision: Precision) -> None:
    check(5, (2, 32, 32), StepKind(*flags), precision)


@over_precisions
@pytest.mark.parametrize(
    ("n", "unroll", "at_once"),
    [(1, 1, 4), (2, 2, 4), (3, 1, 4), (4, 4, 4), (4, 2, 4), (8, 4, 4), (8, 1, 8), (15, 1, 8)],
)
def test_numbers_of_steps(n: int, unroll: int, at_once: int, precision: Precision) -> None:
    check(n, (2, 16, 48), EVERY_OPTION, precision, unroll, at_once)


@pytest.mark.parametrize(
    ("chunk", "heads", "keys"), [(8, 1, 16), (8, 4, 48), (16, 2, 80), (24, 4, 128)]
)
def test_pair_keys(chunk: int, heads: int, keys: int) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.integers(1, 1 << 16, (2, chunk, heads, keys), np.uint16)
    pairs = np.full((chunk + 1, heads, keys), -1, np.int32)
    of_k, of_q = (Memory(x.view(jnp.bfloat16)) for x in (k, q))
    pair_keys(WarpInNumpy(), of_k, of_q, Memory(pairs))
    bits = pairs.view(np.uint32)
    nothing = np.zeros_like(q[:1])
    np.testing.assert_array_equal(bits >> 16, np.concatenate([k, nothing]))
    np.testing.assert_array_equal(bits & 0xFFFF, np.concatenate([nothing, q]))


def test_the_warp_in_numpy_is_called_as_the_real_one() -> None:
    for name, method in inspect.getmembers(Warp, inspect.isfunction):
        if not name.startswith("_"):
            own, real = (inspect.signature(m) for m in (getattr(WarpInNumpy, name), method))
            assert list(own.parameters) == list(real.parameters), name
