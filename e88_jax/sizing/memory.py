"""State and training memory of a configuration, in bytes, without building it."""

import dataclasses
import math
from typing import Literal

from e88_jax.config import E88Config, LMConfig
from e88_jax.hardware import GPU
from e88_jax.sizing.parameters import count_params

_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
_FLOAT = 4
MAX_KERNEL_SIZE = 128
"""Largest N and V of the GPU kernels, as in `pallas_kernels.support`."""
KERNEL_MULTIPLE = 4
"""Of what N and V are multiples there."""
_GROUP = 8
"""Steps between the states that the GPU kernel keeps: `pallas_kernels.geometry.GROUP`."""
_LONGEST = 32
"""Up to so many as `checkpoint_every`; above, it keeps them as asked for: `pallas_kernels.vjp`."""


def state_per_layer(config: E88Config) -> int:
    """Numbers in the recurrent state of one layer, for one sequence: H * N * V."""
    return config.n_heads * config.n_state * config.n_value


def state_bytes(config: LMConfig, dtype: str = "float32") -> int:
    """Bytes of the recurrent state of all layers, for one sequence. Decoding keeps float32.

    Raises:
        ValueError: an unknown dtype.
    """
    return config.depth * state_per_layer(config.layer) * _bytes_of(dtype)


def _bytes_of(dtype: str) -> int:
    if dtype not in _BYTES:
        raise ValueError(f"dtype must be one of {', '.join(_BYTES)}; got {dtype!r}.")
    return _BYTES[dtype]


def implementation_on(gpu: GPU | None, layer: E88Config) -> Literal["scan", "mosaic_gpu"]:
    """What runs the layer's recurrence there; where no GPU is given, the kernels if they can."""
    sizes = layer.n_state, layer.n_value
    fits = all(n % KERNEL_MULTIPLE == 0 and n <= MAX_KERNEL_SIZE for n in sizes)
    return "mosaic_gpu" if fits and (gpu is None or gpu.has_kernels) else "scan"


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one training step needs on one device."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass reads, all but the states."""
    checkpoints: int
    """The recurrence's states."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def training_memory(
    config: LMConfig,
    batch: int,
    length: int,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    implementation: Literal["scan", "mosaic_gpu"] = "mosaic_gpu",
    moments: int = 2,
) -> TrainingMemory:
    """An estimate of the memory of one training step.

    It counts the arrays that JAX hands from the forward to the backward pass, as
    `e88_jax.mixer` and `e88_jax.model` are written, none of them recomputed. In float32 by the
    scan, compiled for a processor, XLA's own figure is within 15 % of the total
    (`tests/sizing/test_memory.py`); bfloat16 and the kernels on a GPU were not compared.

    Args:
        config: the model. Its own dtype and implementation, which may be None, are not read.
        batch: sequences.
        length: tokens of each.
        dtype: of the matrix products; parameters, gradients and optimiser are float32.
        implementation: of the recurrence.
        moments: numbers that the optimiser keeps for each parameter: 2 for AdamW.

    Raises:
        ValueError: a batch or length below 1, or an unknown dtype.
    """
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    parameters = _FLOAT * count_params(config)
    tokens, layer = batch * length, config.layer
    narrow = _bytes_of(dtype)
    of_layer = _bytes_per_token(layer, narrow, implementation)
    if config.channel_mixer_dim is not None:
        of_layer += _norm(layer.dim) + narrow * layer.dim
        of_layer += 6 * narrow * config.channel_mixer_dim
    of_model = _norm(layer.dim) + narrow * layer.dim + 2 * _FLOAT * config.vocab_size
    return TrainingMemory(
        parameters=parameters,
        gradients=parameters,
        optimizer=moments * parameters,
        activations=tokens * (config.depth * of_layer + of_model),
        checkpoints=config.depth * _checkpoint_bytes(layer, batch, length, narrow, implementation),
    )


def _norm(dim: int) -> int:
    """Of an RMS norm: its input, that in float32, and what is scaled; two numbers of a row."""
    return _FLOAT * (3 * dim + 2)


def _bytes_per_token(layer: E88Config, narrow: int, implementation: str) -> int:
    """Of what one layer keeps for the backward pass, but for the states."""
    dim, heads = layer.dim, layer.n_heads
    keys, values = heads * layer.n_state, heads * layer.n_value
    streams = 2 * keys + (0 if layer.tie_kv else values)
    total = _norm(dim) + narrow * dim  # all projections read the same
    total += narrow * 2 * keys  # q and k, as the recurrence reads them
    total += (_FLOAT if implementation == "mosaic_gpu" else narrow) * values  # v or its errors
    if layer.use_silu:
        total += narrow * 3 * streams
    if layer.use_l2_norm:
        total += _FLOAT * (2 * keys + 10 * heads) + 2 * heads
    if layer.conv_size is not None:
        total += _FLOAT * layer.conv_size * streams
    total += _FLOAT * heads * {"mamba": 5, "simple": 2}.get(layer.decay_mode, 1)
    if layer.write_gate:
        total += _FLOAT * 2 * heads
    if layer.value_residual:
        total += _FLOAT * values
    if layer.output_norm:
        total += _FLOAT * (3 * values + 2 * heads)
    if layer.output_gate != "none":
        total += _FLOAT * 5 * values
    mixed = values if layer.head_mix in ("concat", "per_head") else layer.n_value
    if mixed != values:
        total += _FLOAT * values
    return total + narrow * mixed


def _checkpoint_bytes(
    layer: E88Config, batch: int, length: int, narrow: int, implementation: str
) -> int:
    every, width = layer.checkpoint_every, _FLOAT
    if implementation == "mosaic_gpu":
        every = _GROUP if every <= _LONGEST else every
        width = narrow
    return width * batch * math.ceil(length / every) * state_per_layer(layer)
