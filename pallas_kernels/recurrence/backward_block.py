"""Steps of the backward kernel as functions of a block's state and of references."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels.common.aliases import Interpret, Layout, Ref
from pallas_kernels.common.lane_ops import LaneOps, Memory
from pallas_kernels.common.mosaic import elements_of, inline, load_tiled, store_tiled
from pallas_kernels.recurrence import backward_lanes
from pallas_kernels.recurrence.backward_lanes import LateState, StepKind
from pallas_kernels.recurrence.mma_fragments import MMA_STEPS, Fragments, State, fragment_layout
from pallas_kernels.recurrence.tuning_config import TuningConfig


def block_steps(
    kind: StepKind, config: TuningConfig, keys: int, exact: bool, interpret: Interpret
) -> "BlockSteps":
    """The steps of a block of this config; under the interpreter, in terms of arrays."""
    if interpret is None:
        return BlockSteps(kind, config, keys, exact)
    from pallas_kernels.interpreter.recurrence import ArraySteps

    return ArraySteps(kind, config, keys, exact)


@dataclasses.dataclass(frozen=True)
class BlockSteps:
    """The lane programs of `backward_lanes` on a block's state `[heads, values, keys]`.

    Attributes:
        exact: float32 throughout, and a precise tanh.
    """

    kind: StepKind
    config: TuningConfig
    keys: int
    exact: bool

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.config.heads, self.config.values, self.keys

    @property
    def is_short_of_registers(self) -> bool:
        return self.config.is_short_of_registers(self.keys)

    @property
    def _layout(self) -> Layout:
        return fragment_layout(*self._shape)

    def load(self, ref: Ref) -> Array:
        """A state in registers, in the dtype of `ref`."""
        return load_tiled(ref, self._layout)

    def store(self, ref: Ref, state: Array) -> None:
        store_tiled(ref, state, self._layout)

    def replay(self, n: int, state: Array, **refs: Ref) -> Array:
        """The state after n steps.

        Args:
            k: `[n, heads, keys]`.
            scalars: `[heads, scalars, n]`.
            delta: `[n, heads, values]` float32.
            states: the states before each step, without the first if the config has that in
                registers, written, each lane's in an order of its own; left out if none are held.
            own_states: in place of `states`, memory in which each lane alone reads what it wrote.
        """
        first_held = int(self.config.first_in_registers and "own_states" not in refs)
        unroll = n if first_held else self.config.unroll_of(n)

        def program(f: Fragments, at: dict[str, Memory], state: State) -> State:
            return backward_lanes.replay(f, self.kind, at, state, n, unroll, first_held)

        return self._run(program, refs, state)

    def backpropagate(
        self, n: int, d_state: Array, after: Array, first: Array | None = None, **refs: Ref
    ) -> tuple[Array, Array]:
        """The gradient of the state before n steps, at most 4, and that state.

        Args:
            d_state, after: gradient of the state after the steps, and that state.
            first: the state before the steps in the dtype of the inputs, if `states` has it not.
            k, scalars, delta: as in `replay`.
            q: `[n, heads, keys]`.
            d_out: `[n, heads, values]`.
            d_v: `[n, heads, values]`, written.
            d_keys: `[2, n, heads, keys]`, of q and of k, written.
            partial_scalars: `[1 or 2, n, ...]`, written: partial sums of the gradients of decay and
                the write gate, for `add_scalars`.
            states: as in `replay`, with room for 4 steps, or 3 without the first; overwritten.
            own_states: where `replay` wrote the states, if not in `states`.
        """

        def program(
            f: Fragments, at: dict[str, Memory], d_state: State, after: State, *first: LateState
        ) -> Any:
            in_place = self.config.in_place
            late = first[0] if first else None
            return backward_lanes.backpropagate(f, self.kind, at, d_state, after, n, late, in_place)

        return self._run(program, refs, d_state, after, late=() if first is None else (first,))

    def backpropagate_and_replay(
        self,
        d_state: Array,
        after: Array,
        state: Array,
        *,
        replayed: Mapping[str, Ref],
        sums: Mapping[str, Ref],
        **refs: Ref,
    ) -> tuple[Array, Array, Array]:
        """`backpropagate` through 4 steps, interleaved with `replay` of 4 others.

        Args:
            d_state, after, refs: arguments of `backpropagate`, `d_keys` left out; `states` stays.
            state, replayed: arguments of `replay`: the state before its steps, and its references.
            sums: `sums`, memory for the warps' partial sums of this call's `d_keys`;
                `earlier_sums`, those of the call before; `earlier_d_keys`, written from these.

        Returns:
            The results of both.
        """

        def program(f: Fragments, at: dict[str, Memory], *states: State) -> Any:
            at_replayed = {name: at.pop(f"replayed {name}") for name in replayed}
            return backward_lanes.backpropagate_and_replay(f, self.kind, at, at_replayed, *states)

        refs = {**refs, **sums, **{f"replayed {name}": ref for name, ref in replayed.items()}}
        return self._run(program, refs, d_state, after, state)

    def add_d_keys(self, *, sums: Ref, d_keys: Ref) -> None:
        """Writes `d_keys` of the last call of `backpropagate_and_replay`."""
        refs = {"partial": sums, "d_keys": d_keys}
        self._run(lambda f, at: backward_lanes.add_d_keys(f, **at, n=MMA_STEPS), refs)

    def add_scalars(self, *, partial_scalars: Ref, d_scalars: Ref) -> None:
        """Writes `[1 or 2, n, heads]`, the gradients of decay and the write gate, after all warps
        have returned from `backpropagate`."""
        refs = {"partial_scalars": partial_scalars, "d_scalars": d_scalars}
        self._run(lambda f, at: backward_lanes.add_scalars(f, **at), refs)

    def _run(
        self,
        program: Callable[..., Any],
        refs: Mapping[str, Ref],
        *states: Array,
        late: tuple[Array, ...] = (),
    ) -> Any:
        """The states that the program returns, as many as `states`; those of `late` it takes in
        their dtype, as functions that widen them."""
        layout = self._layout

        def emit(_: Any, *args: Any) -> Any:
            memory = {name: Memory(ref) for name, ref in zip(refs, args, strict=False)}
            w = LaneOps().anew() if self.is_short_of_registers else LaneOps()
            f = Fragments(w, *self._shape, self.exact)
            arrays = args[len(refs) : len(refs) + len(states)]
            of_late = [lambda x=x: unpacked(f, _wide(x)) for x in args[len(refs) + len(states) :]]
            results = program(f, memory, *(unpacked(f, x) for x in arrays), *of_late)
            return jax.tree.map(
                lambda x: _packed(x, arrays[0]), results, is_leaf=lambda x: isinstance(x, list)
            )

        array = plgpu.ShapeDtypeStruct(self._shape, jnp.float32, layout)
        return inline(
            emit,
            *refs.values(),
            *states,
            *late,
            arg_types=(plgpu.RefType(),) * len(refs) + (layout,) * (len(states) + len(late)),
            return_type=array if len(states) == 1 else (array,) * len(states) or None,
        )


def unpacked(f: Fragments, x: mgpu.FragmentedArray) -> State:
    """A state as fragments; registers of the array count n-tiles, tiles of keys, and columns."""
    elements = [elements_of(register) for register in x.registers.flat]
    pairs = [
        list(pair)
        for i in range(0, len(elements), 2)
        for pair in zip(elements[i], elements[i + 1], strict=True)
    ]
    return [pairs[u * f.lane_keys : (u + 1) * f.lane_keys] for u in range(f.n_tiles)]


def _wide(x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """In float32."""
    f32 = ir.F32Type.get()
    return x if x.mlir_dtype == f32 else x.astype(f32)


def _packed(state: State, like: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """Fragments as an array with the layout of `like`."""
    register_type = like.registers.flat[0].type
    pairs = [pair for tile in state for pair in tile]
    (length,) = register_type.shape
    registers = np.empty(like.registers.shape, dtype=object)
    registers.flat[:] = [
        vector.from_elements(register_type, [pair[column] for pair in pairs[i : i + length]])
        for i in range(0, len(pairs), length)
        for column in range(2)
    ]
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)
