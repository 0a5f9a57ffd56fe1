"""State and training memory of a configuration, in bytes, without building it."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

from e88_jax.checks import require_choice, require_divisor, require_instance, require_int
from e88_jax.config import LMConfig
from e88_jax.hardware import GPU
from e88_jax.mixers.base import (
    DTYPE_BYTES,
    Activations,
    Dtype,
    EstimatesMemory,
    Execution,
    Implementation,
    MixerConfig,
)

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
    return DTYPE_BYTES[require_choice("dtype", dtype, get_args(Dtype))]


HOPPER = (9, 0)
"""Compute capability of the GPUs that the kernels of jax-linear-attention are for."""


def implementation_on(gpu: GPU | None, mixer: MixerConfig) -> Implementation:
    """The fastest implementation of a mixer on the GPU: kernels if it has them, or if none is
    given.

    Those of Gated DeltaNet and Mamba2 are for Hopper GPUs; elsewhere the chunk form is counted,
    also where E88's kernels take the heads of Gated DeltaNet, with less memory.
    """
    if gpu is None:
        return "mosaic_gpu"
    of_hopper = mixer.kind in ("gated_deltanet", "mamba2")
    runs = gpu.compute_capability == HOPPER if of_hopper else gpu.has_kernels
    return "mosaic_gpu" if runs else "chunked"


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Peak bytes of one training step on one GPU: at the start of the backward pass, with all
    activations, or at its end, with all gradients."""

    parameters: int
    optimizer: int
    gradients: int
    """Gradients; those of matmuls' weights are in the compute dtype, a layer's for each chunk."""
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


def require_step(config: LMConfig, batch: int, length: int, fsdp: int) -> tuple[int, int, int]:
    """Sequences of a step, tokens of each and GPUs, as plain integers.

    Raises:
        TypeError: one is no integer.
        ValueError: one is below 1, or the batch or the model's dim does not divide over the GPUs.
    """
    batch, length = require_int("batch", batch), require_int("length", length)
    fsdp = require_int("fsdp", fsdp)
    require_divisor("batch", batch, "fsdp", fsdp)
    require_divisor("dim", config.dim, "fsdp", fsdp)
    return batch, length, fsdp


def training_memory(
    config: LMConfig,
    batch: int,
    length: int,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    implementation: Implementation | Callable[[MixerConfig], Implementation] = "mosaic_gpu",
    moments: int = 2,
    fsdp: int = 1,
) -> TrainingMemory:
    """An estimate of the memory of one training step on a GPU.

    It counts the arrays that XLA leaves from the forward to the backward pass; the mixers'
    configurations say what their layers leave (`EstimatesMemory`). Within 12 % of XLA's own figure
    for an H100 (`tests/sizing/test_memory.py`), but for `remat` of layers that run by chunks or
    step by step, LSTM among them: these need two or three times as much, as XLA keeps to the end
    what the gradients of their weights read. Gradients that are accumulated over several passes are
    not counted.

    Args:
        config: the model. Of its execution `remat`, `saved_state_interval` and `time_chunks` are
            read.
        batch: sequences.
        length: tokens of each.
        dtype: compute dtype, and that of the gradients of matmuls' weights; parameters and
            optimizer are float32.
        implementation: of the mixers' recurrences, or a function that says it of each. Where a
            mixer lacks "mosaic_gpu", or its sizes are not for it, "chunked" is counted, and where
            it lacks that, "scan".
        moments: numbers that the optimizer keeps for each parameter: 2 for AdamW.
        fsdp: GPUs that sequences, weights and optimizer state are divided over (`--mesh fsdp=4`);
            the bytes are those of one of them.

    Raises:
        TypeError: an argument of another type.
        ValueError: a batch, length or fsdp below 1, a batch or dim that does not divide over fsdp,
            moments below 0, an unknown dtype or implementation, or a mixer whose configuration has
            no `activations`.
    """
    require_instance("config", config, LMConfig)
    batch, length, fsdp = require_step(config, batch, length, fsdp)
    batch //= fsdp
    moments = require_int("moments", moments, minimum=0)
    narrow, tokens, n_params = _bytes_of(dtype), batch * length, config.count_params()
    remat, n_chunks = config.execution.remat, config.execution.time_chunks
    if length % n_chunks:
        n_chunks = 1
    in_chunks = (n_chunks - 1) * (n_params - config.vocab_size * config.dim)
    by_layer: dict[MixerConfig, Activations] = {}
    for mixer in set(config.layers):
        name = implementation(mixer) if callable(implementation) else implementation
        require_choice("implementation", name, get_args(Implementation))
        execution = dataclasses.replace(config.execution, dtype=dtype, implementation=name)
        by_layer[mixer] = _of_layer(config, mixer, length, execution)
    kept, saved_states, working = 0, 0, 0
    for layer in map(by_layer.__getitem__, config.mixers):
        states = batch * layer.saved_states
        whole = _FLOAT * config.dim + layer.matmuls + layer.others
        if remat == "none":
            kept += tokens * whole
            saved_states += states
            recomputed = 0
        else:
            matmuls = layer.matmuls if remat == "recurrence" else 0
            kept += tokens * (_FLOAT * config.dim + matmuls)
            recomputed = tokens * (layer.matmuls + layer.others - matmuls) + states
        working = max(working, recomputed + tokens * layer.working)
    # The weights once more, a layer's for each chunk: cast to bfloat16, or joined in float32.
    # Weights gathered over `fsdp` are kept also with remat.
    copies = narrow * (n_params + in_chunks) if remat == "none" or fsdp > 1 else 0
    between_chunks = (n_chunks - 1) * batch * state_bytes(config)
    of_device = -(-n_params // fsdp)
    working += tokens * (3 * narrow + _FLOAT) * config.dim
    working += 2 * _FLOAT * tokens * config.vocab_size
    return TrainingMemory(
        parameters=_FLOAT * of_device,
        optimizer=_FLOAT * moments * of_device,
        gradients=narrow * (of_device + in_chunks),
        activations=copies + kept + between_chunks,
        saved_states=saved_states,
        working=working,
    )


def _of_layer(
    config: LMConfig, mixer: MixerConfig, length: int, execution: Execution
) -> Activations:
    """Bytes of a block beside its input: of the norm, the mixer and the channel mixer."""
    if not isinstance(mixer, EstimatesMemory):
        raise ValueError(
            f"training memory is estimated for mixers whose configuration has the method "
            f"activations; that of {mixer.kind} has none."
        )
    own = mixer.activations(config.dim, length, execution)
    narrow = _bytes_of(execution.dtype or "float32")
    matmuls, others = own.matmuls, own.others + narrow * config.dim  # the norm's output
    if (hidden := config.channel_mixer_dim) is not None:
        matmuls += narrow * 2 * hidden
        others += _FLOAT * config.dim + narrow * (config.dim + hidden)
    return own._replace(matmuls=matmuls, others=others)
