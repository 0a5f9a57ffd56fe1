"""Whether a configuration is well proportioned, and what to change where it is not."""

import dataclasses
import functools
import itertools
from fractions import Fraction
from typing import Literal, get_args

from e88_jax.checks import require_int
from e88_jax.config import LMConfig
from e88_jax.hardware import GPU, require_gpu
from e88_jax.mixers.base import Remat
from e88_jax.sizing.guide import d_inner_of, e88_layer
from e88_jax.sizing.memory import implementation_on, require_step, training_memory
from pallas_kernels.limits import MAX_SIZE, SIZE_MULTIPLE, takes_size

GPUS_OF_A_HOST = (2, 4, 8)
"""Numbers of GPUs that are proposed where one is too small: the fewest that do, with as little
recomputed as on these."""
Band = Literal[
    "severe bottleneck", "mild bottleneck", "balanced", "over-provisioned d_inner", "wasteful"
]


def balance(dim: int, d_inner: int) -> Band:
    """The sizing guide's band of dim / d_inner.

    Its bands share their borders; here 0.8 and 1.2 are balanced, 0.5 over-provisioned, and 2 a mild
    bottleneck, as the guide has "> 2.0" and "< 0.5".

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1.
    """
    ratio = Fraction(require_int("dim", dim), require_int("d_inner", d_inner))
    if ratio > 2:
        return "severe bottleneck"
    if ratio > Fraction(6, 5):
        return "mild bottleneck"
    if ratio >= Fraction(4, 5):
        return "balanced"
    if ratio >= Fraction(1, 2):
        return "over-provisioned d_inner"
    return "wasteful"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to change, or to know."""

    problem: str
    change: str
    """The remedy."""

    def __str__(self) -> str:
        return f"{self.problem}: {self.change}."


def check(
    config: LMConfig,
    gpu: GPU | None = None,
    *,
    batch: int = 1,
    length: int = 2048,
    fsdp: int = 1,
) -> list[Finding]:
    """Findings by the sizing guide's anti-patterns, the kernels' limits and a GPU's memory.

    Args:
        config: the model.
        gpu: to train it on; None for what holds on any.
        batch, length: sequences of a step and tokens of each, for the memory.
        fsdp: GPUs of a step, as of `training_memory`.

    Raises:
        TypeError: an argument of another type.
        ValueError: a batch, length or fsdp below 1, a batch or dim that does not divide over fsdp,
            or a model of other layers than equal E88 layers.
    """
    e88_layer(config)
    require_gpu(gpu)
    batch, length, fsdp = require_step(config, batch, length, fsdp)
    findings = _proportions(config)
    if gpu is None:
        return findings
    return findings + _limits(config, gpu) + _memory(config, gpu, batch, length, fsdp)


def _proportions(config: LMConfig) -> list[Finding]:
    layer, d_inner = e88_layer(config), d_inner_of(config)
    band = balance(config.dim, d_inner)
    if band == "balanced":
        return []
    heads = max(1, round(config.dim / layer.n_state))
    ratio = f"dim / d_inner is {config.dim / d_inner:.3g} ({band})"
    if band == "severe bottleneck":
        problem = f"few heads for a large dim, {ratio}"
    else:
        problem = f"dim and d_inner are far apart, {ratio}"
    return [Finding(problem, f"take {heads} heads, or a dim near {d_inner}")]


def _limits(config: LMConfig, gpu: GPU) -> list[Finding]:
    layer = e88_layer(config)
    findings: list[Finding] = []
    if not gpu.has_kernels:
        needs = "for the kernels take one such as an H100"
        findings.append(Finding(f"{gpu.name} runs the recurrence by lax.scan", needs))
    else:
        for name, size in (("n_state", layer.n_state), ("n_value", layer.n_value)):
            if not takes_size(size):
                findings.append(
                    Finding(
                        f"{name} {size} is not for the kernels, so lax.scan runs it",
                        f"take a multiple of {SIZE_MULTIPLE} up to {MAX_SIZE}",
                    )
                )
    return findings


def _memory(config: LMConfig, gpu: GPU, batch: int, length: int, fsdp: int) -> list[Finding]:
    implementation = functools.partial(implementation_on, gpu)

    def needed_gb(remat: Remat, n: int) -> float:
        execution = dataclasses.replace(config.execution, remat=remat)
        model = dataclasses.replace(config, execution=execution)
        memory = training_memory(model, batch, length, implementation=implementation, fsdp=n)
        return memory.total / 1e9

    own = config.execution.remat
    needed = needed_gb(own, fsdp)
    if needed <= gpu.memory_GB:
        return []
    over = [n for n in GPUS_OF_A_HOST if n > fsdp and batch % n == 0 and config.dim % n == 0]
    remedy = "take fewer sequences, shorter ones or a smaller model"
    for n, remat in itertools.product((fsdp, *over), get_args(Remat)):
        if (less := needed_gb(remat, n)) <= gpu.memory_GB:
            how = [f"remat {remat!r}"] if remat != own else []
            how += [f"{n} GPUs (--mesh fsdp={n})"] if n != fsdp else []
            takes = f"which takes {less:.0f} GB" + (" of each" if n > 1 else "")
            remedy += f", or {' over '.join(how)}, {takes}"
            break
    of_each = f" of each of {fsdp} GPUs" if fsdp > 1 else ""
    problem = f"training takes about {needed:.0f} GB{of_each} at batch {batch} and length {length}"
    return [Finding(f"{problem}, of {gpu.memory_GB} GB", remedy)]
