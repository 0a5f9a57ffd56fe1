"""The device that programs are built for: one answer for every part that asks.

The default is the local device; `use` sets another, to compile without the GPU and in tests.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from importlib import metadata
from typing import Protocol

from pallas_kernels.limits import (
    BEFORE_HOPPER_JAX,
    BULK_COPIES_FROM,
    COMPUTE_CAPABILITY_BELOW,
    MIN_COMPUTE_CAPABILITY,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A device; None for what its platform lacks or JAX does not know.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        name: the device's name.
        compute_capability: of an NVIDIA GPU, such as (9, 0).
        n_sms: number of SMs.
        shared_memory_per_block: bytes, the most that a kernel can opt in to.
        shared_memory_per_sm: bytes.
    """

    platform: str
    name: str
    compute_capability: tuple[int, int] | None = None
    n_sms: int | None = None
    shared_memory_per_block: int | None = None
    shared_memory_per_sm: int | None = None

    @property
    def has_bulk_copies(self) -> bool:
        """Whether it has bulk tensor copies; a device that is not known is taken for an H100."""
        return self.compute_capability is None or self.compute_capability >= BULK_COPIES_FROM

    @property
    def has_less_shared_memory(self) -> bool:
        """Whether a thread block can have less than on an H100; False if that is not known."""
        most = self.shared_memory_per_block
        assert H100.shared_memory_per_block is not None
        return most is not None and most < H100.shared_memory_per_block

    @property
    def uses_bulk_copies(self) -> bool:
        """Whether the kernels copy by bulk copies: with `cp.async` they need less shared memory."""
        return self.has_bulk_copies and not self.has_less_shared_memory


CPU = Target("cpu", "cpu")
H100 = Target(
    "gpu",
    "NVIDIA H100 80GB HBM3",
    compute_capability=(9, 0),
    n_sms=132,
    shared_memory_per_block=227 * 1024,
    shared_memory_per_sm=228 * 1024,
)
"""The SXM card. Sources: NVIDIA H100 Tensor Core GPU architecture white paper (SMs); CUDA C++
Programming Guide, technical specifications of compute capability 9.0 (shared memory)."""


class Device(Protocol):
    """Attributes of every `jax.Device`; NVIDIA GPUs have more."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def use(target: Target) -> Iterator[Target]:
    """Builds programs for `target` inside the context.

    A new thread starts outside of it: run its function by `contextvars.copy_context().run`. A
    jitted function that was traced before, outside or for another target, is not traced again.
    """
    token = _target.set(target)
    try:
        yield target
    finally:
        _target.reset(token)


def current() -> Target:
    """The target of the innermost `use`, else the first local device."""
    chosen = _target.get()
    if chosen is not None:
        return chosen
    import jax

    return of_device(jax.local_devices()[0])


def of_device(device: Device) -> Target:
    """The target of a JAX device."""
    version: str = getattr(device, "compute_capability", "")
    major, _, minor = version.partition(".")
    is_nvidia = major.isdecimal() and minor.isdecimal()
    name = device.device_kind
    return Target(
        device.platform,
        # An AMD GPU has an architecture, such as gfx90a, in the same place.
        f"{name} ({version})" if version and not is_nvidia else name,
        compute_capability=(int(major), int(minor)) if is_nvidia else None,
        n_sms=getattr(device, "core_count", None),
        shared_memory_per_block=getattr(device, "shared_memory_per_block_optin", None),
    )


def kernels_refusal(target: Target) -> str | None:
    """Why the kernels do not run there, as a clause without subject, or None if they do."""
    first, end = (_dotted(x) for x in (MIN_COMPUTE_CAPABILITY, COMPUTE_CAPABILITY_BELOW))
    needs = f"needs an NVIDIA GPU of compute capability {first} or later and below {end}"
    if target.platform != "gpu":
        return f"{needs}, got platform {target.platform!r}"
    capability = target.compute_capability
    if capability is None:
        return f"{needs}, got {target.name}"
    if MIN_COMPUTE_CAPABILITY <= capability < COMPUTE_CAPABILITY_BELOW:
        return None
    return f"{needs}, got {target.name} of {_dotted(capability)}"


def jax_refusal(target: Target) -> str | None:
    """Why this JAX cannot lower the kernels for it, as a clause without subject, or None."""
    if target.has_bulk_copies:
        return None
    version = metadata.version("jax")
    if tuple(map(int, version.split(".")[:2])) >= BEFORE_HOPPER_JAX:
        return None
    return f"needs JAX {_dotted(BEFORE_HOPPER_JAX)} or later on {target.name}, got {version}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
