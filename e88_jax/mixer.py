"""The E88 layer: projections, recurrence, output gate, projection."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, export
from jax.nn import initializers

from e88_jax.activation import activate
from e88_jax.checks import (
    as_array,
    as_integers,
    as_lengths,
    require_instance,
    require_int,
    require_rngs,
)
from e88_jax.config import E88Config
from e88_jax.documents import document_starts, live_steps
from e88_jax.fused import activate_product, decode_product
from e88_jax.meshes import call_with_automatic_axes, explicit_mesh, with_automatic_axes
from e88_jax.precision import compute_dtype, wide, wide_dtype
from e88_jax.projection import Projection, multiply
from e88_jax.recurrence import e88_recurrence
from e88_jax.short_conv import ShortConv

NORM_EPSILON = 1e-5
"""Of every RMS norm in the layer and the model, as in the original implementation."""


_READ_THE_INPUT = (
    ("qkv_proj", "q_proj", "k_proj", "a_proj", "beta_proj"),
    ("g_proj", "write_gate_proj", "head_attn"),
)
"""Projections of the layer's input, of which each layer has some; those of a line are one product.
"""


COLUMNS_MULTIPLE = 8
"""Of a product of several projections: 16 bytes of bfloat16, the most that a GPU's thread loads at
once, and what cuBLAS's fast kernels need rows to begin at."""


class Product(NamedTuple):
    """A product that several projections share."""

    widths: dict[str, int]
    """Columns of each, by its name."""
    y: Array
    """`[B, T, columns]`."""

    def parts(self) -> dict[str, Array]:
        """The columns of each projection."""
        ends = itertools.accumulate(self.widths.values())
        parts = jnp.split(self.y, list(ends)[:-1], axis=-1)
        return dict(zip(self.widths, parts, strict=False))  # of no widths one part, of no columns


class MixerState(NamedTuple):
    """What a layer carries from one call to the next."""

    recurrent: Array
    """The heads' states, `[B, H, N, V]` float32."""
    conv: dict[str, Array]
    """The last inputs of each short convolution, `[B, conv_size - 1, channels]`; may be empty."""


export.register_namedtuple_serialization(MixerState, serialized_name="e88_jax.MixerState")


def _init_a_log(key: Array, n_heads: int) -> Array:
    return jnp.log(jax.random.uniform(key, (n_heads,), jnp.float32, 1.0, 16.0))


def _init_dt_bias(key: Array, n_heads: int) -> Array:
    """The softplus inverse of steps log-uniform in [1e-3, 1e-1], as Mamba initialises them."""
    low, high = jnp.log(jnp.float32(1e-3)), jnp.log(jnp.float32(1e-1))
    dt = jnp.maximum(jnp.exp(jax.random.uniform(key, (n_heads,), jnp.float32, low, high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


def _described(array: Array) -> str:
    """dtype and shape; of what is no array, its type."""
    dtype = getattr(array, "dtype", type(array).__name__)
    return f"{dtype} {getattr(array, 'shape', '')}"


class E88Mixer(nnx.Module):
    """One E88 layer; `y, state = mixer(x, state, segment_ids)`.

    Parameters are float32 and named as in the original implementation.

    Args:
        config: sizes and options.
        rngs: source of the initial weights (stream `params`).

    Raises:
        TypeError: another config, or no nnx.Rngs.
    """

    def __init__(self, config: E88Config, *, rngs: nnx.Rngs):
        require_instance("config", config, E88Config)
        require_rngs(rngs)
        self.config = config
        self.dtype = compute_dtype(config.dtype)
        dim, heads = config.dim, config.n_heads
        keys, values = heads * config.n_state, heads * config.n_value
        xavier = initializers.xavier_uniform()
        # PyTorch's default for a linear layer: uniform in +-1 / sqrt(fan_in).
        torch_default = initializers.variance_scaling(1 / 3, "fan_in", "uniform")

        def linear(n_in: int, n_out: int, init: initializers.Initializer = xavier) -> Projection:
            return Projection(n_in, n_out, dtype=self.dtype, kernel_init=init, rngs=rngs)

        if config.tie_kv:
            self.q_proj = linear(dim, keys)
            self.k_proj = linear(dim, keys)
        else:
            self.qkv_proj = linear(dim, 2 * keys + values)

        if config.conv_size is not None:
            self.q_conv = ShortConv(keys, config.conv_size, rngs=rngs)
            self.k_conv = ShortConv(keys, config.conv_size, rngs=rngs)
            if not config.tie_kv:
                self.v_conv = ShortConv(values, config.conv_size, rngs=rngs)

        if config.decay_mode == "mamba":
            self.a_proj = linear(dim, heads)
            self.A_log = nnx.Param(_init_a_log(rngs.params(), heads))
            self.dt_bias = nnx.Param(_init_dt_bias(rngs.params(), heads))
        elif config.decay_mode == "simple":
            self.beta_proj = linear(dim, heads)
        elif config.decay_mode == "constant":
            self.decay_logit = nnx.Param(jnp.full((heads,), 4.0, jnp.float32))

        if config.write_gate:
            self.write_gate_proj = linear(dim, heads, torch_default)
        if config.value_residual:
            self.value_residual = nnx.Param(jnp.ones((heads, config.n_value), jnp.float32))
        if config.output_norm:
            self.o_norm = nnx.RMSNorm(config.n_value, epsilon=NORM_EPSILON, rngs=rngs)
        if config.output_gate != "none":
            self.g_proj = linear(dim, values)

        if config.head_mix == "weighted_sum":
            self.head_weights = nnx.Param(jnp.full((heads,), 1 / heads, jnp.float32))
        elif config.head_mix == "input_weighted":
            self.head_attn = linear(dim, heads)
        if config.head_mix == "per_head":
            self.head_projs = nnx.Einsum(
                "bthv,hvd->btd",
                (heads, config.n_value, dim),
                dtype=self.dtype,
                kernel_init=initializers.xavier_uniform(batch_axis=0),
                rngs=rngs,
            )
        else:
            self.o_proj = linear(values if config.head_mix == "concat" else config.n_value, dim)

    def init_state(self, batch: int) -> MixerState:
        """The state before the first token: zeros.

        Raises:
            TypeError, ValueError: batch is no integer, or below 1.
        """
        is_symbolic: bool = export.is_symbolic_dim(batch)
        if not is_symbolic:
            require_int("batch", batch)
        config = self.config
        convs = {} if config.conv_size is None else {"q": self.q_conv, "k": self.k_conv}
        if convs and not config.tie_kv:
            convs["v"] = self.v_conv
        state_shape = (batch, config.n_heads, config.n_state, config.n_value)
        return MixerState(
            jnp.zeros(state_shape, wide_dtype(self.dtype)),
            {name: conv.init_state(batch, self.dtype) for name, conv in convs.items()},
        )

    def __call__(
        self,
        x: Array,
        state: MixerState | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, MixerState]:
        """Mixes over time.

        Args:
            x: `[B, T, dim]`, any float dtype.
            state: what the call before returned; None starts from zeros.
            segment_ids: packed documents, `[B, T]` int32; where the id changes, nothing is carried
                over. Token 0 continues `state`.
            lengths: tokens of each row, `[B]` int32 from 0 to T, of a batch padded on the right:
                the state is that after a row's own last token, and y after it is zeros. None: T.

        Returns:
            `(y, state)`: y `[B, T, dim]` in the dtype of the matrix products.

        Raises:
            TypeError: an argument of another type.
            ValueError: x is not `[B, T, dim]` or empty, or the state, the ids or the lengths do not
                go with it.
        """
        config = self.config
        x = as_array("x", x, f"[B, T, {config.dim}]")
        if x.ndim != 3 or x.shape[-1] != config.dim or x.size == 0:
            raise ValueError(f"x must be [B, T, {config.dim}], B and T not 0, got shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be of floats, got {x.dtype}.")
        if segment_ids is not None:
            segment_ids = as_integers("segment_ids", segment_ids, "[B, T]", x.shape[:2])
        if lengths is not None:
            lengths = as_lengths(lengths, *x.shape[:2])
        if state is None:
            state = self.init_state(x.shape[0])
        else:
            self.check_state(state, x.shape[0])
        out_kernel = (self.head_projs if config.head_mix == "per_head" else self.o_proj).kernel
        if explicit_mesh((x, state, segment_ids, lengths, out_kernel[...])) is None:
            return self._compute(x, state, segment_ids, lengths)
        of_state = MixerState("b h", "b")  # pyright: ignore[reportArgumentType]
        arguments, axes = (x, state, segment_ids, lengths), ("b t", of_state, "b t", "b")
        return call_with_automatic_axes(
            E88Mixer._compute, self, arguments, axes, results=("b t", of_state)
        )

    def _compute(
        self, x: Array, state: MixerState, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, MixerState]:
        """As `__call__`, of arguments that are checked."""
        if lengths is not None:
            live = live_steps(lengths, x.shape[1])
            x = jnp.where(live[..., None], x, jnp.zeros_like(x))
        products = self._products(x.astype(self.dtype))
        token = None
        if segment_ids is None and lengths is None:
            token = self._token(products, state)
        mixed, state = token or self._mix(products, state, segment_ids, lengths)
        per_head = self.config.head_mix == "per_head"
        return self.head_projs(mixed) if per_head else self.o_proj(mixed), state

    def join_projections(self) -> None:
        """Makes one projection of those that read the input, for inference.

        The parameters are no longer named as in the original implementation.
        """
        if hasattr(self, "joined_proj"):
            return
        names = [name for group in _READ_THE_INPUT for name in group if hasattr(self, name)]
        widths, kernel = self._side_by_side(names)
        self.joined_widths = tuple(widths.items())
        self.joined_proj: Projection = getattr(self, names[0])
        self.joined_proj.kernel = nnx.Param(kernel)
        for name in names:
            delattr(self, name)

    def _side_by_side(self, names: list[str]) -> tuple[dict[str, int], Array]:
        """The kernels of projections as one, and the columns of each by its name."""
        kernels = {name: getattr(self, name).kernel[...].astype(self.dtype) for name in names}
        widths = {name: kernel.shape[1] for name, kernel in kernels.items()}
        short = -sum(widths.values()) % COLUMNS_MULTIPLE if len(names) > 1 else 0
        if short:
            widths["padding"] = short

        def join(*kernels: Array) -> Array:
            padding = [jnp.zeros((self.config.dim, short), self.dtype)] if short else []
            return jnp.concatenate([*kernels, *padding], axis=1)

        axes = ("b h",) * len(kernels)  # divided as the first of them
        return widths, with_automatic_axes(join, tuple(kernels.values()), axes, "b h")

    def _products(self, x: Array) -> list[Product]:
        """The products that read the input.

        Projections are side by side in one product: alone, that of the decay, of one column a head,
        takes as long to read the input as a wide one. In two products, as XLA joins at most 4
        gradients well, and makes that of a gate alone together with that of what the gate
        multiplies. To put kernels side by side copies them, which is too much for few tokens.
        """
        if hasattr(self, "joined_proj"):
            return [Product(dict(self.joined_widths), self.joined_proj(x))]
        groups = [[name for name in names if hasattr(self, name)] for names in _READ_THE_INPUT]
        rows = x.shape[0] * x.shape[1]
        if not export.is_symbolic_dim(rows) and rows < self.config.dim:
            groups = [[name] for names in groups for name in names]
        products = []
        for names in filter(None, groups):
            widths, kernel = self._side_by_side(names)
            products.append(Product(widths, multiply(x, kernel)))
        return products

    def _token(self, products: list[Product], state: MixerState) -> tuple[Array, MixerState] | None:
        """As `_mix`, by one kernel, for one token after `join_projections`; None where there is no
        such kernel."""
        widths, y = products[0]
        if y.shape[1] != 1 or not hasattr(self, "joined_proj"):
            return None
        read = products[0].parts()
        ends = dict(zip(widths, itertools.accumulate(widths.values()), strict=True))
        gate_start = ends["g_proj"] - widths["g_proj"] if "g_proj" in widths else 0
        decay, write_gate = self._decay(read, y.shape[:2]), self._write_gate(read)
        decoded = decode_product(self.config, y, gate_start, decay, write_gate, state.recurrent)
        if decoded is None:
            return None
        mixed, recurrent = decoded
        return mixed, MixerState(recurrent, {})

    def _mix(
        self,
        products: list[Product],
        state: MixerState,
        segment_ids: Array | None,
        lengths: Array | None,
    ) -> tuple[Array, MixerState]:
        """From the first products to what the last one reads, and the new state."""
        config = self.config
        shape = products[0].y.shape[:2]
        read: dict[str, Array] = {}
        qkv, conv_state = None, {}
        for product in products:
            # A kernel is too much for single tokens.
            if "qkv_proj" in product.widths and shape[1] != 1:
                activated = activate_product(config, product.y)
                if activated is not None:
                    *qkv, rest = activated
                    widths = {k: n for k, n in product.widths.items() if k != "qkv_proj"}
                    product = Product(widths, rest)
            read |= product.parts()
        if qkv is None:
            *qkv, conv_state = self._qkv(read, state.conv, segment_ids, lengths)
        q, k, v = qkv
        out, recurrent = e88_recurrence(
            q,
            k,
            v,
            self._decay(read, shape),
            write_gate=self._write_gate(read),
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            lengths=lengths,
            linear_state=config.linear_state,
            saved_state_interval=config.saved_state_interval,
            implementation=config.implementation,
        )
        return self._mix_heads(out, v, read), MixerState(recurrent, conv_state)

    def check_state(self, state: MixerState, batch: int, name: str = "state") -> None:
        """Raises:
        TypeError, ValueError: this is no state of the layer for a batch of so many rows.
        """
        require_instance(name, state, MixerState, "a MixerState, such as init_state(B)")
        fresh = jax.eval_shape(lambda: self.init_state(batch))
        got, wanted = (jax.tree.map(_described, s) for s in (state, fresh))
        if got != wanted:
            raise ValueError(f"{name} must be {wanted} for a batch of {batch}, got {got}.")

    def _qkv(
        self,
        read: dict[str, Array],
        conv_state: dict[str, Array],
        segment_ids: Array | None,
        lengths: Array | None,
    ) -> tuple[Array, Array, Array, dict[str, Array]]:
        config = self.config
        keys = config.n_heads * config.n_state
        if config.tie_kv:
            streams = {"q": read["q_proj"], "k": read["k_proj"]}
        else:
            q, k, v = jnp.split(read["qkv_proj"], [keys, 2 * keys], axis=-1)
            streams = {"q": q, "k": k, "v": v}
        new_conv_state = {}
        if config.conv_size is not None:
            document = None
            if segment_ids is not None:
                document = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
            for name, stream in streams.items():
                conv: ShortConv = getattr(self, f"{name}_conv")
                streams[name], new_conv_state[name] = conv(
                    stream, conv_state[name], document, lengths
                )
        streams = {
            name: stream.reshape(*stream.shape[:2], config.n_heads, -1)
            for name, stream in streams.items()
        }
        silu, unit = config.use_silu, config.use_l2_norm
        q, k = (activate(streams[name], silu, unit) for name in ("q", "k"))
        v = activate(streams["k" if config.tie_kv else "v"], silu, False)
        return q, k, v, new_conv_state

    def _decay(self, read: dict[str, Array], shape: tuple[int, ...]) -> Array:
        """`[B, T, H]`, in (0, 1]."""
        dtype = wide_dtype(self.dtype)
        shape = (*shape, self.config.n_heads)
        match self.config.decay_mode:
            case "mamba":
                bias = self.dt_bias[None, None].astype(dtype)
                rate = jnp.exp(self.A_log[None, None].astype(dtype))
                return jnp.exp(-rate * jax.nn.softplus(wide(read["a_proj"]) + bias))
            case "simple":
                return jax.nn.sigmoid(wide(read["beta_proj"]))
            case "constant":
                decay = jax.nn.sigmoid(self.decay_logit[None, None].astype(dtype))
                return jnp.broadcast_to(decay, shape)
            case "none":
                return jnp.ones(shape, dtype)

    def _write_gate(self, read: dict[str, Array]) -> Array | None:
        if not self.config.write_gate:
            return None
        return jax.nn.sigmoid(wide(read["write_gate_proj"]))

    def _mix_heads(self, out: Array, v: Array, read: dict[str, Array]) -> Array:
        """From the recurrence's outputs `[B, T, H, V]` to what the last projection reads."""
        config = self.config
        out = wide(out)
        if config.value_residual:
            out += self.value_residual[None, None].astype(out.dtype) * wide(v)
        if config.output_norm:
            out = self.o_norm(out)
        if config.output_gate != "none":
            gate = wide(read["g_proj"]).reshape(out.shape)
            out *= jax.nn.silu(gate) if config.output_gate == "silu" else jax.nn.sigmoid(gate)
        match config.head_mix:
            case "concat":
                out = out.reshape(*out.shape[:2], -1)
            case "weighted_sum":
                weights = jax.nn.softmax(self.head_weights[...].astype(out.dtype))
                out = jnp.einsum("bthv,h->btv", out, weights)
            case "input_weighted":
                weights = jax.nn.softmax(wide(read["head_attn"]))
                out = jnp.einsum("bthv,bth->btv", out, weights)
            case "sum":
                out = jnp.sum(out, axis=2)
        return out.astype(self.dtype)
