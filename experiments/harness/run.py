"""A training run: its directory, checkpoints, metrics, clock and signals."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from experiments.cli.errors import RunStopped, UsageError, warn
from experiments.tasks.base import DataError, Task

from . import run_directory
from .config import TrainConfig
from .interrupts import Interrupts
from .processes import Processes

if TYPE_CHECKING:
    from .step import StepMetrics, TrainState


class Run:
    """A run while it trains; a context manager, in which its directory is this process's own, or
    that of the first process of several, which writes for all.

    The directory gets `run.json` (configuration and versions), the task's files, `metrics.jsonl`,
    `tensorboard/`, `checkpoints/` and `loss.png`. Imports JAX no earlier than `begin`.

    Args:
        config: what to train; `config.resume` continues a run.
        task: what to train on.
        here: the processes that train.

    Raises:
        UsageError: on entering, if the directory cannot be used or another process owns it.
    """

    def __init__(self, config: TrainConfig, task: Task, here: Processes = Processes()):  # noqa: B008
        self._config, self._task, self.here = config, task, here
        self.step = 0
        """Steps done."""
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        owned = run_directory.own(self._config)
        self.directory = Path(self.here.agree(lambda: str(self._exits.enter_context(owned))))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exits.__exit__(*exc)

    def begin(self, like: "TrainState", *, parameters: int, devices: str) -> "TrainState | None":
        """Opens the files, and returns the state of the last checkpoint; None without one.

        Args:
            like: shapes, dtypes and shardings of the state.
            parameters: of the model.
            devices: what the run is on.

        Raises:
            UsageError: the run cannot continue with these steps, data or files.
        """
        from .checkpoints import Checkpoints
        from .metrics import Interval, MetricsLog, TrainingClock, plot_metric
        from .progress import Report

        config, task, directory = self._config, self._task, self.directory
        metric = task.metric
        description = run_directory.Description(
            config,
            fingerprint=task.fingerprint(),
            data=task.describe(),
            metric={"name": metric.name, "unit": metric.unit, "better": metric.better},
            parameters=parameters,
            devices=devices,
        )
        exactly = self.here.agree(lambda: self._begin_files(description))
        enter = self._exits.enter_context
        self._interrupts = enter(Interrupts(None if self.here.count == 1 else self.here.stop_at))
        self._interval, self._pending = Interval(), list["StepMetrics"]()
        checkpoints = Checkpoints(
            directory / "checkpoints", metric, keep=config.keep, here=self.here
        )
        self._checkpoints = enter(contextlib.closing(checkpoints))
        state = None
        if config.resume:
            if (restored := self._checkpoints.restore_latest(like)) is None:
                warn(f"{directory} has no checkpoint yet: starting from step 0.")
            else:
                self.step, state, meta = restored
                self._interval = Interval(**meta["interval"])
            self.here.agree(lambda: self._resume_files(description))
        self._interrupts.at(self.step)  # several processes agree on a step after this one
        self._report = enter(Report(config.steps, start=self.step))
        self.say(f"{directory}: {parameters:,} parameters, {task.describe()}, {devices}")
        if self.step:
            how = "bit for bit" if exactly else "equal but for rounding"
            self.say(f"continuing from step {self.step}, {how}")
        self._log = None
        if self.here.is_first:
            self._log = enter(contextlib.closing(MetricsLog(directory, start=self.step)))
            self._exits.callback(plot_metric, directory, metric)
        self._clock, self._n_tokens, self._skipped_in_a_row = TrainingClock(), 0, 0
        return state

    def _begin_files(self, description: run_directory.Description) -> bool:
        """Writes the files of a new run, or checks those of a resumed one; returns whether that
        continues bit for bit."""
        if self._config.resume:
            return run_directory.check_continues(self.directory, description)
        self._task.write(self.directory)
        run_directory.describe(self.directory, description, resumed_at=None)
        return True

    def _resume_files(self, description: run_directory.Description) -> None:
        """Writes the files of a run that goes on."""
        if self.step > self._config.steps:
            raise UsageError(
                f"the run in {self.directory} has done {self.step} steps: raise --steps."
            )
        self._task.write(self.directory)
        run_directory.describe(self.directory, description, resumed_at=self.step)

    def say(self, message: str) -> None:
        """Prints a line that stays."""
        self._report.say(message)

    def write(self, name: str, content: bytes) -> None:
        """Writes an optional file: a failure is a warning."""
        if not self.here.is_first:
            return
        with run_directory.optional(self.directory / name):
            (self.directory / name).write_bytes(content)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A context that reports its duration and starts the clock at its end."""
        began = time.perf_counter()
        yield
        self.say(f"compiled in {time.perf_counter() - began:.1f} s")
        self._clock.lap()

    @contextlib.contextmanager
    def reading(self, state: "TrainState") -> Iterator[None]:
        """A context that ends the run, with a checkpoint of `state`, on a DataError."""
        try:
            yield
        except DataError as error:
            if self.here.count > 1:  # the others have their data, and train on
                raise
            self._save(state, None)
            raise RunStopped(
                f"stopped at step {self.step}: {error} When it is as it was, continue with "
                f"--out {self.directory} --resume.",
                exit_code=1,
            ) from None

    def stepped(self, metrics: "StepMetrics", n_tokens: int) -> None:
        """Counts a step, and writes a record every `log_every` steps.

        Raises:
            RunStopped: an earlier checkpoint could not be written.
        """
        import jax

        self.step += 1
        self._pending.append(metrics)
        self._n_tokens += n_tokens
        if not self._due(self._config.log_every):
            return
        steps = jax.device_get(self._pending)
        self._interval.add(steps)
        means, newest, metric = self._interval.means(), steps[-1], self._task.metric
        record = {name: means[name] for name in ("loss", "grad_norm") if means}
        if means:
            record[metric.name] = metric.of_means(means)
        record["learning_rate"] = float(newest.learning_rate)
        record["skipped"] = int(newest.skipped)
        record["skipped_in_a_row"] = self._skipped_in_a_row = int(newest.skipped_in_a_row)
        rate = self._n_tokens / self._clock.lap()
        record[f"{self._task.tokens}_per_second"] = rate
        self._write("train", record)
        line = [f"{rate:,.0f} {self._task.tokens}/s", f"rate {record['learning_rate']:.1e}"]
        if means:
            line.insert(0, f"loss {means['loss']:.3f}, {record[metric.name]:.3f} {metric.unit}")
        if record["skipped"]:
            line.append(f"{record['skipped']} steps skipped: not finite")
        self._report.advance(self.step, ", ".join(line))
        self._pending.clear()
        self._interval, self._n_tokens = type(self._interval)(), 0
        self._checkpoints.check()

    def _write(self, kind: str, record: dict[str, float]) -> None:
        if self._log is not None:
            self._log.write(kind, self.step, **record)

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation is due after this step."""
        return self._due(self._config.eval_every)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self._config.steps

    @contextlib.contextmanager
    def paused(self, state: "TrainState") -> Iterator[None]:
        """A context that does not count for the clock, after the steps in flight, which do."""
        import jax

        jax.block_until_ready(state)
        with self._clock.paused():
            yield

    def ended_step(self, state: "TrainState", value: float | None) -> None:
        """Records an evaluation's `value`, and writes a checkpoint if one is due.

        Raises:
            RunStopped: after a signal or too many steps in a row that were not finite, with a
                checkpoint written.
        """
        metric, stop = self._task.metric, self._interrupts.at(self.step)
        stuck = self._skipped_in_a_row >= self._config.optimizer.max_skipped_steps
        is_best = value is not None and metric.improves(value, self._checkpoints.best)
        if value is not None:
            self._write("validation", {metric.name: value})
            self.say(f"step {self.step}: validation {value:.3f} {metric.unit}")
        if stop is not None or stuck or is_best or self._due(self._config.save_every):
            self._save(state, value)
        if stuck:
            raise RunStopped(
                f"stopped at step {self.step}: {self._skipped_in_a_row} steps in a row had a "
                f"loss or gradient that is not finite. The checkpoint has the weights before "
                f"them; a lower --learning-rate in a new run may help.",
                exit_code=1,
                of_all=True,
            )
        if stop is not None and self.step < self._config.steps:
            raise RunStopped(
                f"stopped by {stop.name} at step {self.step}: continue with "
                f"--out {self.directory} --resume.",
                exit_code=128 + stop,
                of_all=True,
            )

    def _save(self, state: "TrainState", value: float | None) -> None:
        import jax

        self._interval.add(jax.device_get(self._pending))
        self._pending.clear()
        with self.paused(state):
            meta = {"interval": self._interval.sums()}
            self._checkpoints.save(self.step, state, meta, value)

    def finished(self) -> None:
        """Reports the best validation."""
        best, metric = self._checkpoints.best, self._task.metric
        found = "no validation" if best is None else f"best validation {best:.3f} {metric.unit}"
        self.say(
            f"{self.directory}: {found}; metrics in metrics.jsonl and tensorboard/, curve in "
            f"loss.png"
        )
