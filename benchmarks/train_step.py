"""Times the training step that `experiments/train_byte_lm.py` compiles, on random bytes.

One configuration by default; with --grid, several on a GPU.
"""

import dataclasses
import datetime
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.measure.flags import parse_with_preset, require_writable
from e88_jax import hardware
from e88_jax.config import LMConfig
from experiments import cli
from experiments.cli import require
from experiments.cli.errors import UsageError
from experiments.harness.config import (
    DEFAULT_MODEL,
    BatchConfig,
    OptimizerConfig,
    check_chunks,
)
from experiments.harness.mesh_sizes import AUTO, parse_mesh
from experiments.harness.run_directory import commit, versions
from pallas_kernels import target

UNTIMED_STEPS = 2
REPEATS = 30
"""Steps timed by default; `docs/distributed.md` says why so many."""
PROFILED_STEPS = 3
"""Steps of a profile, the untimed ones included."""
LISTED_KERNELS = 40
ALONE = ("--grid", "None", "--lengths", "--no-missing")
"""Flags that take back those of a grid, for one of its points."""


class Point(NamedTuple):
    """A model at one length, and the batch sizes to try."""

    model: str
    """Its flags."""
    seq_len: int
    batch_sizes: tuple[int, ...]


GRIDS = {
    "presets": (
        Point("--preset h72n32-500m", 2048, (8, 16)),
        Point("--preset h96n32-1b", 2048, (8,)),
        Point("--preset h40n64-500m", 2048, (16,)),
        Point("--preset h40n32-100m", 2048, (32,)),
        # As many tokens as 16 sequences of 2048.
        Point("--preset h72n32-500m", 512, (64,)),
        Point("--preset h72n32-500m", 8192, (4,)),
        Point("--preset h72n32-500m", 32768, (1,)),
    ),
    # The sizing guide's models, then models of `python -m e88_jax.sizing 500M --compare`.
    "mixers": (
        Point("--preset h72n32-500m", 2048, (8, 16)),
        Point("--preset gated-deltanet-500m", 2048, (8, 16)),
        Point("--preset mamba2-500m", 2048, (8, 16)),
        Point("--preset gated-deltanet-500m --implementation chunked", 2048, (8,)),
        Point("--preset mamba2-500m --implementation chunked", 2048, (8,)),
        Point(
            "--mixer attention --dim 1344 --depth 23 --n-heads 21 --channel-mixer-dim 3584",
            2048,
            (8, 16),
        ),
        Point(
            "--layout e88,e88,e88,attention --dim 2304 --depth 20 --e88.n-heads 71 "
            "--e88.n-state 32 --attention.n-heads 36",
            2048,
            (8, 16),
        ),
        Point(
            "--layout gated_deltanet,gated_deltanet,gated_deltanet,attention --dim 1984 "
            "--depth 24 --gated-deltanet.n-heads 11 --gated-deltanet.head-dim 128 "
            "--attention.n-heads 31",
            2048,
            (8, 16),
        ),
    ),
}
"""Grids by name: E88 at several sizes and lengths, and E88 beside other mixers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the training step of train_byte_lm.py on random bytes; print and record the numbers."""

    preset: str | None = None
    """Take a model of the sizing guide, such as h72n32-500m or mamba2-500m. Flags of the model
    change it."""
    grid: Literal["presets", "mixers"] | None = None
    """Time many models on a GPU, each in a process of its own, with the other flags given: E88 at
    several sizes and lengths, or E88 beside other mixers. With --preset only that one."""
    missing: bool = False
    """With --grid, leave out the points that the file of --json has, but for those that failed."""
    lengths: tuple[int, ...] = ()
    """With --grid, only these lengths."""
    repeats: int = REPEATS
    """Steps timed, after two that are not."""
    profile: bool = False
    """Also say which part of the step takes how long, on a GPU, from a profile of 3 more steps."""
    json: Path | None = None
    """File to write the numbers to, as JSON. With --grid other points that it has are kept."""
    mesh: str = AUTO
    """Devices to train on, as of train_byte_lm.py."""
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    model: LMConfig = DEFAULT_MODEL

    def __post_init__(self) -> None:
        require(self, "repeats", "lengths", minimum=1)
        if self.lengths and self.grid is None:
            raise ValueError("--lengths is for --grid; without it take --seq-len.")
        if self.missing and (self.grid is None or self.json is None):
            raise ValueError("--missing is for --grid with --json.")
        parse_mesh(self.mesh, self.batch.batch_size)
        check_chunks(self.batch.seq_len, self.model)


def main(args: Sequence[str]) -> None:
    """Parses, compiles, times, prints."""
    config = parse_with_preset(BenchmarkConfig, args)
    require_writable(config.json)
    if config.grid is None:
        numbers = measure(config)
        record(config.json, numbers)
        print(summary(numbers))
        return
    grid = {" ".join(flags): [*args, *flags, "--profile", *ALONE] for flags in grid_of(config)}
    time_points(grid, config.json, missing=config.missing)


def time_points(
    points: Mapping[str, Sequence[str]], path: Path | None, *, missing: bool
) -> dict[str, Any]:
    """The numbers of points by name, each timed in a process of its own, beside those that the file
    has; it is written after each.

    Args:
        points: flags of each.
        path: file; None for none.
        missing: leave out points that it has, but for those that failed.

    Raises:
        UsageError: the file has something else.
    """
    found = recorded_points(path)
    for name, flags in points.items():
        if missing and "error" not in found.get(name, {"error": "not timed yet"}):
            continue
        print(name, flush=True)
        found[name] = measure_apart(flags)
        record(path, {"points": found})
        print(found[name].get("error") or summary(found[name]), flush=True)
    return found


def recorded_points(path: Path | None) -> dict[str, Any]:
    """The points of a grid in the file, by their flags; none if there is no file.

    Raises:
        UsageError: the file has something else.
    """
    if path is None or not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["points"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} does not hold a grid: give --json another file.") from None


def record(path: Path | None, numbers: Any) -> None:
    """Writes what there is so far."""
    if path is not None:
        path.write_text(json.dumps(numbers, indent=2) + "\n")


def grid_of(config: BenchmarkConfig) -> list[list[str]]:
    """The flags of each point of the grid that `config` leaves in.

    Raises:
        UsageError: it leaves none, or names a length or batch size of its own.
    """
    own = BatchConfig()
    if (config.batch.seq_len, config.batch.batch_size) != (own.seq_len, own.batch_size):
        raise UsageError("--grid has lengths and batch sizes of its own: choose with --lengths.")
    assert config.grid is not None
    grid = GRIDS[config.grid]
    points = [
        [*model.split(), "--seq-len", str(seq_len), "--batch-size", str(batch)]
        for model, seq_len, batch_sizes in grid
        if config.preset is None or config.preset in model.split()
        if not config.lengths or seq_len in config.lengths
        for batch in batch_sizes
    ]
    if not points:
        there_are = ", ".join(f"{point.model} at {point.seq_len}" for point in grid)
        raise UsageError(f"the grid has no such point: there are {there_are}.")
    return points


def measure_apart(args: Sequence[str]) -> dict[str, Any]:
    """`measure` in a process of its own, which leaves the GPU's memory to the next."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "numbers.json"
        command = [sys.executable, __file__, *args, "--json", str(path)]
        # Else JAX ends its messages with a note on tracebacks.
        environment = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode == 0:
            return json.loads(path.read_text())
    lines = done.stderr.strip().splitlines() or ["no message"]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return {"command": " ".join(args), "error": (errors or lines)[-1][:500]}


def measure(config: BenchmarkConfig) -> dict[str, Any]:
    """The numbers of one configuration."""
    import jax
    import numpy as np
    from flax import nnx

    from benchmarks.measure.gpu_profile import (
        COMMUNICATION,
        alone_ms,
        breakdown,
        longest,
        profile,
    )
    from e88_jax.model import LanguageModel
    from experiments.harness import devices
    from experiments.harness.mesh import placement
    from experiments.harness.optimizer import make_optimizer
    from experiments.harness.step import (
        TrainState,
        compile_train_step,
        init_state,
        make_sharded,
        shapes_of,
    )
    from experiments.tasks.base import Batch
    from experiments.tasks.bytes import BITS_PER_BYTE

    devices.set_up()
    jax.config.update("jax_enable_compilation_cache", False)  # it is timed
    platform = target.current().platform
    on_gpu = platform == "gpu"
    if config.profile and not on_gpu:
        raise UsageError(f"--profile needs a GPU, got {platform}.")
    n_params = config.model.count_params()
    optimizer = make_optimizer(config.optimizer, steps=1000)
    where = placement(config.mesh, config.batch.batch_size, config.model)
    carry_shape, seq_len = config.batch.carry_shape, config.batch.seq_len

    def make_model() -> LanguageModel:
        return LanguageModel(config.model, rngs=nnx.Rngs(0))

    def make_state() -> TrainState:
        return init_state(make_model(), optimizer, carry_shape, seq_len)

    graphdef = nnx.graphdef(nnx.eval_shape(make_model))
    state = make_sharded(make_state, shapes_of(make_state, where))
    windows = np.random.default_rng(0).integers(
        0,
        min(256, config.model.vocab_size),
        (*config.batch.shape, config.batch.seq_len + 1),
        dtype=np.uint8,
    )
    batch = where.put(Batch(windows[..., :-1], windows[..., 1:], None, restart=False))
    clip_norm = config.optimizer.clip_norm
    began = time.perf_counter()
    step = compile_train_step(graphdef, optimizer, clip_norm, BITS_PER_BYTE, state, batch)
    compile_seconds = time.perf_counter() - began

    def run(n: int) -> list[float]:
        """Seconds of n steps after those untimed: from the end of one to the end of the next, with
        another queued by then, as in the training loop; so one more follows."""
        nonlocal state
        ends, queue = [], []
        for _ in range(UNTIMED_STEPS + n + 1):
            state, metrics = step(state, batch)
            queue.append(metrics)
            if len(queue) > 1:
                jax.block_until_ready(queue.pop(0))
                ends.append(time.perf_counter())
        jax.block_until_ready(queue)
        timed = ends[UNTIMED_STEPS - 1 :]
        return [end - begin for begin, end in itertools.pairwise(timed)]

    seconds = run(config.repeats)
    median = statistics.median(seconds)
    tokens = batch.targets.size
    memory, used = step.memory_analysis(), jax.local_devices()[0].memory_stats()
    flops = config.model.flops_per_token()
    gpu = hardware.detect_gpu() if on_gpu else None
    numbers: dict[str, Any] = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "devices": str(where),
        "versions": versions(),
        "config": {
            **dataclasses.asdict(dataclasses.replace(config, json=None)),
            "model": config.model.to_dict(),
        },
        "parameters": n_params,
        "tokens_per_step": tokens,
        "tokens_per_second": round(tokens / median, 1),
        "step_seconds": [round(second, 4) for second in seconds],
        "compile_seconds": round(compile_seconds, 1),
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        "argument_bytes": None if memory is None else memory.argument_size_in_bytes,
        "peak_bytes_in_use": used["peak_bytes_in_use"] if used else None,
        "product_tflops": flops.matmul * tokens / median / 1e12,
        "recurrence_tflops": flops.recurrence * tokens / median / 1e12,
    }
    if gpu is not None:
        peak = gpu.bf16_tflops * where.everywhere.num_devices
        numbers["mfu"] = numbers["product_tflops"] / peak
    if config.profile:
        kernels = profile(lambda: run(PROFILED_STEPS - UNTIMED_STEPS - 1))
        numbers["part_ms"] = breakdown(kernels, PROFILED_STEPS)
        numbers["communication_alone_ms"] = alone_ms(kernels, COMMUNICATION, PROFILED_STEPS)
        numbers["kernels"] = longest(kernels, PROFILED_STEPS, LISTED_KERNELS)
    return numbers


def summary(numbers: dict[str, Any]) -> str:
    """The numbers for a reader."""
    config, seconds = numbers["config"], numbers["step_seconds"]
    lines = [
        f"{numbers['parameters']:,} parameters, batch {config['batch']['batch_size']} of "
        f"{config['batch']['seq_len']}, {numbers['tokens_per_step']:,} tokens a step on "
        f"{numbers['devices']}: {numbers['tokens_per_second']:,.0f} tokens/s (median of "
        f"{len(seconds)} steps, {min(seconds):.3f} to {max(seconds):.3f} s), compiled in "
        f"{numbers['compile_seconds']:.1f} s"
    ]
    if "mfu" in numbers:
        lines.append(
            f"  matmuls {numbers['product_tflops']:.0f} TFLOP/s, {numbers['mfu']:.1%} of "
            f"the GPU's; the recurrence {numbers['recurrence_tflops']:.0f} TFLOP/s besides"
        )
    if numbers["peak_bytes_in_use"] is not None:
        planned = numbers["argument_bytes"] + numbers["temporary_bytes"]
        lines.append(
            f"  memory {numbers['peak_bytes_in_use'] / 1e9:.1f} GB at most, "
            f"{planned / 1e9:.1f} GB by the compiled program"
        )
    if "part_ms" in numbers:
        whole = 1e3 * statistics.median(seconds)
        parts = (
            f"{name} {ms:.1f} ms ({ms / whole:.0%})" for name, ms in numbers["part_ms"].items()
        )
        lines.append("  " + ", ".join(parts))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
