"""Where a process stands among the processes of a run, from its flags or from SLURM or Open MPI;
needs no JAX."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from experiments.cli import require
from experiments.cli.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Processes of a run on several hosts, or on one: the same command with another --process each.
    SLURM's srun and Open MPI's mpirun need no flags."""

    coordinator: str | None = None
    """HOST:PORT at which the first process can be reached; the same for all."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Which of them this is, from 0; process 0 writes and prints."""

    def __post_init__(self) -> None:
        require(self, "processes", minimum=1)
        require(self, "process", minimum=0)
        if (self.processes is None) != (self.process is None):
            raise ValueError("--processes and --process go together: give both or none.")
        if self.processes is not None and self.coordinator is None:
            raise ValueError("--processes and --process need --coordinator HOST:PORT.")
        if self.process is not None and self.processes and self.process >= self.processes:
            raise ValueError(
                f"--process must be from 0 to {self.processes - 1}, as --processes is "
                f"{self.processes}, got {self.process}."
            )
        if self.coordinator is not None and not re.fullmatch(r"\S+:[0-9]{1,5}", self.coordinator):
            raise ValueError(
                f"--coordinator must be HOST:PORT, such as node1:1234, got {self.coordinator!r}."
            )


class Place(NamedTuple):
    """A process among those of a run."""

    coordinator: str | None
    """HOST:PORT; None where JAX finds it in the environment."""
    process: int
    processes: int
    on_host: tuple[int, int] | None = None
    """Which of the processes of its host this is, and their number; None if nobody says."""

    def gpus(self, visible: int) -> list[int] | None:
        """The GPUs of this process, of those that it sees; None leaves all to it.

        A launcher may let each process see a GPU of its own; where they see the same ones, each
        takes an equal part.

        Raises:
            UsageError: the GPUs do not divide over the processes.
        """
        if self.on_host is None or visible == 0:
            return None
        process, processes = (0, 1) if visible == 1 else self.on_host
        if visible % processes:
            raise UsageError(
                f"{visible} GPUs do not divide over the {processes} processes of this host: start "
                f"one for each GPU, or one for all."
            )
        each = visible // processes
        return list(range(process * each, (process + 1) * each))


def place_of(launch: LaunchConfig, environment: Mapping[str, str]) -> Place | None:
    """The place of this process; None if it is alone.

    Raises:
        UsageError: a launcher started several processes and does not say where the first one is.
    """
    if launch.process is not None and launch.processes is not None:
        place = Place(launch.coordinator, launch.process, launch.processes)
        return None if place.processes == 1 else place
    found = _by_slurm(environment) or _by_open_mpi(environment)
    if found is None and launch.coordinator is not None:
        raise UsageError(
            "--coordinator needs --processes and --process, unless SLURM or Open MPI has started "
            "this process."
        )
    if found is None or found.processes == 1:
        return None
    return found._replace(coordinator=launch.coordinator)


def _by_slurm(environment: Mapping[str, str]) -> Place | None:
    """As `srun` says; its variables are there in a job's steps only."""
    names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES"
    if not all(environment.get(name, "").isdecimal() for name in names):
        return None
    process, processes, local, hosts = (int(environment[name]) for name in names)
    if processes % hosts:
        raise UsageError(
            f"SLURM started {processes} tasks on {hosts} nodes: give each node as many, by "
            f"--ntasks-per-node."
        )
    return Place(None, process, processes, (local, processes // hosts))


def _by_open_mpi(environment: Mapping[str, str]) -> Place | None:
    """As `mpirun` says."""
    names = (f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    found = [environment.get(name, "") for name in names]
    if not all(value.isdecimal() for value in found):
        return None
    process, processes, local, on_host = map(int, found)
    return Place(None, process, processes, (local, on_host))


def visible_gpus(environment: Mapping[str, str]) -> int:
    """NVIDIA's GPUs that this process may use."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([x for x in chosen.split(",") if x.strip()])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()])
