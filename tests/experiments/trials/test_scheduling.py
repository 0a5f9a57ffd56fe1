"""Work over several devices: each cell is done once, by one of them, in its order."""

import itertools
import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from experiments.trials.scheduling import Schedule


def works(cells: int) -> list[Any]:
    """A search and a run for each cell."""
    return [
        SimpleNamespace(cell=cell, kind=kind, lane_steps=10)
        for cell, kind in itertools.product(range(cells), ("search", "run"))
    ]


class Device:
    """A runner that notes what it does."""

    def __init__(self, error: Exception | None = None, meet: threading.Barrier | None = None):
        self.done: list[Any] = []
        self.prepared: list[Any] = []
        self.closed = False
        self._error, self._meet = error, meet

    def prepare(self, work: Any) -> None:
        self.prepared.append(work)

    def run(self, work: Any, advanced: Any) -> None:
        if self._meet is not None:
            self._meet.wait(timeout=60)
        if self._error is not None:
            raise self._error
        assert work in self.prepared
        for steps in (4, 8):
            advanced(steps)
        self.done.append(work)

    def close(self) -> None:
        self.closed = True


class Slow(Device):
    """One whose work does not end."""

    def run(self, work: Any, advanced: Any) -> None:
        for _ in range(6000):
            time.sleep(0.01)
            advanced(1)
        raise AssertionError("nothing has stopped it")


class Watch:
    """Callbacks that note the reports of a schedule."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.finished: list[int] = []
        self.failed: list[tuple[int, str]] = []

    def schedule(self, left: list[Any], end: float | None = None) -> Schedule:
        return Schedule(
            left,
            advanced=self._advanced,
            finished=self._finished,
            failed=self._failed,
            end=end,
        )

    def _failed(self, work: Any, error: Exception) -> None:
        self.failed.append((work.cell, str(error)))

    def _advanced(self, work: Any, steps: int) -> None:
        del work
        self.steps.append(steps)

    def _finished(self, work: Any, done: int, seconds: float) -> None:
        assert work.lane_steps == 10
        assert seconds >= 0
        self.finished.append(done)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_cell_is_done_once_by_one_device(n: int) -> None:
    left, devices, watch = works(7), [Device() for _ in range(n)], Watch()
    runners: Any = devices
    assert watch.schedule(left).run(runners)
    by_device = [[(work.cell, work.kind) for work in device.done] for device in devices]
    for done in by_device:
        assert [kind for _, kind in done] == ["search", "run"] * (len(done) // 2)
        assert [cell for cell, _ in done] == sorted(cell for cell, _ in done)
    every = sorted(itertools.chain(*by_device))
    assert every == sorted((work.cell, work.kind) for work in left)
    assert watch.finished == list(range(1, 15))
    assert watch.steps == sorted(watch.steps)
    assert watch.steps[-1] == 10 * len(left)
    assert all(device.closed for device in devices)


def test_devices_work_at_the_same_time() -> None:
    """Each waits in every piece of work until the other is in one."""
    meet = threading.Barrier(2)
    devices: Any = [Device(meet=meet), Device(meet=meet)]
    assert Watch().schedule(works(2)).run(devices)
    assert [len(device.done) for device in devices] == [2, 2]


class FailingOn(Device):
    """One on which some cells fail as JAX reports it."""

    def __init__(self, *cells: int):
        super().__init__()
        self._cells = cells

    def run(self, work: Any, advanced: Any) -> None:
        if work.cell in self._cells:
            raise jax.errors.JaxRuntimeError("out of memory")
        super().run(work, advanced)


def test_a_cell_that_fails_costs_no_other() -> None:
    device, watch = FailingOn(1, 3), Watch()
    runners: Any = [device]
    assert not watch.schedule(works(5)).run(runners)
    assert watch.failed == [(1, "out of memory"), (3, "out of memory")]
    assert [work.cell for work in device.done] == [0, 0, 2, 2, 4, 4]
    assert device.closed


def test_a_device_that_is_broken_takes_no_more_and_leaves_its_next_cell_to_others() -> None:
    class After(Device):
        """One whose first cell ends when the other device has given up."""

        def run(self, work: Any, advanced: Any) -> None:
            while len(watch.failed) < 2:
                time.sleep(0.01)
            super().run(work, advanced)

    watch, broken, other = Watch(), FailingOn(*range(9)), After()
    devices: Any = [other, broken]
    assert not watch.schedule(works(9)).run(devices)
    lost = {cell for cell, _ in watch.failed}
    assert len(lost) == 2
    assert sorted({work.cell for work in other.done} | lost) == list(range(9))


def test_an_error_of_the_program_on_one_device_stops_the_others() -> None:
    devices: Any = [Slow(), Device(error=ValueError("no such shape"))]
    with pytest.raises(ValueError, match="no such shape"):
        Watch().schedule(works(4)).run(devices)
    assert all(device.closed for device in devices)


def test_nothing_begins_after_the_end() -> None:
    device, watch = Device(), Watch()
    runners: Any = [device]
    assert not watch.schedule(works(2), end=time.monotonic() - 1).run(runners)
    assert device.closed
    assert (device.prepared, device.done, watch.finished) == ([], [], [])


def test_the_end_comes_between_a_search_and_its_run() -> None:
    class Late(Device):
        def run(self, work: Any, advanced: Any) -> None:
            super().run(work, advanced)
            while time.monotonic() <= end:
                time.sleep(0.01)

    end = time.monotonic() + 0.2
    device, watch = Late(), Watch()
    runners: Any = [device]
    assert not watch.schedule(works(2), end=end).run(runners)
    assert [(work.cell, work.kind) for work in device.done] == [(0, "search")]


def test_an_interrupt_while_the_first_cells_are_prepared_leaves_nothing_open() -> None:
    class Interrupted(Device):
        def prepare(self, work: Any) -> None:
            raise KeyboardInterrupt

    devices: Any = [Device(), Interrupted()]
    with pytest.raises(KeyboardInterrupt):
        Watch().schedule(works(3)).run(devices)
    assert all(device.closed for device in devices)
