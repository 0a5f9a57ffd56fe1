"""Times the layer against n_state at constant d_inner, beside the published numbers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments import cli
from experiments.cli import require
from experiments.cli.errors import RunStopped, UsageError
from experiments.harness import run_directory
from pallas_kernels.limits import SIZE_MULTIPLE

if TYPE_CHECKING:
    from experiments.scaling.measure import Measurement, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Time the recurrence, and the training step of one layer, against n_state.

    d_inner = n_heads * n_state, batch and sequence stay the same. Writes CSV, JSON and a plot
    beside the numbers that the original project published.
    """

    n_state: tuple[int, ...] | None = None
    """Sizes N = V of a head's state; None for 16 32 48 64 72 96 128 on a GPU, 16 32 64 elsewhere,
    where most of the time goes into compiling."""
    d_inner: int | None = None
    """n_heads * n_state, as nearly as whole heads allow; None for 2304 on a GPU, 384 elsewhere."""
    dim: int | None = None
    """Width of the residual stream; None for d_inner."""
    batch_size: int | None = None
    """Rows; None for 8 on a GPU, 2 elsewhere."""
    seq_len: int | None = None
    """Steps of the recurrence; None for 2048 on a GPU, 64 elsewhere."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the recurrence's inputs and of the matmuls; None for bfloat16 on a GPU and float32
    elsewhere."""
    repetitions: int = 10
    """Timings; their median counts."""
    implementation: Literal["scan", "mosaic_gpu"] | None = None
    """Implementation of the recurrence; None for the fastest that runs here."""
    out: Path | None = None
    """Directory for the results; by default a new one under runs/."""

    def __post_init__(self) -> None:
        if self.n_state == ():
            raise ValueError("--n-state must name at least one size.")
        sizes = "n_state", "d_inner", "dim", "batch_size", "seq_len", "repetitions"
        require(self, *sizes, minimum=1)
        if self.n_state is not None and self.d_inner is not None:
            _require_a_head(self.n_state, self.d_inner)


def _require_a_head(n_states: tuple[int, ...], d_inner: int) -> None:
    if d_inner < max(n_states):
        raise ValueError(
            f"--d-inner must be at least as large as every --n-state, as a head has n_state of it; "
            f"got {d_inner} and {max(n_states)}."
        )


def resolve(config: ScalingConfig) -> "Setting":
    """The setting of `config`, with defaults for the device.

    Raises:
        UsageError: sizes that do not fit each other, or an implementation that does not run here.
    """
    from experiments.harness import devices
    from experiments.scaling.measure import Setting, refusal

    on_gpu = devices.platform() == "gpu"
    n_states = config.n_state or ((16, 32, 48, 64, 72, 96, 128) if on_gpu else (16, 32, 64))
    dtype = config.dtype or ("bfloat16" if on_gpu else "float32")
    implementation = config.implementation
    if implementation is None:
        implementation = "scan" if refusal("mosaic_gpu", dtype) else "mosaic_gpu"
    elif why := refusal(implementation, dtype):
        raise UsageError(why)
    if implementation == "mosaic_gpu":
        for n_state in n_states:
            if n_state % SIZE_MULTIPLE:
                raise UsageError(
                    f"--n-state must be multiples of {SIZE_MULTIPLE} for mosaic_gpu, got "
                    f"{n_state}; --implementation scan takes any."
                )
    d_inner = config.d_inner or (2304 if on_gpu else 384)
    try:
        _require_a_head(n_states, d_inner)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Setting(
        n_states=tuple(sorted(set(n_states))),
        d_inner=d_inner,
        dim=config.dim or d_inner,
        batch_size=config.batch_size or (8 if on_gpu else 2),
        seq_len=config.seq_len or (2048 if on_gpu else 64),
        dtype=dtype,
        implementation=implementation,
        repetitions=config.repetitions,
    )


def run(setting: "Setting", out: Path) -> "list[Measurement]":
    """Times one n_state after the other; `out` always holds the measurements so far."""
    from benchmarks.measure.timing import ClockSampler
    from experiments.harness.progress import Report
    from experiments.scaling import report as results
    from experiments.scaling.measure import measure

    measured: list[Measurement] = []
    with ClockSampler() as clock, Report(steps=len(setting.n_states)) as report:
        about = results.describe(setting, clock)
        report.say(f"{about['device']}: " + ", ".join(f"{k} {v}" for k, v in vars(setting).items()))

        def doing(what: str) -> None:
            report.show(len(measured), what)

        for n_state in setting.n_states:
            measured.append(measure(setting, n_state, clock, doing))
            results.write(out, about, measured)
            report.say(results.sentence(measured[-1].row()))
        report.show(len(measured), "")
    return measured


def main(args: Sequence[str]) -> None:
    """Parses, times, prints."""
    config = cli.parse(ScalingConfig, args)
    run_directory.check_claimable(config.out)
    setting = resolve(config)
    with run_directory.claim(config.out, "n-state-scaling") as out:
        measured = run(setting, out)
    from experiments.scaling import report as results

    rows = [measurement.row() for measurement in measured]
    print(results.table(rows))
    print(*results.conclusions(rows), sep="\n")
    print(f"results are in {out}: {', '.join(results.FILES)}")
    if all(len(measurement.missing) == 2 for measurement in measured):
        raise RunStopped("nothing could be timed.", exit_code=1)


if __name__ == "__main__":
    cli.run(main, output_is_result=False)
