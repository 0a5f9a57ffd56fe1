"""Times the training step that `experiments/train_byte_lm.py` compiles, on random bytes."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

from harness import cli
from harness.config import DEFAULT_MODEL, DataConfig, OptimizerConfig
from harness.run_directory import versions

from e88_jax.config import LMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the training step of train_byte_lm.py on random bytes; print and record the numbers."""

    repeats: int = 10
    """Steps timed, after two that are not."""
    json: Path | None = None
    """File to write the numbers to, as JSON."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    model: LMConfig = DEFAULT_MODEL


def main(args: Sequence[str]) -> None:
    """Parses, compiles, times, prints."""
    config = cli.parse(BenchmarkConfig, args)

    import jax
    import numpy as np
    from flax import nnx
    from harness import devices
    from harness.optimizer import make_optimizer
    from harness.step import compile_train_step, init_state, place

    from e88_jax.model import E88LM, count_params

    devices.use_every_core()
    model = E88LM(config.model, rngs=nnx.Rngs(0))
    n_params = count_params(model)
    shape = (config.data.accumulate, config.data.batch_size)
    optimizer = make_optimizer(config.optimizer, steps=1000)
    where = devices.placement(config.data.batch_size)
    state = init_state(model, optimizer, shape if config.data.stateful else None)
    state = place(state, where)
    windows = np.random.default_rng(0).integers(
        0, 256, (*shape, config.data.seq_len + 1), dtype=np.uint8
    )
    windows = where.put_rows(windows)
    began = time.perf_counter()
    step = compile_train_step(
        nnx.graphdef(model), optimizer, config.optimizer.clip_norm, state, windows
    )
    compile_seconds = time.perf_counter() - began

    seconds = []
    for _ in range(config.repeats + 2):
        began = time.perf_counter()
        state, metrics = step(state, windows, np.bool_(False))
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[2:])
    tokens = windows[..., 1:].size
    memory = step.memory_analysis()
    print(
        f"{n_params:,} parameters, {tokens:,} tokens a step on {where}: "
        f"{tokens / median:,.0f} tokens/s (median of {config.repeats} steps, "
        f"{min(seconds[2:]):.3f} to {max(seconds[2:]):.3f} s), compiled in {compile_seconds:.1f} s"
    )
    if config.json is not None:
        numbers = {
            "devices": str(where),
            "versions": versions(),
            "config": dataclasses.asdict(dataclasses.replace(config, json=None)),
            "parameters": n_params,
            "tokens_per_step": tokens,
            "tokens_per_second": round(tokens / median, 1),
            "step_seconds": [round(second, 4) for second in seconds[2:]],
            "compile_seconds": round(compile_seconds, 1),
            "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        }
        config.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
