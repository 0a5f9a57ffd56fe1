"""Linear maps without a bias, and the input projections of a layer as few matmuls.

Kernels have their heads' axis apart, `[dim, H, columns]` or `[H, V, dim]`, so that heads can be
sharded; a matmul sees them as matrices, which copies nothing.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, export
from jax.nn import initializers
from jax.nn.initializers import Initializer

from e88_jax.config import E88Config
from e88_jax.meshes import named_axes, with_automatic_axes
from e88_jax.precision import wide
from e88_jax.typed import jit, named
from pallas_kernels import target

TORCH_LINEAR = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's initial weights of a linear layer: uniform in +-1 / sqrt(fan_in)."""

COLUMNS_MULTIPLE = 16
"""Joined projections have a multiple of this many columns: 32 bytes of bfloat16, a sector of a
GPU's memory, which the columns of a head would straddle otherwise."""


MATMUL = "matmul"
"""The name of outputs of matmuls in policies of `jax.checkpoint`."""


def multiply(x: Array, matrix: Array) -> Array:
    """`x @ matrix` over the last axis, as one matmul of two matrices.

    The gradient of a matrix from `[B, T, dim]` inputs makes XLA's CPU compiler copy the activations
    into other layouts and takes three times as long; from `[B * T, dim]` it is one matmul.
    """
    rows = x.reshape(-1, x.shape[-1])
    return named(rows @ matrix, MATMUL).reshape(*x.shape[:-1], matrix.shape[-1])


FROM_DIM, TO_DIM = ("dim", "heads", None), ("heads", None, "dim")
"""Names of the axes of a kernel `[dim, H, columns]`, and of `[H, V, dim]`."""


class Projection(nnx.Module):
    """`x @ W` over the last axes.

    Args:
        in_shape, out_shape: sizes of the axes before and after; the kernel is
            `[*in_shape, *out_shape]`.
        dtype: compute dtype of the matmul; the kernel is float32.
        kernel_init: initializer of the kernel as a matrix `[prod(in_shape), prod(out_shape)]`.
        rngs: source of the initial weights (stream `params`).
        axes: logical names of the kernel's axes, as `named_axes` takes them.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        dtype: jnp.dtype,
        kernel_init: Initializer,
        rngs: nnx.Rngs,
        axes: tuple[str | None, ...] = (),
    ):
        self.dtype = dtype
        self.in_shape, self.out_shape = in_shape, out_shape
        sizes = math.prod(in_shape), math.prod(out_shape)
        matrix = kernel_init(rngs.params(), sizes, jnp.float32)
        kernel = matrix.reshape(*in_shape, *out_shape)
        self.kernel = nnx.Param(kernel, n_in_axes=len(in_shape), **named_axes(*axes))

    def matrix(self) -> Array:
        """The kernel `[n_in, n_out]` in the dtype of the matmul."""
        return self.kernel[...].astype(self.dtype).reshape(math.prod(self.in_shape), -1)

    def __call__(self, x: Array) -> Array:
        """`[..., *out_shape]` of x `[..., *in_shape]`."""
        leading = x.shape[: x.ndim - len(self.in_shape)]
        x = x.astype(self.dtype).reshape(*leading, math.prod(self.in_shape))
        y = multiply(x, self.matrix())
        return y.reshape(*leading, *self.out_shape)

    def for_inference(self) -> "InferenceProjection":
        """The same map with its kernel laid out for decoding."""
        return _for_inference([self], self.out_shape)


class InferenceProjection(nnx.Module):
    """Projections of one input as one matmul with a matrix `[n_in, n_out]` in the compute dtype:
    half the bytes read per token in bfloat16."""

    transposed = False

    def __init__(self, projections: Sequence[Projection], out_shape: tuple[int, ...]):
        self.in_shape, self.out_shape = projections[0].in_shape, out_shape
        kernels = tuple(p.kernel[...] for p in projections)
        # Sharded as the kernels' first axis is; a single kernel also as its last axis is.
        last = "h" if len(kernels) == 1 else "-"
        axes = tuple(" ".join(["b", *["-"] * (x.ndim - 2), last]) for x in kernels)
        result = f"{last} b" if self.transposed else f"b {last}"

        def lay_out(*kernels: Array) -> Array:
            n_in, dtype = math.prod(self.in_shape), projections[0].dtype
            return _laid_out(kernels, n_in, dtype, self.transposed)

        self.kernel = nnx.Param(with_automatic_axes(lay_out, kernels, axes, result))

    def __call__(self, x: Array) -> Array:
        """`[..., *out_shape]` of x `[..., *in_shape]`."""
        leading = x.shape[: x.ndim - len(self.in_shape)]
        x = x.astype(self.kernel[...].dtype).reshape(*leading, math.prod(self.in_shape))
        return self._multiply(x).reshape(*leading, *self.out_shape)

    def _multiply(self, x: Array) -> Array:
        return multiply(x, self.kernel[...])

    def for_inference(self) -> Self:
        return self


AnyProjection: TypeAlias = Projection | InferenceProjection
"""A projection of a layer, for training or laid out for decoding."""


class TransposedProjection(InferenceProjection):
    """`InferenceProjection` with the matrix as `[n_out, n_in]`, for matrix-vector products at the
    speed of a GPU's memory. On a CPU a matmul of several rows would be slower."""

    transposed = True

    def _multiply(self, x: Array) -> Array:
        matrix = self.kernel[...]
        if x.size != x.shape[-1]:
            return multiply(x, matrix.T)
        # A sum, as XLA's matmuls of few rows do not reach the speed of memory.
        y = jnp.sum(wide(matrix) * wide(x.reshape(1, -1)), axis=1)
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _for_inference(
    projections: Sequence[Projection], out_shape: tuple[int, ...]
) -> InferenceProjection:
    on_gpu = target.current().platform == "gpu"
    return (TransposedProjection if on_gpu else InferenceProjection)(projections, out_shape)


@functools.partial(jit, static_argnums=(1, 2, 3))
def _laid_out(kernels: tuple[Array, ...], n_in: int, dtype: jnp.dtype, transposed: bool) -> Array:
    """Kernels side by side as one matrix, by one program: temporary arrays of several would
    fragment a GPU's memory."""
    matrix = _joined([kernel.astype(dtype).reshape(n_in, -1) for kernel in kernels])
    return matrix.T if transposed else matrix


def _multiply_joined(x: Array, projections: Sequence[Projection]) -> Array:
    """Projections of x `[B, T, dim]` as one matmul `[B, T, columns]`; columns end in padding.

    For few tokens every projection is a matmul of its own, as joining kernels copies them.
    """
    rows = x.shape[0] * x.shape[1]
    matrices = [p.matrix() for p in projections]
    if not export.is_symbolic_dim(rows) and rows < x.shape[-1]:
        return _joined([multiply(x, matrix) for matrix in matrices])
    return multiply(x, _joined(matrices))


class ProjectionGroup(nnx.Module):
    """Projections of one input by few matmuls; `group(x)` gives the outputs by name.

    Args:
        dim: width of the input.
        matmuls: for each matmul the shapes of its projections' outputs, by name; each projection is
            a parameter `NAME.kernel`, `[dim, *shape]`, with PyTorch's initial weights.
        dtype: compute dtype of the matmuls.
        rngs: source of the initial weights (stream `params`).
    """

    def __init__(
        self,
        dim: int,
        *matmuls: Mapping[str, tuple[int, ...]],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.matmuls = tuple(tuple(shapes.items()) for shapes in matmuls)
        for shapes in matmuls:
            for name, shape in shapes.items():
                init, axes = TORCH_LINEAR, FROM_DIM[: 1 + len(shape)]
                projection = Projection(
                    (dim,), shape, dtype=dtype, kernel_init=init, rngs=rngs, axes=axes
                )
                setattr(self, name, projection)

    def __call__(self, x: Array) -> dict[str, Array]:
        """`[B, T, *shape]` of x `[B, T, dim]`, by name."""
        x = x.astype(self.dtype)
        outputs: dict[str, Array] = {}
        for shapes in self.matmuls:
            projections = [getattr(self, name) for name, _ in shapes]
            outputs |= _split_columns(_multiply_joined(x, projections), shapes)
        return outputs

    def for_inference(self) -> "JoinedProjectionGroup":
        """The same projections as one matmul, laid out for decoding."""
        return JoinedProjectionGroup(self)


class JoinedProjectionGroup(nnx.Module):
    """`ProjectionGroup` as one matmul for decoding."""

    def __init__(self, trained: ProjectionGroup):
        self.shapes = tuple(item for shapes in trained.matmuls for item in shapes)
        self.joined = _for_inference([getattr(trained, name) for name, _ in self.shapes], (-1,))

    def __call__(self, x: Array) -> dict[str, Array]:
        """`[B, T, *shape]` of x `[B, T, dim]`, by name."""
        return _split_columns(self.joined(x), self.shapes)

    def for_inference(self) -> Self:
        return self


def _split_columns(y: Array, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, Array]:
    """The projections in a matmul's columns."""
    columns = _Columns(y)
    return {name: cast(Array, columns.take(shape)) for name, shape in shapes}


class Read(NamedTuple):
    """Projections of a layer's input besides q, k and v, before bias and activation; None for what
    the layer's options leave out."""

    decay: Array | None  # [B, T, H]
    gate: Array | None  # [B, T, H, V]
    write_gate: Array | None  # [B, T, H]
    head_weights: Array | None  # [B, T, H]


class InputProjections(nnx.Module):
    """The input projections of an E88 layer as two matmuls.

    The first has the columns of q, k and v, head by head (`[H, 2N + V]`), then the decay's; the
    second has those of the output gate, the write gate and the head weights. A projection of one
    column per head would take as long as a wide one, as both read the whole input. One matmul for
    all would be slower: XLA joins at most 4 gradients well, and fuses the gradient of a gate that
    stands alone with the gradient of the gate's operand.

    Args:
        config: sizes and options of the layer.
        dim: width of the input.
        dtype: compute dtype of the matmuls.
        rngs: source of the initial weights (stream `params`).
    """

    def __init__(self, config: E88Config, dim: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        heads, n_state, n_value = config.n_heads, config.n_state, config.n_value

        xavier = initializers.xavier_uniform()

        def linear(*out: int, init: Initializer = xavier) -> Projection:
            axes = FROM_DIM[: 1 + len(out)]
            return Projection((dim,), out, dtype=dtype, kernel_init=init, rngs=rngs, axes=axes)

        def tied(
            key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
        ) -> Array:
            """Initial q and k as two matrices, each with its own fan-out."""
            keys = jax.random.split(key)
            q, k = (xavier(key, (dim, heads * n_state), dtype) for key in keys)
            parts = [x.reshape(dim, heads, n_state) for x in (q, k)]
            return jnp.concatenate(parts, axis=2).reshape(shape)

        reads_decay = config.decay_mode in ("mamba", "simple")
        self.qkv = linear(heads, config.head_columns, init=tied if config.tie_kv else xavier)
        self.decay = linear(heads) if reads_decay else None
        self.gate = linear(heads, n_value) if config.output_gate != "none" else None
        self.write_gate = linear(heads, init=TORCH_LINEAR) if config.write_gate else None
        self.head_weights = linear(heads) if config.head_mix == "input_weighted" else None

    def __call__(self, x: Array) -> tuple[Array, ...]:
        """The matmuls `[B, T, columns]` of x `[B, T, dim]`; columns end in padding."""
        x = x.astype(self.qkv.dtype)
        return tuple(_multiply_joined(x, group) for group in self.groups() if group)

    def groups(self) -> list[list[Projection]]:
        """The projections of each matmul."""
        groups = (self.qkv, self.decay), self.apart
        return [[p for p in group if p is not None] for group in groups]

    @property
    def n_rest(self) -> int:
        """Columns of the first matmul after those of q, k and v, without padding."""
        return _n_columns(_shape(self.decay))

    def split(self, rest: Array, *others: Array) -> Read:
        """The projections other than q, k and v.

        Args:
            rest: the columns of the first matmul after those of q, k and v.
            others: the other matmuls.
        """
        columns = _Columns(rest)
        decay = columns.take(_shape(self.decay))
        columns = _Columns(*others) if others else columns
        return Read(decay, *(columns.take(_shape(p)) for p in self.apart))

    @property
    def apart(self) -> tuple[Projection | None, ...]:
        """The projections of the second matmul, present or not."""
        return self.gate, self.write_gate, self.head_weights

    def for_inference(self) -> "JoinedInputProjections":
        """The same projections as one matmul."""
        return JoinedInputProjections(self)


class JoinedInputProjections(nnx.Module):
    """`InputProjections` as one matmul for decoding, whose kernels are joined once instead of for
    each token."""

    def __init__(self, trained: InputProjections):
        parts = [p for group in trained.groups() for p in group]
        self.joined = _for_inference(parts, (-1,))
        self.shapes = tuple(_shape(p) for p in (trained.decay, *trained.apart))

    def __call__(self, x: Array) -> tuple[Array, ...]:
        """The matmul `[B, T, columns]` of x `[B, T, dim]`."""
        return (self.joined(x),)

    @property
    def n_rest(self) -> int:
        """Columns after those of q, k and v, without padding."""
        return sum(map(_n_columns, self.shapes))

    def split(self, rest: Array, *others: Array) -> Read:
        """The projections in the columns after those of q, k and v."""
        assert not others, "all is one matmul"
        columns = _Columns(rest)
        return Read(*(columns.take(shape) for shape in self.shapes))

    def gate_start(self, qkv_columns: int) -> int:
        """The column of the first head's output gate."""
        decay, *_ = self.shapes
        return qkv_columns + _n_columns(decay)

    def for_inference(self) -> Self:
        return self


def _shape(projection: Projection | None) -> tuple[int, ...] | None:
    return None if projection is None else projection.out_shape


def _n_columns(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else math.prod(shape)


class _Columns:
    """Takes the columns of matmuls `[B, T, columns]`, one projection after the other."""

    def __init__(self, y: Array):
        self._y, self._start = y, 0

    def take(self, shape: tuple[int, ...] | None) -> Array | None:
        """The next columns as `[B, T, *shape]`; None takes none."""
        if shape is None:
            return None
        start, self._start = self._start, self._start + _n_columns(shape)
        return self._y[:, :, start : self._start].reshape(*self._y.shape[:2], *shape)


def _joined(parts: Sequence[Array]) -> Array:
    """Arrays side by side along their last axis, padded to `COLUMNS_MULTIPLE` if several."""
    if len(parts) == 1:
        return parts[0]
    short = -sum(part.shape[-1] for part in parts) % COLUMNS_MULTIPLE
    zeros = [jnp.zeros((*parts[0].shape[:-1], short), parts[0].dtype)] if short else []
    return jnp.concatenate([*parts, *zeros], axis=-1)
