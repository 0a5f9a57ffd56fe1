"""A mixer that is no E88 layer: what depends on mixers must take it as well.

Registered under its kind by `monkeypatch.setitem(mixers.MIXERS, ToyConfig.kind, TOY)`.
"""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import initializers

from e88_jax.checks import check_fields, require_int
from e88_jax.documents import document_starts, live_steps
from e88_jax.mixers.base import Execution, Flops
from e88_jax.mixers.call import call_checked
from e88_jax.precision import compute_dtype, wide, wide_dtype
from e88_jax.projection import InferenceProjection, Projection

TOY = "tests.reference.toy_mixer:ToyConfig"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A leaky average: h = a h + (1 - a) W_in x, y = W_out h, with a learned a per channel."""

    kind: ClassVar[str] = "toy"

    width: int = 6
    """Channels that are averaged."""

    def __post_init__(self) -> None:
        check_fields(self, require_int, "width")

    def build(self, dim: int, execution: Execution, *, rngs: nnx.Rngs) -> "ToyMixer":
        return ToyMixer(self, dim, execution, rngs=rngs)

    def count_params(self, dim: int) -> int:
        return 2 * dim * self.width + self.width

    def state_size(self, dim: int) -> int:
        return self.width

    def flops_per_token(self, dim: int) -> Flops:
        return Flops(6 * self.count_params(dim), 10 * self.width)


class ToyMixer(nnx.Module):
    def __init__(self, config: ToyConfig, dim: int, execution: Execution, *, rngs: nnx.Rngs):
        self.config, self.dim, self.dtype = config, dim, compute_dtype(execution.dtype)
        init = initializers.xavier_uniform()

        def linear(n_in: int, n_out: int) -> Projection | InferenceProjection:
            return Projection((n_in,), (n_out,), dtype=self.dtype, kernel_init=init, rngs=rngs)

        self.inputs = linear(dim, config.width)
        self.outputs = linear(config.width, dim)
        self.rate = nnx.Param(jnp.linspace(-1, 2, config.width))

    def init_state(self, batch: int, context: int | None = None) -> Array:
        return jnp.zeros((batch, self.config.width), wide_dtype(self.dtype))

    def __call__(
        self,
        x: Array,
        state: Array | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, Array]:
        arguments = x, state, segment_ids, lengths
        return call_checked(type(self)._mix, self, self.dim, "b", *arguments)

    def _mix(
        self, x: Array, state: Array, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, Array]:
        never = jnp.zeros(x.shape[:2], bool)
        starts = never if segment_ids is None else document_starts(segment_ids)
        live = ~never if lengths is None else live_steps(lengths, x.shape[1])
        u = wide(self.inputs(x))
        keep = jax.nn.sigmoid(self.rate[...].astype(u.dtype))[None]

        def step(state: Array, inputs: Any) -> tuple[Array, Array]:
            u, start, live = inputs
            before = jnp.where(start[:, None], 0, state)
            after = jnp.where(live[:, None], keep * before + (1 - keep) * u, state)
            return after, jnp.where(live[:, None], after, 0)

        over_time = (jnp.moveaxis(a, 1, 0) for a in (u, starts, live))
        state, averages = jax.lax.scan(step, state, tuple(over_time))
        return self.outputs(jnp.moveaxis(averages, 0, 1)), state

    def for_inference(self) -> Self:
        mixer = nnx.clone(self)
        mixer.inputs = self.inputs.for_inference()
        mixer.outputs = self.outputs.for_inference()
        return mixer
