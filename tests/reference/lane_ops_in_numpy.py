"""`LaneOps` in NumPy: lane programs run without a GPU.

A register is an array of one number per thread of a warpgroup: uint32, float32, or bool for a
condition. The threads run in lockstep, which would hide a missing `synchronize`; so it is an error
to read what another thread wrote since the last one, or to overwrite what another has read. What
the lanes of a warp alone have read may be overwritten after `synchronize_warp`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.sizes import THREADS, WARPS

Lanes = np.ndarray
_SEVERAL = THREADS
"""In place of a thread, in what last touched a word."""
_SEVERAL_WARPS = WARPS
"""In place of a warp, in which warp has read a word."""
_IN_FLIGHT = np.iinfo(int).max
"""In place of when a word was written: an asynchronous copy to it has not landed."""


class Memory:
    """An array and slices of it, addressed in bytes from the first element."""

    def __init__(self, array: np.ndarray, whole: "Memory | None" = None) -> None:
        self.array = array
        self.shape, self.itemsize, self.strides = array.shape, array.itemsize, array.strides
        if whole is None:
            self.words = array.reshape(-1).view(np.uint32)
            touched = np.zeros((4, self.words.size), int)  # see `_touch`
        else:
            self.words, touched = whole.words, whole.touched
        self.touched = touched
        self.read, self.written, self.reading_warp, self.warp_barriers = touched
        assert np.shares_memory(array, self.words), "the array must be contiguous"
        self.start = array.ctypes.data - self.words.ctypes.data

    def __getitem__(self, index: Any) -> "Memory":
        return Memory(self.array[index], self)


class NumpyLaneOps:
    """The methods of `LaneOps`, for all warps of a warpgroup at once."""

    def __init__(self) -> None:
        self.warpgroup = self._int(1)
        self.thread = np.arange(THREADS, dtype=np.uint32)
        self.warp, self.lane = self.divide(self.thread, 32)
        self.tanhs: set[bool] = set()
        self._active = np.ones(THREADS, bool)
        self._time = 1  # counts synchronizations
        self._warp_barriers = 0
        self._copies = list[Callable[[], None]]()  # of no group yet
        self._groups = list[list[Callable[[], None]]]()  # not waited for

    def anew(self) -> "NumpyLaneOps":
        return self

    def _int(self, x: Lanes | int) -> Lanes:
        if isinstance(x, int):
            return np.full(THREADS, x & 0xFFFFFFFF, np.uint32)
        return self._of(np.uint32, x)

    def _of(self, dtype: Any, x: Lanes) -> Lanes:
        assert (x.shape, x.dtype) == ((THREADS,), dtype), f"{x.shape} {x.dtype}, not {dtype}"
        return x

    def _float(self, x: Lanes) -> Lanes:
        return self._of(np.float32, x)

    # Integers. Python integers give Python integers.

    def add(self, x: Any, y: Any) -> Any:
        return x + y if isinstance(x, int) and isinstance(y, int) else self._int(x) + self._int(y)

    def multiply(self, x: Any, y: Any) -> Any:
        return x * y if isinstance(x, int) and isinstance(y, int) else self._int(x) * self._int(y)

    def divide(self, x: Any, y: int) -> tuple[Any, Any]:
        if isinstance(x, int):
            return divmod(x, y)
        return self._int(x) // np.uint32(y), self._int(x) % np.uint32(y)

    def minimum(self, x: Any, y: Any) -> Any:
        if isinstance(x, int) and isinstance(y, int):
            return min(x, y)
        return np.minimum(self._int(x), self._int(y))

    def bits_and(self, x: Any, y: Any) -> Lanes:
        return self._int(x) & self._int(y)

    def bits_xor(self, x: Any, y: Any) -> Lanes:
        return self._int(x) ^ self._int(y)

    def shift_left(self, x: Any, n: int) -> Lanes:
        return self._int(x) << np.uint32(n)

    def equal(self, x: Any, y: Any) -> Lanes:
        return self._int(x) == self._int(y)

    def less(self, x: Any, y: Any) -> Lanes:
        return self._int(x) < self._int(y)

    def select(self, condition: Lanes, x: Any, y: Any) -> Lanes:
        x, y = (self._int(x) if isinstance(x, int) else x for x in (x, y))
        return np.where(self._of(bool, condition), x, self._of(x.dtype, y))

    def permute_bytes(self, low: Any, high: Any, selector: Any) -> Lanes:
        source = np.stack([self._int(low), self._int(high)], axis=1).view(np.uint8)
        digits = self._int(selector)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
        assert np.all(digits < 8), "8 to f repeat a sign"
        return np.take_along_axis(source, digits, axis=1).view(np.uint32)[:, 0]

    # Floating point.

    def number(self, x: float) -> Lanes:
        return np.full(THREADS, x, np.float32)

    def as_float(self, bits: Lanes) -> Lanes:
        return self._int(bits).view(np.float32)

    def as_bits(self, x: Lanes) -> Lanes:
        return self._float(x).view(np.uint32)

    def fadd(self, x: Lanes, y: Lanes) -> Lanes:
        return self._float(x) + self._float(y)

    def fmultiply(self, x: Lanes, y: Lanes) -> Lanes:
        return self._float(x) * self._float(y)

    def negative(self, x: Lanes) -> Lanes:
        return -self._float(x)

    def fma(self, x: Lanes, y: Lanes, z: Lanes) -> Lanes:
        x, y, z = (self._float(x).astype(np.float64) for x in (x, y, z))
        return (x * y + z).astype(np.float32)

    def tanh(self, x: Lanes, approximate: bool) -> Lanes:
        """A precise tanh either way: `tanhs` records which were asked for."""
        self.tanhs.add(approximate)
        return np.tanh(self._float(x))

    def maximum(self, x: Lanes, y: Lanes) -> Lanes:
        return np.maximum(self._float(x), self._float(y))

    def exp2(self, x: Lanes) -> Lanes:
        with np.errstate(over="ignore"):
            return np.exp2(self._float(x))

    def reciprocal(self, x: Lanes) -> Lanes:
        return np.float32(1) / self._float(x)

    def rsqrt(self, x: Lanes) -> Lanes:
        return np.float32(1) / np.sqrt(self._float(x))

    def pack_bf16(self, low: Lanes, high: Lanes) -> Lanes:
        low, high = (self._float(x).astype(jnp.bfloat16).view(np.uint16) for x in (low, high))
        return np.stack([low, high], axis=1).view(np.uint32)[:, 0]

    def mma_bf16(self, acc: Sequence[Lanes], a: Sequence[Lanes], b: Lanes) -> list[Lanes]:
        def wide(pairs: Lanes) -> np.ndarray:
            bits = self._int(pairs)
            low, high = bits << np.uint32(16), bits & np.uint32(0xFFFF0000)
            return self._matrix(self.as_float(low), self.as_float(high))

        return self._mma(acc, [wide(x) for x in a], wide(b))

    def mma_tf32(self, acc: Sequence[Lanes], a: Sequence[Lanes], b: Lanes) -> list[Lanes]:
        def cut_off(x: Lanes) -> np.ndarray:
            return self._matrix((self.as_bits(x) & np.uint32(0xFFFFE000)).view(np.float32))

        return self._mma(acc, [cut_off(x) for x in a], cut_off(b))

    def _matrix(self, *columns: Lanes) -> np.ndarray:
        """`[warp, g, 4 n]` of lanes 4 g + c, which hold n neighbouring columns from n c on."""
        return np.stack([self._float(x) for x in columns], axis=1).reshape(4, 8, -1)

    def _mma(self, acc: Sequence[Lanes], a: Sequence[np.ndarray], b: np.ndarray) -> list[Lanes]:
        self._check_convergence()
        rows = np.concatenate(a, axis=1)
        total = np.concatenate([self._matrix(*acc[:2]), self._matrix(*acc[2:])], axis=1)
        total = (total + rows.astype(np.float64) @ b.swapaxes(1, 2)).astype(np.float32)
        return [
            half.reshape(THREADS, 2)[:, i] for half in (total[:, :8], total[:, 8:]) for i in (0, 1)
        ]

    def shuffle_xor(self, x: Lanes, distance: int) -> Lanes:
        self._check_convergence()
        return self._of(x.dtype, x)[self.thread ^ np.uint32(distance)]

    def shuffle_from(self, x: Lanes, lane: int) -> Lanes:
        self._check_convergence()
        return self._of(x.dtype, x)[self.thread // 32 * 32 + lane]

    def _check_convergence(self) -> None:
        by_warp = self._active.reshape(-1, 32)
        assert np.all(by_warp == by_warp[:, :1]), "some lanes of a warp are elsewhere"

    # Memory.

    def address(self, memory: Memory, *index: Any) -> Any:
        address: Any = 0
        for i, stride in zip(index, memory.strides, strict=False):
            address = self.add(self.multiply(i, stride), address)
        return address

    def load(self, memory: Memory, address: Any, n: int) -> list[Lanes]:
        index = self._index(memory, address, n)
        self._touch(memory, index, is_store=False)
        loaded = np.zeros((n, THREADS), np.uint32)
        loaded[:, self._active] = memory.words[index]
        return list(loaded)

    def load_half(self, memory: Memory, address: Any) -> Lanes:
        address = self._int(address) + np.uint32(memory.start)  # of a word from now on
        pair, high = address // np.uint32(4), address // np.uint32(2) % np.uint32(2)
        whole = Memory(memory.words, memory)
        (word,) = self.load(whole, pair * np.uint32(4), 1)
        assert np.all(address[self._active] % 2 == 0), "misaligned"
        return word >> np.uint32(16) * high & np.uint32(0xFFFF)

    def load_where(self, condition: Lanes, memory: Memory, address: Any) -> Lanes:
        loaded: list[Lanes] = []
        self.when(condition, lambda: loaded.extend(self.load(memory, address, 1)))
        return loaded[0]

    def store(self, memory: Memory, address: Any, words: Sequence[Lanes]) -> None:
        index = self._index(memory, address, len(words))
        self._touch(memory, index, is_store=True)
        stored = np.stack([self._of(np.uint32, x) for x in words])[:, self._active]
        memory.words[index] = stored
        assert np.array_equal(memory.words[index], stored), "different words at one address"

    def _index(self, memory: Memory, address: Any, n: int) -> np.ndarray:
        """The words at an address, `[n, active lanes]`."""
        assert n in (1, 2) or n % 4 == 0
        address = self._int(address)[self._active].astype(np.int32) + memory.start
        assert np.all(address % (4 * min(n, 4)) == 0), "misaligned"
        index = address // 4 + np.arange(n)[:, None]
        assert np.all((index >= 0) & (index < memory.words.size)), "out of bounds"
        return index

    def _touch(self, memory: Memory, words: np.ndarray, is_store: bool) -> None:
        """Notes who read or wrote which words, and checks that they were free to."""
        now, now_of_warps = (self._time * (n + 1) for n in (_SEVERAL, _SEVERAL_WARPS))
        me = np.broadcast_to(now + self.thread[self._active], words.shape)
        my_warp = np.broadcast_to(now_of_warps + self.warp[self._active], words.shape)

        def others(last: np.ndarray, me: np.ndarray = me, now: int = now) -> np.ndarray:
            return (last[words] >= now) & (last[words] != me)

        def note(last: np.ndarray, me: np.ndarray, now: int, several: int) -> None:
            before = others(last, me, now)
            last[words] = me
            last[words[before | others(last, me, now)]] = now + several

        if is_store:
            waited = memory.warp_barriers[words] < self._warp_barriers
            free = waited & (memory.reading_warp[words] == my_warp)
            assert not np.any(others(memory.read) & ~free), "not synchronized"
            note(memory.written, me, now, _SEVERAL)
            return
        assert not np.any(others(memory.written)), "not synchronized"
        note(memory.read, me, now, _SEVERAL)
        note(memory.reading_warp, my_warp, now_of_warps, _SEVERAL_WARPS)
        memory.warp_barriers[words] = self._warp_barriers

    def copy_async(self, target: Memory, to: Any, source: Memory, at: Any, size: Any) -> None:
        size = self._int(size)
        index = self._index(target, to, 4)
        self._touch(target, index, is_store=True)
        target.written[index] = _IN_FLIGHT
        own, loaded = self._active, np.zeros((4, THREADS), np.uint32)

        def read() -> None:
            loaded[:] = self.load(source, at, 4)

        self.when(size > 0, read)
        loaded[4 * np.arange(4)[:, None] >= size] = 0
        lanes = np.broadcast_to(self.thread[own], index.shape)

        def land() -> None:
            target.words[index] = loaded[:, own]
            target.written[index] = self._time * (_SEVERAL + 1) + lanes

        self._copies.append(land)

    def end_of_copies(self) -> None:
        assert np.all(self._active), "groups of lanes would differ"
        self._groups.append(self._copies)
        self._copies = []

    def wait_for_copies(self, newer: int) -> None:
        while len(self._groups) > newer:
            for land in self._groups.pop(0):
                land()

    def synchronize(self) -> None:
        assert np.all(self._active), "some threads never come here"
        self._time += 1

    def synchronize_warp(self) -> None:
        self._check_convergence()
        self._warp_barriers += 1

    # Control.

    def loop(self, n: int, carry: Any, body: Callable[[Any, Any], Any]) -> Any:
        for i in range(n):
            carry = body(self._int(i), carry)
        return carry

    def when(self, condition: Lanes, body: Callable[[], None]) -> None:
        outside = self._active
        self._active = outside & self._of(bool, condition)
        body()
        self._active = outside


# What lane programs take, whose types are those of `pallas_kernels.common.lane_ops`.


def memory(array: np.ndarray) -> Any:
    """The array in place of a `Memory`."""
    return Memory(array)


def lane_ops() -> Any:
    """`NumpyLaneOps` in place of `LaneOps`."""
    return NumpyLaneOps()
