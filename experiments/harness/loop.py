"""The training loop: from a configuration to a run directory."""

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from e88_jax.generate import generate
from e88_jax.model import E88LM, count_params

from . import data, devices, run_directory
from .checkpoints import Checkpoints
from .config import TrainConfig
from .errors import RunStopped, UsageError, warn
from .interrupts import Interrupts
from .metrics import Interval, MetricsLog, TrainingClock
from .optimizer import make_optimizer
from .plots import plot_loss
from .progress import Report
from .step import BITS_PER_NAT, StepMetrics, compile_train_step, init_state, make_evaluate, place


def train(config: TrainConfig, corpus: data.Corpus, directory: Path) -> None:
    """Trains, or goes on training, as `config` says, in a directory that is this process's own.

    It gets `run.json` (configuration and versions), `corpus.jsonl` (the files read),
    `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `loss.png` and `sample.txt`.

    Raises:
        UsageError: before anything is written, if the data or the directory will not do.
        RunStopped: the run ended early, with its checkpoint written.
    """
    devices.set_up()
    flags = config.data
    training, validation = data.split(corpus, flags.val_fraction, flags.seq_len)
    shape = (flags.accumulate, flags.batch_size)
    windows = data.training_windows(
        training, shape, flags.seq_len, stateful=flags.stateful, seed=flags.seed
    )
    val_batches = data.validation_batches(
        validation, flags.batch_size, flags.seq_len, config.eval_bytes
    )

    model = _build(config)
    where = devices.placement(flags.batch_size)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = place(init_state(model, optimizer, shape if flags.stateful else None), where)
    evaluate = make_evaluate(nnx.graphdef(model), val_batches, where, stateful=flags.stateful)
    batches = data.prefetch(windows)
    step, best, interval = 0, math.inf, Interval()

    description = run_directory.Description(
        config,
        corpus=corpus.fingerprint(),
        corpus_bytes=len(corpus),
        parameters=count_params(model),
        devices=str(where),
    )
    if config.resume:
        run_directory.check_continues(directory, description)
    else:
        corpus.write_listing(directory / run_directory.LISTING)
        run_directory.describe(directory, description, resumed_at=None)
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(directory / "checkpoints", keep=config.keep))
        )
        if config.resume:
            if (restored := checkpoints.restore_latest(state)) is None:
                warn(f"{directory} has no checkpoint yet: starting from step 0.")
            else:
                step, state, meta = restored
                best = math.inf if meta["best"] is None else meta["best"]
                batches.set_state(meta["data"])
                interval = Interval(**meta.get("interval", {}))
            if step > config.steps:
                raise UsageError(f"the run in {directory} has done {step} steps: raise --steps.")
            corpus.write_listing(directory / run_directory.LISTING)
            run_directory.describe(directory, description, resumed_at=step)

        report = stack.enter_context(Report(config.steps, start=step))
        report.say(
            f"{directory}: {count_params(model):,} parameters, {len(training):,} bytes for "
            f"training and {len(validation):,} for validation in {len(corpus.files):,} files"
            + (f" (left out: {corpus.left_out})" if corpus.left_out else "")
            + f", {where}"
        )
        if step:
            report.say(f"continuing from step {step}")
        log = stack.enter_context(contextlib.closing(MetricsLog(directory, start=step)))
        stack.callback(_plot, directory)

        began = time.perf_counter()
        train_step = compile_train_step(
            nnx.graphdef(model),
            optimizer,
            config.optimizer.clip_norm,
            state,
            where.put_rows(windows[step].windows),
        )
        report.say(f"compiled in {time.perf_counter() - began:.1f} s")

        clock, timed = TrainingClock(), step
        pending: list[StepMetrics] = []
        skipped_in_a_row = 0

        def save(bits_per_byte: float | None) -> None:
            interval.add(jax.device_get(pending))
            pending.clear()
            meta = {
                "data": batches.get_state(),
                "best": best if best < math.inf else None,
                "interval": interval.sums(),
            }
            jax.block_until_ready(state)  # the clock counts the steps that still run
            with clock.paused():
                checkpoints.save(step, state, meta, bits_per_byte)

        while step < config.steps:
            try:
                batch = next(batches)
            except data.CorpusError as error:
                save(None)
                raise RunStopped(
                    f"stopped at step {step}: {error} When it is as it was, continue with "
                    f"--out {directory} --resume.",
                    exit_code=1,
                ) from None
            state, metrics = train_step(
                state, where.put_rows(batch.windows), np.bool_(batch.restart)
            )
            pending.append(metrics)
            step += 1
            stop = interrupts.received
            ends = step == config.steps or stop is not None

            if step == config.steps or step % config.log_every == 0:
                steps = jax.device_get(pending)
                interval.add(steps)
                record = _record(interval, steps[-1])
                interval = Interval()
                pending.clear()
                n_bytes = (step - timed) * batch.windows[..., 1:].size
                record["bytes_per_second"], timed = n_bytes / clock.lap(), step
                log.write("train", step, **record)
                report.advance(step, _line(record))
                skipped_in_a_row = record["skipped_in_a_row"]
                checkpoints.check()
            stuck = skipped_in_a_row >= config.optimizer.max_skipped_steps

            bits = None
            if step % config.eval_every == 0 or step == config.steps:
                jax.block_until_ready(state)  # the clock counts the steps that still run
                with clock.paused():
                    bits = evaluate(optimizer.eval_params(state.optimizer, state.params))
                log.write("validation", step, bits_per_byte=bits)
                report.say(f"step {step}: validation {bits:.3f} bits per byte")
            is_best = bits is not None and bits < best
            if bits is not None and is_best:
                best = bits
            if ends or stuck or is_best or step % config.save_every == 0:
                save(bits)

            if stuck:
                raise RunStopped(
                    f"stopped at step {step}: {skipped_in_a_row} steps in a row had a "
                    f"loss or gradient that is not finite. The checkpoint has the weights before "
                    f"them; a lower --learning-rate in a new run may help.",
                    exit_code=1,
                )
            if stop is not None and step < config.steps:
                raise RunStopped(
                    f"stopped by {stop.name} at step {step}: continue with "
                    f"--out {directory} --resume.",
                    exit_code=128 + stop,
                )

        weights = optimizer.eval_params(state.optimizer, state.params)
        nnx.update(model, jax.device_put(weights, jax.devices()[0]))
        _sample(model, config, directory, report)
        report.say(
            f"{directory}: best validation {best:.3f} bits per byte; metrics in metrics.jsonl and "
            f"tensorboard/, curve in loss.png, more text with experiments/sample.py {directory}"
        )


def _build(config: TrainConfig) -> E88LM:
    """The model before training.

    Raises:
        UsageError: the named implementation of the recurrence cannot do it.
    """
    model = E88LM(config.model, rngs=nnx.Rngs(config.data.seed))
    tokens = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), jnp.int32)
    try:
        jax.eval_shape(model, tokens)
    except NotImplementedError as error:
        raise UsageError(str(error)) from None
    return model


def _record(interval: Interval, newest: StepMetrics) -> dict[str, Any]:
    """Means over the interval, and the last of the counts."""
    means = interval.means()
    bits = {"bits_per_byte": means["loss"] * BITS_PER_NAT} if means else {}
    return {
        **means,
        **bits,
        "learning_rate": float(newest.learning_rate),
        "skipped": int(newest.skipped),
        "skipped_in_a_row": int(newest.skipped_in_a_row),
    }


def _plot(directory: Path) -> None:
    with run_directory.optional(directory / "loss.png"):
        plot_loss(directory / "metrics.jsonl", directory / "loss.png")


def _line(record: dict[str, Any]) -> str:
    parts = [f"{record['bytes_per_second']:,.0f} bytes/s", f"rate {record['learning_rate']:.1e}"]
    if "loss" in record:
        parts.insert(0, f"loss {record['loss']:.3f}, {record['bits_per_byte']:.3f} bits per byte")
    if record["skipped"]:
        parts.append(f"{record['skipped']} steps skipped: not finite")
    return ", ".join(parts)


def _sample(model: E88LM, config: TrainConfig, directory: Path, report: Report) -> None:
    if not config.sample_bytes:
        return
    prompt = np.frombuffer(os.fsencode(config.prompt), np.uint8)
    key = jax.random.key(config.data.seed)
    try:
        drawn = generate(model, prompt[None], config.sample_bytes, key=key)
    except ValueError as error:  # weights that are not finite
        warn(f"no sample: {error}")
        return
    sample = bytes([*prompt.tolist(), *drawn[0].tolist()])
    with run_directory.optional(directory / "sample.txt"):
        (directory / "sample.txt").write_bytes(sample)
    report.say(f"a sample:\n{sample.decode('utf-8', errors='replace')}\n")
