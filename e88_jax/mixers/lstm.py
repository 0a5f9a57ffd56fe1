"""The LSTM layer: Flax's cell over time, then an output projection."""

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from flax import nnx
from jax import Array, export, lax
from jax.nn import initializers

from e88_jax.checks import require_instance, require_int, require_rngs
from e88_jax.documents import document_starts, live_steps
from e88_jax.meshes import named_axes, varying_alike
from e88_jax.mixers.base import Execution
from e88_jax.mixers.baselines import LSTMConfig
from e88_jax.mixers.call import call_checked, check_batch
from e88_jax.precision import compute_dtype, wide_dtype
from e88_jax.projection import MATMUL, AnyProjection, Projection
from e88_jax.typed import named, params_of
from pallas_kernels import target


class LSTMState(NamedTuple):
    """The state of a layer between calls, float32, or float64 for float64."""

    hidden: Array
    """Outputs of the units, `[B, width]`."""
    cell: Array
    """Cells of the units, `[B, width]`."""

    AXES = ("b", "b")
    """Names of the first axes of each array: b the batch."""


export.register_namedtuple_serialization(LSTMState, serialized_name="e88_jax.LSTMState")

UNROLL = 8
"""Steps of one turn of XLA's loop on a GPU, at most: a turn's launches take longer than a step of a
small layer. On a CPU they gain nothing."""


class LSTMMixer(nnx.Module):
    """One LSTM layer (`docs/references.md`); `y, state = mixer(x, state, segment_ids)`.

    For each token, with x `[dim]` its input, h the units' outputs and c their cells, `[width]`:

        i, f, g, o = W_x x + W_h h + b          each [width]
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        y = W_o h

    The cell is `nnx.OptimizedLSTMCell` with its initial weights: `W_x` lecun-normal, `W_h`
    orthogonal, b zeros. It runs in float32, or float64 for float64, and `W_o`, xavier-uniform, in
    the compute dtype. Parameters are float32.

    Args:
        config: the width.
        dim: width of x.
        execution: compute dtype; its other options change nothing here.
        rngs: source of the initial weights (stream `params`).

    Raises:
        TypeError: an argument of another type.
        ValueError: dim is below 1.
    """

    def __init__(
        self,
        config: LSTMConfig,
        dim: int,
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        *,
        rngs: nnx.Rngs,
    ):
        require_instance("config", config, LSTMConfig)
        require_instance("execution", execution, Execution)
        require_rngs(rngs)
        self.config = config
        self.dim = require_int("dim", dim)
        self.dtype = compute_dtype(execution.dtype)
        wide = wide_dtype(self.dtype)
        init = initializers.lecun_normal()  # Flax's default
        self.cell = nnx.OptimizedLSTMCell(
            dim,
            config.width,
            kernel_init=nnx.with_metadata(init, **named_axes("dim", None)),
            dtype=wide,
            rngs=rngs,
        )
        self.output: AnyProjection = Projection(
            (config.width,),
            (dim,),
            dtype=self.dtype,
            kernel_init=initializers.xavier_uniform(),
            rngs=rngs,
            axes=(None, "dim"),
        )

    def init_state(self, batch: int, context: int | None = None) -> LSTMState:
        """The state before the first token: zeros. `context` is ignored.

        Raises:
            TypeError, ValueError: batch is no integer, or below 1.
        """
        check_batch(batch)
        shape, dtype = (batch, self.config.width), wide_dtype(self.dtype)
        return LSTMState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def __call__(
        self,
        x: Array,
        state: LSTMState | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, LSTMState]:
        """Mixes over time.

        Args:
            x: `[B, T, dim]`, any float dtype.
            state: what the call before returned; None starts from zeros.
            segment_ids: packed documents, `[B, T]` int32; where the id changes, nothing is carried
                over. Token 0 continues `state`.
            lengths: tokens of each row, `[B]` int32 from 0 to T, of a batch padded on the right:
                the state is that after a row's own last token, and y after it is zeros. None: T.

        Returns:
            `(y, state)`: y `[B, T, dim]` in the compute dtype.

        Raises:
            TypeError: an argument of another type.
            ValueError: x is not `[B, T, dim]` or empty, or the state, the ids or the lengths do not
                go with it.
        """
        arguments = x, state, segment_ids, lengths
        return call_checked(type(self)._mix, self, self.dim, LSTMState, *arguments)

    def _mix(
        self, x: Array, state: LSTMState, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, LSTMState]:
        """`__call__` with checked arguments."""
        starts = None if segment_ids is None else document_starts(segment_ids)
        live = None if lengths is None else live_steps(lengths, x.shape[1])
        cell = cast(Any, self.cell)
        # Of all steps at once: the matmul of a step is the state's alone.
        x = named(cell.dense_i(x), MATMUL)

        def step(state: LSTMState, inputs: Any) -> tuple[LSTMState, Array]:
            x, start, live = inputs
            h, c = state
            if start is not None:
                h, c = (jnp.where(start[:, None], 0, a) for a in (h, c))
            i, f, g, o = jnp.split(x + named(cell.dense_h(h), MATMUL), 4, axis=-1)
            c = cell.gate_fn(f) * c + cell.gate_fn(i) * cell.activation_fn(g)
            h = cell.gate_fn(o) * cell.activation_fn(c)
            if live is None:
                return LSTMState(h, c), h
            after = LSTMState(
                *(jnp.where(live[:, None], *a) for a in zip((h, c), state, strict=True))
            )
            return after, jnp.where(live[:, None], h, 0)

        state, *inputs, _ = varying_alike(state, x, starts, live, params_of(self.cell))
        over_time = [None if a is None else jnp.moveaxis(a, 1, 0) for a in inputs]
        time: Any = x.shape[1]
        is_symbolic = not isinstance(time, int)  # of `jax.export`
        on_gpu = target.current().platform == "gpu"
        unroll = UNROLL if on_gpu and not is_symbolic else 1
        state, hidden = lax.scan(step, state, tuple(over_time), unroll=unroll)
        return self.output(jnp.moveaxis(hidden, 0, 1)), state

    def for_inference(self) -> "LSTMMixer":
        """The layer with its output projection laid out for decoding; this one stays as it is."""
        mixer = nnx.clone(self)  # other variables, of the same arrays
        mixer.output = self.output.for_inference()
        return mixer
