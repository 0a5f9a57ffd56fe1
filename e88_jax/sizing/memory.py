"""State and training memory of a configuration, in bytes, without building it."""

import dataclasses
import math
from typing import Literal, get_args

from e88_jax.checks import require_choice, require_instance, require_int
from e88_jax.config import E88Config, LMConfig
from e88_jax.hardware import GPU
from e88_jax.mixers.base import Implementation, MixerConfig, Remat
from pallas_kernels.limits import MAX_GROUPED_INTERVAL, SAVED_STATE_GROUP, takes_size

_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
_FLOAT = 4


def state_bytes(config: LMConfig, dtype: str = "float32") -> int:
    """Bytes of the recurrent state of all layers, for one sequence. Decoding keeps float32.

    Raises:
        TypeError: no LMConfig.
        ValueError: an unknown dtype.
    """
    require_instance("config", config, LMConfig)
    return config.state_size() * _bytes_of(dtype)


def _bytes_of(dtype: str) -> int:
    return _BYTES[require_choice("dtype", dtype, tuple(_BYTES))]


def implementation_on(gpu: GPU | None, layer: E88Config) -> Implementation:
    """Implementation of the layer's recurrence on the GPU; without one, the kernels if they can."""
    fits = takes_size(layer.n_state) and takes_size(layer.n_value)
    return "mosaic_gpu" if fits and (gpu is None or gpu.has_kernels) else "scan"


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Peak bytes of one training step on one GPU: at the start of the backward pass, with all
    activations, or at its end, with all gradients."""

    parameters: int
    optimizer: int
    gradients: int
    """Gradients; those of matmuls' weights are in the compute dtype."""
    activations: int
    """Arrays that the backward pass reads, without saved states but with copies of weights in the
    compute dtype."""
    saved_states: int
    """The recurrence's."""
    working: int
    """Temporary arrays: logits, gradients of activations, recomputed arrays."""

    @property
    def total(self) -> int:
        kept = max(self.gradients, self.activations + self.saved_states)
        return self.parameters + self.optimizer + kept + self.working


def training_memory(
    config: LMConfig,
    batch: int,
    length: int,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    implementation: Implementation = "mosaic_gpu",
    moments: int = 2,
) -> TrainingMemory:
    """An estimate of the memory of one training step on a GPU.

    It counts the arrays that XLA leaves from the forward to the backward pass of a model of E88
    layers: it recomputes what is elementwise where it reads it. Within 12 % of XLA's own figure for
    an H100 (`tests/sizing/test_memory.py`). Gradients that are accumulated over several passes are
    not counted.

    Args:
        config: the model. Of its execution only `remat` and `saved_state_interval` are read.
        batch: sequences.
        length: tokens of each.
        dtype: compute dtype, and that of the gradients of matmuls' weights; parameters and
            optimizer are float32.
        implementation: of the recurrence.
        moments: numbers that the optimizer keeps for each parameter: 2 for AdamW.

    Raises:
        TypeError: an argument of another type.
        ValueError: a batch or length below 1, moments below 0, an unknown dtype or implementation,
            or a layer of another kind.
    """
    require_instance("config", config, LMConfig)
    batch, length = require_int("batch", batch), require_int("length", length)
    moments = require_int("moments", moments, minimum=0)
    require_choice("implementation", implementation, get_args(Implementation))
    narrow, tokens, n_params = _bytes_of(dtype), batch * length, config.count_params()
    remat, interval = config.execution.remat, config.execution.saved_state_interval
    activations, saved_states, recomputed = 0, 0, 0
    for layer in map(_require_e88, config.mixers):
        states = _saved_state_bytes(layer, interval, batch, length, narrow, implementation)
        kept, whole = _kept_per_token(config, layer, narrow, implementation)
        activations += tokens * kept
        if remat == "none":
            saved_states += states
        else:
            recomputed = max(recomputed, tokens * (whole - kept) + states)
    # The weights once more: cast to bfloat16, or joined in float32.
    copies = narrow * n_params if remat == "none" else 0
    working = tokens * (3 * narrow + _FLOAT) * config.dim + 2 * _FLOAT * tokens * config.vocab_size
    return TrainingMemory(
        parameters=_FLOAT * n_params,
        optimizer=_FLOAT * moments * n_params,
        gradients=narrow * n_params,
        activations=copies + activations,
        saved_states=saved_states,
        working=working + recomputed,
    )


def _require_e88(layer: MixerConfig) -> E88Config:
    if not isinstance(layer, E88Config):
        raise ValueError(f"training memory is estimated for e88 layers, got one of {layer.kind}.")
    return layer


def _kept_per_token(
    config: LMConfig, layer: E88Config, narrow: int, implementation: Implementation
) -> tuple[int, int]:
    """Bytes that a layer keeps of each token for its backward pass, but for saved states, and what
    it would keep if nothing were recomputed."""
    hidden = config.channel_mixer_dim
    residual = _FLOAT * config.dim
    keys, values = layer.n_heads * layer.n_state, layer.n_heads * layer.n_value
    streams = layer.n_heads * layer.head_columns
    per_head = layer.decay_mode in ("mamba", "simple")
    per_head += layer.write_gate + (layer.head_mix == "input_weighted")
    read = streams + (values if layer.output_gate != "none" else 0) + per_head * layer.n_heads
    matmuls = narrow * read
    whole = residual + matmuls + narrow * config.dim  # the norm's input and output
    whole += narrow * (2 * keys + values)  # q, k and out of the recurrence
    interval = config.execution.saved_state_interval
    groups = implementation == "mosaic_gpu" and interval <= MAX_GROUPED_INTERVAL
    # v, or the kernel's delta; XLA copies what a loop reads.
    whole += _FLOAT * values if groups else narrow * (2 * keys + 2 * values)
    if layer.use_l2_norm:
        whole += _FLOAT * 2 * layer.n_heads
    if layer.conv_size is not None:
        whole += narrow * streams
    if layer.output_gate != "none" or layer.head_mix not in ("concat", "per_head"):
        mixed = values if layer.head_mix in ("concat", "per_head") else layer.n_value
        whole += narrow * mixed  # what the output projection reads
    if hidden is not None:
        matmuls += narrow * 2 * hidden
        whole += residual + narrow * (config.dim + 3 * hidden)
    kept: dict[Remat, int] = {
        "none": whole,
        "recurrence": residual + matmuls,
        "layer": residual,
    }
    return kept[config.execution.remat], whole


def _saved_state_bytes(
    layer: E88Config,
    interval: int,
    batch: int,
    length: int,
    narrow: int,
    implementation: Implementation,
) -> int:
    width = _FLOAT
    if implementation == "mosaic_gpu":
        interval = SAVED_STATE_GROUP if interval <= MAX_GROUPED_INTERVAL else interval
        width = narrow
    state = layer.n_heads * layer.n_state * layer.n_value
    return width * batch * math.ceil(length / interval) * state
