"""State and training memory of a configuration, in bytes, without building it."""

import dataclasses
import math
from typing import Literal

from e88_jax.checks import require_choice, require_instance, require_int
from e88_jax.config import E88Config, LMConfig
from e88_jax.hardware import GPU
from e88_jax.sizing.parameters import count_params
from pallas_kernels.limits import (
    MAX_GROUPED_INTERVAL,
    MAX_SIZE,
    SAVED_STATE_GROUP,
    SIZE_MULTIPLE,
)

_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
_FLOAT = 4


def state_per_layer(config: E88Config) -> int:
    """Numbers in the recurrent state of one layer, for one sequence: H * N * V.

    Raises:
        TypeError: no E88Config.
    """
    require_instance("config", config, E88Config)
    return config.n_heads * config.n_state * config.n_value


def state_bytes(config: LMConfig, dtype: str = "float32") -> int:
    """Bytes of the recurrent state of all layers, for one sequence. Decoding keeps float32.

    Raises:
        TypeError: no LMConfig.
        ValueError: an unknown dtype.
    """
    require_instance("config", config, LMConfig)
    return config.depth * state_per_layer(config.layer) * _bytes_of(dtype)


def _bytes_of(dtype: str) -> int:
    return _BYTES[require_choice("dtype", dtype, tuple(_BYTES))]


def implementation_on(gpu: GPU | None, layer: E88Config) -> Literal["scan", "mosaic_gpu"]:
    """What runs the layer's recurrence there; where no GPU is given, the kernels if they can."""
    sizes = layer.n_state, layer.n_value
    fits = all(n % SIZE_MULTIPLE == 0 and n <= MAX_SIZE for n in sizes)
    return "mosaic_gpu" if fits and (gpu is None or gpu.has_kernels) else "scan"


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one training step needs on one GPU, when it needs most.

    That is where the backward pass begins, with all activations, or where it ends, with all
    gradients.
    """

    parameters: int
    optimizer: int
    gradients: int
    """Of the weights of matrix products in the dtype of these."""
    activations: int
    """What the backward pass reads, all but the states; copies of weights in the dtype of the
    matrix products."""
    checkpoints: int
    """The recurrence's states."""
    working: int
    """For the moment: logits, gradients of activations, and what is made again."""

    @property
    def total(self) -> int:
        kept = max(self.gradients, self.activations + self.checkpoints)
        return self.parameters + self.optimizer + kept + self.working


def training_memory(
    config: LMConfig,
    batch: int,
    length: int,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    implementation: Literal["scan", "mosaic_gpu"] = "mosaic_gpu",
    moments: int = 2,
) -> TrainingMemory:
    """An estimate of the memory of one training step on a GPU.

    It counts the arrays that XLA leaves from the forward to the backward pass of `e88_jax.mixer`
    and `e88_jax.model`: it makes what is elementwise again where it reads it. Within 12 % of XLA's
    own figure for an H100 (`tests/sizing/test_memory.py`). Gradients that are accumulated over
    several passes are not counted.

    Args:
        config: the model. Its own dtype and implementation, which may be None, are not read.
        batch: sequences.
        length: tokens of each.
        dtype: of the matrix products and of the gradients of their weights; parameters and
            optimiser are float32.
        implementation: of the recurrence.
        moments: numbers that the optimiser keeps for each parameter: 2 for AdamW.

    Raises:
        TypeError: an argument of another type.
        ValueError: a batch or length below 1, moments below 0, or an unknown dtype or
            implementation.
    """
    require_instance("config", config, LMConfig)
    batch, length = require_int("batch", batch), require_int("length", length)
    moments = require_int("moments", moments, minimum=0)
    require_choice("implementation", implementation, ("scan", "mosaic_gpu"))
    n_params = count_params(config)
    tokens, layer = batch * length, config.layer
    narrow = _bytes_of(dtype)
    states = _checkpoint_bytes(layer, batch, length, narrow, implementation)
    kept, whole = _kept_per_token(config, narrow, implementation)
    # Of the weights, a copy in bfloat16, or side by side in float32.
    copies = narrow * n_params if config.remat == "none" else 0
    working = tokens * (3 * narrow + _FLOAT) * layer.dim + 2 * _FLOAT * tokens * config.vocab_size
    if config.remat != "none":
        working += tokens * (whole - kept) + states
    return TrainingMemory(
        parameters=_FLOAT * n_params,
        optimizer=_FLOAT * moments * n_params,
        gradients=narrow * n_params,
        activations=copies + config.depth * tokens * kept,
        checkpoints=config.depth * states if config.remat == "none" else 0,
        working=working,
    )


def _kept_per_token(config: LMConfig, narrow: int, implementation: str) -> tuple[int, int]:
    """Bytes that a layer keeps of each token for its backward pass, but for the recurrence's
    states, and what it would keep if nothing were made again."""
    layer, hidden = config.layer, config.channel_mixer_dim
    residual = _FLOAT * layer.dim
    keys, values = layer.n_heads * layer.n_state, layer.n_heads * layer.n_value
    streams = 2 * keys + (0 if layer.tie_kv else values)
    per_head = layer.decay_mode in ("mamba", "simple")
    per_head += layer.write_gate + (layer.head_mix == "input_weighted")
    read = streams + (values if layer.output_gate != "none" else 0) + per_head * layer.n_heads
    products = narrow * read
    whole = residual + products + narrow * layer.dim  # the norm's input and output
    whole += narrow * (2 * keys + values)  # q, k and out of the recurrence
    groups = implementation == "mosaic_gpu" and layer.saved_state_interval <= MAX_GROUPED_INTERVAL
    # v, or the kernel's errors; XLA copies what a loop reads.
    whole += _FLOAT * values if groups else narrow * (2 * keys + 2 * values)
    if layer.use_l2_norm:
        whole += _FLOAT * 2 * layer.n_heads
    if layer.conv_size is not None:
        whole += narrow * streams
    if layer.output_gate != "none" or layer.head_mix not in ("concat", "per_head"):
        mixed = values if layer.head_mix in ("concat", "per_head") else layer.n_value
        whole += narrow * mixed  # what the last projection reads
    if hidden is not None:
        products += narrow * 2 * hidden
        whole += residual + narrow * (layer.dim + 3 * hidden)
    if config.remat == "layer":
        return residual, whole
    if config.remat == "recurrence":
        return residual + products, whole
    return whole, whole


def _checkpoint_bytes(
    layer: E88Config, batch: int, length: int, narrow: int, implementation: str
) -> int:
    every, width = layer.saved_state_interval, _FLOAT
    if implementation == "mosaic_gpu":
        every = SAVED_STATE_GROUP if every <= MAX_GROUPED_INTERVAL else every
        width = narrow
    return width * batch * math.ceil(length / every) * state_per_layer(layer)
