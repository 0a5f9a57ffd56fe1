"""Checkpoints of a run: Orbax, written in the background, the newest few and the best kept."""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from experiments.cli.errors import RunStopped, UsageError, warn
from experiments.tasks.base import Metric

Tree = Any
"""Nested tuples and dictionaries of arrays."""
Meta = dict[str, Any]
"""Plain data for JSON."""

CHECKSUMS = "checksums.json"
"""File of a checkpoint that holds the SHA-256 of the others."""


class Checkpoints:
    """The checkpoints in a directory, by step.

    A checkpoint is committed with the checksums of its files, which are compared before it is
    restored. A damaged one is moved to `unreadable/` with a warning that names the file, and the
    one before it counts as the newest. A file that cannot be read for any other reason is an error,
    and nothing is moved. A checkpoint without checksums is restored with a warning.

    Args:
        directory: created with the first checkpoint.
        metric: decides which checkpoint is the best.
        keep: number of the newest kept, besides the best. None only reads and moves nothing, as
            another process may be writing.

    Raises:
        UsageError: a file cannot be read, though it is not damaged.
    """

    def __init__(self, directory: Path, metric: Metric, *, keep: int | None):
        _print_no_errors_of_threads()
        self._directory = directory.absolute()
        self._metric = metric
        self._keep = keep
        self._saving = 0
        self._values: dict[int, float] = {}
        self._manager: ocp.CheckpointManager | None = None
        for step in self._steps():
            why, value = _value(self._directory / str(step), metric.name)
            self._note(step, value)
            if why is not None:
                self._pass_over(step, why)

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
        return ocp.CheckpointManager(
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
        sums = {str(path.relative_to(directory)): sum_ for path, sum_ in _sha256_of(files)}
        (directory / CHECKSUMS).write_text(json.dumps({"sha256": sums}, indent=1) + "\n")

    def save(self, step: int, state: Tree, meta: Meta, value: float | None) -> None:
        """Starts writing `state` (arrays) and `meta` (JSON); returns once they may change.

        `value` is the metric's, if the step was evaluated. A step that is there already is not
        written again.

        Raises:
            RunStopped: this checkpoint or the one before could not be written.
        """
        self.wait()
        if step in self._steps():
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
            shutil.rmtree(self._partial(self._saving), ignore_errors=True)
            steps = self._steps()
            safe = f"that of step {steps[0]} is safe" if steps else "there is none before it"
            raise RunStopped(
                f"the checkpoint of step {self._saving} could not be written to "
                f"{self._directory} ({_reason(error)}); "
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
        steps, damaged = self._steps(), dict[int, str]()
        for step in steps:
            why, restored = self._restore(step, like)
            if restored is not None:
                for bad, reason in damaged.items():
                    self._pass_over(bad, reason)
                return step, *restored
            if why is not None:
                damaged[step] = why
        if self._steps() != steps:  # another process went on training
            return self.restore_latest(like)
        if damaged:
            step, why = next(iter(damaged.items()))
            raise UsageError(
                f"none of the {len(damaged)} checkpoints in {self._directory} can be used; "
                f"in that of step {step}, {why}."
            )
        return None

    def restore_best(self, like: Tree) -> tuple[int, Tree, Meta] | None:
        """The best by the metric; `restore_latest` if that is damaged or nothing was evaluated."""
        best = self._best(self._steps())
        if best is not None:
            why, restored = self._restore(best, like)
            if restored is not None:
                return best, *restored
            if why is not None:
                warn(f"the best checkpoint, {best}, is damaged: {why}.")
        return self.restore_latest(like)

    def _restore(self, step: int, like: Tree) -> tuple[str | None, tuple[Tree, Meta] | None]:
        """`(damage, None)`, `(None, (state, meta))`, or Nones if the checkpoint was deleted."""
        directory = self._directory / str(step)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), like
        )
        if why := _damage(directory):
            if self._keep is None:
                time.sleep(0.5)  # its owner may be deleting it
            return (why, None) if directory.exists() else (None, None)
        checked = (directory / CHECKSUMS).exists()
        if not checked:
            warn(f"checkpoint {step} has no {CHECKSUMS}, so it is restored unchecked.")
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
                return None, None
            whole = "whole, but" if checked else "unchecked, and"
            raise UsageError(
                f"checkpoint {step} in {self._directory} is {whole} cannot be restored: "
                f"{_reason(error)}. Without {directory}, the one before would be taken."
            ) from error
        return None, (restored["state"], restored["meta"])

    def _pass_over(self, step: int, why: str) -> None:
        if self._keep is None:
            warn(f"checkpoint {step} is damaged: {why}.")
            return
        self._values.pop(step, None)
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


def _damage(checkpoint: Path, only: str | None = None) -> str | None:
    """The first file of a checkpoint (or the file named) that is damaged; None if none is."""
    path = checkpoint / CHECKSUMS
    if (content := _read(path)) is None:
        return None
    try:
        sums = {name: str(sum_) for name, sum_ in json.loads(content)["sha256"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{CHECKSUMS} is not as it was written"
    if only is not None:
        sums = {name: sum_ for name, sum_ in sums.items() if name == only}
    for path, found in _sha256_of([checkpoint / name for name in sums]):
        name = str(path.relative_to(checkpoint))
        if found is None:
            return f"{name} is missing"
        if found != sums[name]:
            return f"{name} is not as it was written"
    return None


def _value(checkpoint: Path, metric: str) -> tuple[str | None, float | None]:
    """The damage to a checkpoint's metrics, or else the value of the metric if it has any."""
    name = "metrics/metrics"
    if (content := _read(checkpoint / name)) is None:  # or its owner was killed as it deleted it
        return None, None
    if why := _damage(checkpoint, only=name):
        return why, None
    try:
        return None, float(json.loads(content)[metric])
    except (KeyError, TypeError, ValueError):
        return f"{name} is not as it was written", None


def _sha256_of(files: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """Each file with its checksum, None for a missing one; four are read at a time."""

    def sha256(path: Path) -> str | None:
        with _reading(path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=4) as pool:
        yield from zip(files, pool.map(sha256, files), strict=True)


def _read(path: Path) -> bytes | None:
    """The bytes of a file, or None if there is no such file."""
    with _reading(path):
        return path.read_bytes()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Ignores a missing file; any other failure to read is a UsageError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        pass
    except (OSError, MemoryError) as error:
        raise UsageError(
            f"{path} cannot be read ({_reason(error)}), which does not say that it is damaged; "
            f"nothing was moved."
        ) from error


def _reason(error: Exception) -> str:
    """The operating system's message in the error, else the error's first line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
    if code is not None:
        return os.strerror(int(code[1]))
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error).partition("\n")[0] or type(error).__name__


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
