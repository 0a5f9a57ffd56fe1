"""Checkpoints of a run: Orbax, written in the background, the newest few and the best kept."""

import contextlib
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from experiments.cli.errors import RunStopped, UsageError, warn
from experiments.tasks.base import Metric

from .checkpoint_files import CHECKSUMS, damage_of, reason, sha256_of, value_of
from .processes import Processes

Tree = Any
"""Nested tuples and dictionaries of arrays."""
Meta = dict[str, Any]
"""Plain data for JSON."""


class Checkpoints:
    """The checkpoints in a directory, by step.

    A checkpoint is committed with the checksums of its files, which are compared before it is
    restored. A damaged one is moved to `unreadable/` with a warning that names the file, and the
    one before it counts as the newest. A file that cannot be read for any other reason is an error,
    and nothing is moved. A checkpoint without checksums is restored with a warning.

    Processes that train together each write and read what their devices hold. The first one checks
    the files, and all do as it says.

    Args:
        directory: created with the first checkpoint.
        metric: decides which checkpoint is the best.
        keep: number of the newest kept, besides the best. None only reads and moves nothing, as
            another process may be writing.
        here: the processes that train.

    Raises:
        UsageError: a file cannot be read, though it is not damaged.
    """

    def __init__(
        self,
        directory: Path,
        metric: Metric,
        *,
        keep: int | None,
        here: Processes = Processes(),  # noqa: B008  (frozen)
    ):
        _print_no_errors_of_threads()
        self._directory = directory.absolute()
        self._metric = metric
        self._keep = keep
        self._here = here
        self._saving = 0
        self._values: dict[int, float] = {}
        self._manager: ocp.CheckpointManager | None = None
        for step, value in here.agree(self._read_values):
            self._note(step, value)

    def _read_values(self) -> list[tuple[int, float | None]]:
        """The metric of each step; moves what is damaged."""
        found: list[tuple[int, float | None]] = []
        for step in self._steps():
            why, value = value_of(self._directory / str(step), self._metric.name)
            found.append((step, value))
            if why is not None:
                self._move(step, why)
        return found

    @property
    def best(self) -> float | None:
        """The best value of the metric among the checkpoints; None if none was evaluated."""
        step = self._best([*self._values])  # also of a checkpoint that is still being written
        return None if step is None else self._values[step]

    def _steps(self) -> list[int]:
        """The steps that have a checkpoint, the newest first."""
        try:
            names = [path.name for path in self._directory.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        steps = (int(name) for name in names if name.isdecimal())
        return sorted((step for step in steps if str(step) in names), reverse=True)

    def _note(self, step: int, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self._values[step] = value

    def _best(self, steps: Sequence[int]) -> int | None:
        """The step with the best value, the newest of equal ones."""
        evaluated = (step for step in sorted(steps, reverse=True) if step in self._values)
        return min(evaluated, key=lambda x: self._metric.rank(self._values[x]), default=None)

    def _open(self) -> ocp.CheckpointManager:
        return _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=lambda metrics: metrics[self._metric.name],  # else metrics are not stored
                preservation_policy=_Preserve(self._preserved),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # `_values` has the metrics of earlier steps
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._write_checksums
                ),
            ),
        )

    def _preserved(self, steps: Sequence[int]) -> set[int | None]:
        assert self._keep is not None
        return {*sorted(steps)[-self._keep :], self._best(steps)}

    def _partial(self, step: int) -> Path:
        """Directory that Orbax writes a checkpoint to before renaming it."""
        return self._directory / f"{step}.orbax-checkpoint-tmp"

    def _write_checksums(self) -> None:
        """Called in Orbax's thread, after all is written and before the checkpoint is committed."""
        directory = self._partial(self._saving)
        # The files beside the items are still written to, and are not read again.
        files = [path for path in directory.glob("*/**/*") if path.is_file()]
        sums = {str(path.relative_to(directory)): sum_ for path, sum_ in sha256_of(files)}
        (directory / CHECKSUMS).write_text(json.dumps({"sha256": sums}, indent=1) + "\n")

    def save(self, step: int, state: Tree, meta: Meta, value: float | None) -> None:
        """Starts writing `state` (arrays) and `meta` (JSON); returns once they may change.

        `value` is the metric's, if the step was evaluated. A step that is there already is not
        written again.

        Raises:
            RunStopped: this checkpoint or the one before could not be written.
        """
        self.wait()
        if self._here.agree(lambda: step in self._steps()):
            return
        self._saving = step
        self._note(step, value)
        with self._stops_if_not_written():
            manager = self._manager = self._manager or self._open()
            saved = manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                metrics=None if value is None else {self._metric.name: value},
            )
        if not saved:
            raise RuntimeError(f"Orbax refused to save step {step} in {self._directory}.")

    def check(self) -> None:
        """Raises RunStopped if a checkpoint could not be written; does not wait for one."""
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for a checkpoint in progress; raises RunStopped if it could not be written."""
        if self._manager is not None:
            with self._stops_if_not_written():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _stops_if_not_written(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever Orbax and TensorStore raise
            if self._here.is_first:
                shutil.rmtree(self._partial(self._saving), ignore_errors=True)
            steps = self._steps()
            safe = f"that of step {steps[0]} is safe" if steps else "there is none before it"
            raise RunStopped(
                f"the checkpoint of step {self._saving} could not be written to "
                f"{self._directory} ({reason(error)}); "
                f"{safe}: continue with --out {self._directory.parent} --resume when it can be.",
                exit_code=1,
            ) from error

    def restore_latest(self, like: Tree) -> tuple[int, Tree, Meta] | None:
        """The newest whole `(step, state, meta)`, or None if nothing was ever saved.

        `like` gives structure, shapes and, if it holds arrays, the devices to restore to.

        Raises:
            UsageError: there are checkpoints, but all are damaged, or the newest whole one cannot
                be read or is of another structure; nothing was moved.
        """
        found = self._here.agree(self._newest_whole)
        if found is None:
            return None
        step, damaged = found
        restored = self._restore(step, like)
        if restored is None:  # its owner deleted it
            return self.restore_latest(like)
        for bad, why in damaged:
            self._values.pop(bad, None)
            if self._here.is_first:
                self._move(bad, why)
        return step, *restored

    def _newest_whole(self) -> tuple[int, list[tuple[int, str]]] | None:
        """The newest step that is whole, and the damaged ones after it, each with the damage."""
        steps, damaged = self._steps(), list[tuple[int, str]]()
        for step in steps:
            why = self._damage(step)
            if why is not None:
                damaged.append((step, why))
            elif (self._directory / str(step)).exists():
                return step, damaged
        if self._steps() != steps:  # another process went on training
            return self._newest_whole()
        if damaged:
            step, why = damaged[0]
            raise UsageError(
                f"none of the {len(damaged)} checkpoints in {self._directory} can be used; "
                f"in that of step {step}, {why}."
            )
        return None

    def restore_best(self, like: Tree) -> tuple[int, Tree, Meta] | None:
        """The best by the metric; `restore_latest` if that is damaged or nothing was evaluated."""
        best = self._best(self._steps())
        if best is not None:
            if why := self._damage(best):
                warn(f"the best checkpoint, {best}, is damaged: {why}.")
            elif (restored := self._restore(best, like)) is not None:
                return best, *restored
        return self.restore_latest(like)

    def _damage(self, step: int) -> str | None:
        """The damage to a checkpoint; None if it is whole, or was deleted."""
        directory = self._directory / str(step)
        if why := damage_of(directory):
            if self._keep is None:
                time.sleep(0.5)  # its owner may be deleting it
            return why if directory.exists() else None
        if directory.exists() and not (directory / CHECKSUMS).exists():
            warn(f"checkpoint {step} has no {CHECKSUMS}, so it is restored unchecked.")
        return None

    def _restore(self, step: int, like: Tree) -> tuple[Tree, Meta] | None:
        """A checkpoint that is not damaged; None if it was deleted."""
        directory = self._directory / str(step)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), like
        )
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(
                    directory,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
                    ),
                )
        except Exception as error:
            if not directory.exists():
                return None
            whole = "whole, but" if (directory / CHECKSUMS).exists() else "unchecked, and"
            raise UsageError(
                f"checkpoint {step} in {self._directory} is {whole} cannot be restored: "
                f"{reason(error)}. Without {directory}, the one before would be taken."
            ) from error
        return restored["state"], restored["meta"]

    def _move(self, step: int, why: str) -> None:
        """Moves a damaged checkpoint aside, unless this only reads."""
        if self._keep is None:
            warn(f"checkpoint {step} is damaged: {why}.")
            return
        aside = self._directory / "unreadable"
        aside.mkdir(exist_ok=True)
        target = next(
            path
            for n in range(1_000_000)
            if not (path := aside / (f"{step}.{n}" if n else f"{step}")).exists()
        )
        (self._directory / str(step)).rename(target)
        warn(f"checkpoint {step} is damaged: {why}; it is now {target}.")

    def close(self) -> None:
        """Waits as `wait` does, and ends Orbax's threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which saves when it is told to."""

    def reached_preemption(self, step: int) -> bool:
        # Orbax 0.12.8 fails in a save that a signal has caused if it is the manager's first and
        # `lightweight_initialize` has left out the times of those before.
        return False


class _Preserve:
    """Orbax's policy: which steps stay."""

    def __init__(self, preserved: Callable[[Sequence[int]], set[int | None]]):
        self._preserved = preserved

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in self._preserved(steps) for step in steps]


def _print_no_errors_of_threads() -> None:
    """Silences echoes of a failure to save, which is raised as one error.

    Orbax logs it too, and asyncio and TensorStore print a traceback for each array that was still
    being written.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)


class _UnraisableHook:
    """`sys.unraisablehook` without TensorStore's errors about a closed asyncio loop."""

    def __init__(self, before: Callable[["sys.UnraisableHookArgs"], object]):
        self._before = before

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)
