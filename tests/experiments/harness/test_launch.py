"""Where a process stands among those of a run: flags, SLURM, Open MPI, and the GPUs of each."""

from pathlib import Path
from typing import Any

import pytest

from experiments import cli
from experiments.cli.errors import UsageError
from experiments.harness.launch import LaunchConfig, Place, place_of, visible_gpus

FLAGS = LaunchConfig(coordinator="node1:1234", processes=4, process=2)
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("launch", "environment", "place"),
    [
        (LaunchConfig(), {}, None),
        (FLAGS, {}, Place("node1:1234", 2, 4)),
        (FLAGS, SLURM, Place("node1:1234", 2, 4)),
        (LaunchConfig(coordinator="a:1", processes=1, process=0), {}, None),
        (LaunchConfig(), SLURM, Place(None, 5, 8, (1, 4))),
        (LaunchConfig(coordinator="a:1"), SLURM, Place("a:1", 5, 8, (1, 4))),
        (LaunchConfig(), SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        (LaunchConfig(), OPEN_MPI, Place(None, 3, 4, (1, 2))),
        # A batch script of SLURM, outside of srun.
        (LaunchConfig(), {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None),
    ],
)
def test_place(launch: LaunchConfig, environment: dict[str, str], place: Place | None) -> None:
    assert place_of(launch, environment) == place


def test_a_coordinator_alone() -> None:
    with pytest.raises(UsageError, match="needs --processes and --process"):
        place_of(LaunchConfig(coordinator="a:1"), {})


def test_nodes_with_different_numbers_of_tasks() -> None:
    with pytest.raises(UsageError, match="7 tasks on 2 nodes"):
        place_of(LaunchConfig(), SLURM | {"SLURM_STEP_NUM_TASKS": "7"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--process", "0"], "--processes and --process go together"),
        (["--process", "0", "--processes", "2"], "need --coordinator HOST:PORT"),
        (
            ["--process", "2", "--processes", "2", "--coordinator", "a:1"],
            "--process must be from 0 to 1, as --processes is 2, got 2",
        ),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--coordinator", "node1"], "must be HOST:PORT, such as node1:1234, got 'node1'"),
    ],
)
def test_mistakes(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cli.parse(LaunchConfig, flags)


@pytest.mark.parametrize(
    ("on_host", "visible", "gpus"),
    [
        (None, 4, None),  # nobody says how many processes the host has
        ((0, 1), 0, None),
        ((0, 1), 4, [0, 1, 2, 3]),
        ((1, 4), 4, [1]),
        ((1, 2), 4, [2, 3]),
        ((3, 4), 1, [0]),  # the launcher shows each its own
    ],
)
def test_gpus(on_host: Any, visible: int, gpus: list[int] | None) -> None:
    assert Place(None, 0, 8, on_host).gpus(visible) == gpus


def test_gpus_that_do_not_divide() -> None:
    with pytest.raises(UsageError, match="4 GPUs do not divide over the 3 processes"):
        Place(None, 0, 3, (0, 3)).gpus(4)


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,3"}) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    names = "nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"
    monkeypatch.setattr(Path, "glob", lambda *_: [Path("/dev") / name for name in names])
    assert visible_gpus({}) == 2
