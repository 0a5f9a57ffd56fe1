"""Residual, norm, gate, mix and output projection of the heads' outputs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import initializers

from e88_jax.config import E88Config
from e88_jax.meshes import named_axes
from e88_jax.precision import NORM_EPSILON, wide
from e88_jax.projection import TO_DIM, AnyProjection, Projection, Read
from e88_jax.typed import einsum


class HeadMix(nnx.Module):
    """The end of the layer, from the recurrence's outputs `o`, `[B, T, H, V]`:

        o = o + D * v                   value_residual; D `[H, V]`, initially 1
        o = rmsnorm(o)                  output_norm, over V
        o = o * silu(g)                 output_gate; or sigmoid
        y = sum_h W_o[h] o[h]           head_mix concat and per_head, W_o `[H, V, dim]`
        y = W_o sum_h w[h] o[h]         the others, W_o `[V, dim]`; w = softmax over heads of
                                        learned numbers (weighted_sum) or of a projection of the
                                        input (input_weighted), or 1 (sum)

    concat and per_head differ in the initial weights: xavier-uniform for one matrix `[H * V, dim]`,
    or for each head's `[V, dim]`.
    """

    def __init__(self, config: E88Config, dim: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        heads, n_value = config.n_heads, config.n_value
        self.mix, self.gate = config.head_mix, config.output_gate
        residual, residual_axes = jnp.ones((heads, n_value)), named_axes("heads", None)
        weights, weights_axes = jnp.full((heads,), 1 / heads, jnp.float32), named_axes("heads")
        norm = nnx.RMSNorm(n_value, epsilon=NORM_EPSILON, rngs=rngs)
        self.value_residual = (
            nnx.Param(residual, **residual_axes) if config.value_residual else None
        )
        self.norm = norm if config.output_norm else None
        is_weighted = config.head_mix == "weighted_sum"
        self.weights = nnx.Param(weights, **weights_axes) if is_weighted else None

        def of_each_head(
            key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
        ) -> Array:
            xavier = initializers.xavier_uniform(batch_axis=0)
            return xavier(key, (heads, n_value, dim), dtype).reshape(shape)

        xavier = initializers.xavier_uniform()
        whole_heads = config.head_mix in ("concat", "per_head")
        self.projection: AnyProjection = Projection(
            (heads, n_value) if whole_heads else (n_value,),
            (dim,),
            dtype=dtype,
            kernel_init=of_each_head if config.head_mix == "per_head" else xavier,
            rngs=rngs,
            axes=TO_DIM if whole_heads else (None, "dim"),
        )

    def __call__(self, out: Array, v: Array, read: Read) -> Array:
        """`[B, T, dim]` in the compute dtype, from outputs and values `[B, T, H, V]`."""
        dtype = out.dtype
        out = wide(out)
        if self.value_residual is not None:
            out += self.value_residual[None, None].astype(out.dtype) * wide(v)
        if self.norm is not None:
            out = self.norm(out)
        if read.gate is not None:
            gate = wide(read.gate)
            out *= jax.nn.silu(gate) if self.gate == "silu" else jax.nn.sigmoid(gate)
        if self.weights is not None:
            weights = jax.nn.softmax(self.weights[...].astype(out.dtype))
            out = einsum("bthv,h->btv", out, weights)
        elif read.head_weights is not None:
            weights = jax.nn.softmax(wide(read.head_weights))
            out = einsum("bthv,bth->btv", out, weights)
        elif self.mix == "sum":
            out = jnp.sum(out, axis=2)
        return self.projection(out.astype(dtype))

    def for_inference(self) -> "HeadMix":
        """The same mix with its output projection laid out for decoding."""
        mix = nnx.clone(self)  # other variables, of the same arrays
        mix.projection = self.projection.for_inference()
        return mix
