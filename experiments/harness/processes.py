"""The processes of a run, on JAX's distributed runtime: how they start, agree and end.

Every process makes the same calls in the same order. The first one writes and prints.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from e88_jax import command
from e88_jax.command import ProgramEnd
from experiments.cli.errors import RunStopped, UsageError

from .launch import LaunchConfig, Place, place_of, visible_gpus

Plain = TypeVar("Plain")
"""Plain data for JSON."""

HEARTBEAT_SECONDS = 30
"""A process silent for so long counts as dead, and the runtime ends the others."""
START_SECONDS = 300
"""Wait for all processes to start."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.index == 0

    def agree(self, decide: Callable[[], Plain]) -> Plain:
        """Result of `decide` in the first process, which alone calls it; plain data for JSON.

        Raises:
            RunStopped: in every process, where it raises a ProgramEnd in the first of several.
        """
        if self.count == 1:
            return decide()
        answer: dict[str, Any] = {}
        if self.is_first:
            try:
                answer = {"result": decide()}
            except ProgramEnd as end:
                answer = {"end": [str(end), end.exit_code]}
        answer = json.loads(self._from_first(json.dumps(answer).encode()))
        if "end" in answer:
            raise RunStopped(*answer["end"], of_all=True)
        return answer["result"]

    def _from_first(self, content: bytes) -> bytes:
        import numpy as np
        from jax.experimental import multihost_utils

        n = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
        sent = np.frombuffer(content if self.is_first else bytes(n), np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes()

    def stop_at(self, step: int) -> bool:
        """Whether all processes stop at the end of this step, as one of them had a SIGTERM; to be
        called at the end of each step.

        The runtime notes the signal, and chooses a step that no process has ended yet.
        """
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def joined(launch: LaunchConfig) -> Iterator[Processes]:
    """A context of all processes of the run, in which those after the first print nothing.

    Several processes start JAX on entering, and leave the context together. One that leaves it by
    an error of its own ends at once, as the others wait for it: the runtime ends them after
    `HEARTBEAT_SECONDS`.

    Raises:
        UsageError: the processes do not find each other.
    """
    place = place_of(launch, os.environ)
    if place is None:
        yield Processes()
        return
    _connect(place)
    here = Processes(place.process, place.processes)
    try:
        with contextlib.nullcontext() if here.is_first else _silent():
            from jax.experimental import multihost_utils

            from . import devices

            devices.set_up()
            yield here
            multihost_utils.sync_global_devices("end of the run")
    except BaseException as error:
        if not isinstance(error, RunStopped) or not error.of_all:
            prog = f"process {here.index} of {here.count}"
            os._exit(command.report(error, prog))  # JAX would wait for the others
        if here.is_first:
            raise
        raise SystemExit(error.exit_code) from None


def _connect(place: Place) -> None:
    import jax

    gpus = None
    if "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        gpus = place.gpus(visible_gpus(os.environ))
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=gpus,
            cluster_detection_method=None if place.coordinator is None else "deactivate",
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        at = "" if place.coordinator is None else f" at --coordinator {place.coordinator}"
        why = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(
            f"process {place.process} of {place.processes} did not find the others{at}: {why}."
        ) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
