"""The cells of a suite over the devices of a machine.

A device takes the next cell, to compile it, when it begins one: at the end one may wait for a
device while another has nothing to do.

A cell that fails by what JAX reports, such as too little memory, is left, and the next one begun. A
device on which two fail in a row begins no other: after some errors nothing runs there.
"""

import collections
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack

import jax

from .running import Runner, Work

MOST_FAILURES = 2
"""Cells that fail in a row before their device begins no other."""


class _StoppedError(Exception):
    """Another device's thread has failed, or the user has stopped the program."""


class Schedule:
    """Work, divided over runners.

    Args:
        left: the work; that of one cell follows in a row, and one runner does it.
        advanced: called with work, and with the steps of all work that are done.
        finished: called with work that is done, the number of such, and its seconds.
        failed: called with work that failed, and its error; the rest of its cell is left.
        end: nothing new begins after this time of `time.monotonic`; None for no end.

    The callbacks are never called by two threads at once.
    """

    def __init__(
        self,
        left: Sequence[Work],
        *,
        advanced: Callable[[Work, int], None],
        finished: Callable[[Work, int, float], None],
        failed: Callable[[Work, Exception], None],
        end: float | None = None,
    ):
        cells = itertools.groupby(left, key=lambda work: work.cell)
        self._jobs = collections.deque(list(job) for _, job in cells)
        self._total, self._end = len(left), end
        self._advanced, self._finished, self._failed = advanced, finished, failed
        self._steps = self._done = 0
        self._lock, self._stop = threading.Lock(), threading.Event()

    def run(self, runners: Sequence[Runner]) -> bool:
        """Does the work; returns whether all of it is done."""
        with ExitStack() as stack:
            for runner in runners:
                stack.callback(runner.close)
            threads = ThreadPoolExecutor(len(runners), thread_name_prefix="device")
            stack.enter_context(threads)
            try:
                # Each has its first cell before any compiles its second.
                first = [(runner, self._take(runner)) for runner in runners]
                for future in as_completed(threads.submit(self._drive, *x) for x in first):
                    future.result()
            except BaseException:
                self._stop.set()
                raise
        return self._done == self._total

    def _drive(self, runner: Runner, ahead: list[Work]) -> None:
        """Does cell after cell, and compiles the next while one runs."""
        failures = 0
        while job := ahead:
            ahead = self._take(runner)
            failures = 0 if self._do_cell(runner, job) else failures + 1
            if failures == MOST_FAILURES:
                with self._lock:
                    self._jobs.extendleft([ahead] if ahead else [])
                return

    def _do_cell(self, runner: Runner, job: list[Work]) -> bool:
        """Whether it has not failed."""
        for work in job:
            if self._is_over():
                break
            try:
                self._do(runner, work)
            except jax.errors.JaxRuntimeError as error:
                with self._lock:
                    self._failed(work, error)
                return False
        return True

    def _take(self, runner: Runner) -> list[Work]:
        """The work of another cell, which the runner begins to compile; none if there is none."""
        if self._is_over():
            return []
        with self._lock:
            job = self._jobs.popleft() if self._jobs else []
        for work in job:
            runner.prepare(work)
        return job

    def _is_over(self) -> bool:
        return self._stop.is_set() or (self._end is not None and time.monotonic() > self._end)

    def _do(self, runner: Runner, work: Work) -> None:
        began, counted = time.perf_counter(), 0

        def count(steps: int) -> None:
            nonlocal counted
            if self._stop.is_set():
                raise _StoppedError
            with self._lock:
                self._steps += steps - counted
                counted = steps
                self._advanced(work, self._steps)

        runner.run(work, count)
        count(work.lane_steps)  # also those that learning early has left out
        with self._lock:
            self._done += 1
            self._finished(work, self._done, time.perf_counter() - began)
