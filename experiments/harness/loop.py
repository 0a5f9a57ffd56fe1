"""The training loop: from a configuration to a run directory."""

import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from e88_jax.generate import generate
from e88_jax.model import E88LM, count_params

from . import data, devices, run_directory
from .checkpoints import Checkpoints
from .config import TrainConfig
from .errors import RunStopped, UsageError
from .interrupts import Interrupts
from .metrics import MetricsLog, TrainingClock
from .optimizer import make_optimizer
from .plots import plot_loss
from .progress import Report
from .step import BITS_PER_NAT, StepMetrics, compile_train_step, init_state, make_evaluate, place


def train(config: TrainConfig) -> Path:
    """Trains, or goes on training, as `config` says; returns the run's directory.

    The directory gets `run.json` (configuration and versions), `metrics.jsonl`, `tensorboard/`,
    `checkpoints/`, `loss.png` and `sample.txt`.

    Raises:
        UsageError: before anything is written, if the data or the directory will not do.
        RunStopped: the run ended early, with its checkpoint written.
    """
    devices.use_every_core()
    flags = config.data
    corpus = data.Corpus.of(flags.data)
    training, validation = data.split(corpus, flags.val_fraction, flags.seq_len)
    shape = (flags.accumulate, flags.batch_size)
    windows = data.training_windows(
        training, shape, flags.seq_len, stateful=flags.stateful, seed=flags.seed
    )
    val_batches = data.validation_batches(
        validation, flags.batch_size, flags.seq_len, config.eval_bytes
    )
    if config.resume:
        directory = config.out
        assert directory is not None, "the command line names the run to resume"
        if run_directory.load_corpus_fingerprint(directory) != corpus.fingerprint():
            raise UsageError(f"the corpus is not the one that the run in {directory} began with.")
    else:
        directory = run_directory.claim(config.out)

    model = E88LM(config.model, rngs=nnx.Rngs(flags.seed))
    graphdef = nnx.graphdef(model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    where = devices.placement(flags.batch_size)
    state = init_state(model, optimizer, shape if flags.stateful else None)
    state = place(state, where)
    evaluate = make_evaluate(graphdef, val_batches, stateful=flags.stateful)
    run_directory.describe(
        directory,
        config,
        corpus={
            "bytes": len(corpus),
            "files": len(corpus.files),
            "fingerprint": corpus.fingerprint(),
        },
        parameters=count_params(model),
        devices=_describe_devices(where),
    )

    step, best = 0, math.inf
    batches = data.prefetch(windows)
    with Interrupts() as interrupts, Report(config.steps) as report:
        report.say(
            f"{directory}: {count_params(model):,} parameters, {len(training):,} bytes for "
            f"training and {len(validation):,} for validation in {len(corpus.files):,} files, "
            f"{_describe_devices(where)}"
        )
        checkpoints = Checkpoints(directory / "checkpoints", keep=config.keep, warn=report.warn)
        log = None
        try:
            if config.resume:
                if (restored := checkpoints.restore_latest(state)) is None:
                    report.warn("there is no readable checkpoint: starting from step 0.")
                else:
                    step, state, meta = restored
                    best = math.inf if meta["best"] is None else meta["best"]
                    batches.set_state(meta["data"])
                    report.say(f"continuing from step {step}")
            log = MetricsLog(directory, start=step)

            began = time.perf_counter()
            example = jax.device_put(windows[step].windows, where.by_row)
            train_step = compile_train_step(
                graphdef, optimizer, config.optimizer.clip_norm, state, example
            )
            report.say(f"compiled in {time.perf_counter() - began:.1f} s")

            clock = TrainingClock()
            pending: list[StepMetrics] = []
            skipped_in_a_row = 0
            while step < config.steps:
                batch = next(batches)
                placed = jax.device_put(batch.windows, where.by_row)
                state, metrics = train_step(state, placed, np.bool_(batch.restart))
                pending.append(metrics)
                step += 1
                signal_received = interrupts.received
                last = step == config.steps or signal_received is not None

                if last or step % config.log_every == 0:
                    done = jax.device_get(pending)
                    n_bytes = len(done) * batch.windows[..., 1:].size
                    record = _summarise(done) | {"bytes_per_second": n_bytes / clock.lap()}
                    log.write("train", step, **record)
                    report.advance(step, _line(record))
                    skipped_in_a_row = record["skipped_in_a_row"]
                    pending = []
                stuck = skipped_in_a_row >= config.optimizer.max_skipped_steps

                with clock.paused():
                    bits = math.nan
                    if step % config.eval_every == 0 or step == config.steps:
                        jax.block_until_ready(state)
                        bits = evaluate(optimizer.eval_params(state.optimizer, state.params))
                        log.write("validation", step, bits_per_byte=bits)
                        report.say(f"step {step}: validation {bits:.3f} bits per byte")
                    is_best = bits < best
                    best = bits if is_best else best
                    if last or stuck or is_best or step % config.save_every == 0:
                        meta = {
                            "data": batches.get_state(),
                            "best": best if math.isfinite(best) else None,
                        }
                        checkpoints.save(step, state, meta, None if math.isnan(bits) else bits)

                if stuck:
                    raise RunStopped(
                        f"stopped at step {step}: {skipped_in_a_row} steps in a row had a "
                        f"loss or gradient that is not finite. The checkpoint has the weights "
                        f"before them; a lower --learning-rate in a new run may help.",
                        exit_code=1,
                    )
                if signal_received is not None and step < config.steps:
                    raise RunStopped(
                        f"stopped by {signal_received.name} at step {step}: continue with "
                        f"--out {directory} --resume.",
                        exit_code=128 + signal_received,
                    )
        finally:
            checkpoints.close()
            if log is not None:
                log.close()
                plot_loss(directory / "metrics.jsonl", directory / "loss.png")

        weights = optimizer.eval_params(state.optimizer, state.params)
        nnx.update(model, jax.device_put(weights, jax.devices()[0]))
        _sample(model, config, directory, report)
        report.say(
            f"{directory}: best validation {best:.3f} bits per byte; metrics in metrics.jsonl and "
            f"tensorboard/, curve in loss.png, more text with experiments/sample.py {directory}"
        )
    return directory


def _describe_devices(where: devices.Placement) -> str:
    return f"{where.everywhere.num_devices} x {jax.devices()[0].device_kind}"


def _summarise(steps: list[StepMetrics]) -> dict[str, Any]:
    """Means over the steps that counted, and the last of the counts."""
    counted = [step for step in steps if np.isfinite(step.loss) and np.isfinite(step.grad_norm)]
    summary: dict[str, Any] = {}
    if counted:
        loss = float(np.mean([step.loss for step in counted]))
        summary = {
            "loss": loss,
            "bits_per_byte": loss * BITS_PER_NAT,
            "grad_norm": float(np.mean([step.grad_norm for step in counted])),
        }
    newest = steps[-1]
    return summary | {
        "learning_rate": float(newest.learning_rate),
        "skipped": int(newest.skipped),
        "skipped_in_a_row": int(newest.skipped_in_a_row),
    }


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
    prompt = np.frombuffer(config.prompt.encode(), np.uint8)
    key = jax.random.key(config.data.seed)
    drawn = generate(model, prompt[None], config.sample_bytes, key=key)
    text = bytes([*prompt.tolist(), *drawn[0].tolist()]).decode("utf-8", errors="replace")
    (directory / "sample.txt").write_text(text)
    report.say(f"a sample:\n{text}\n")
