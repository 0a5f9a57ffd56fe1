"""The tables of docs/sizing.md that are computed, not measured."""

import dataclasses
from collections.abc import Callable
from typing import get_args

from e88_jax import hardware
from e88_jax.mixers.base import Remat
from e88_jax.sizing import PRESETS, balance, compare, d_inner_of, report, training_memory
from experiments.markdown import Table


def gpus() -> Table:
    def span(published: hardware.Published) -> str:
        low, high = published.optimal_n_state
        return str(low) if low == high else f"{low} to {high}"

    def listed(sizes: tuple[int, ...] | None) -> str:
        return ", ".join(map(str, sizes or ()))

    rows = [
        [
            gpu.name,
            span(gpu.published) if gpu.published else "",
            str(gpu.published.max_n_state) if gpu.published else "",
            str(gpu.formula_n_state),
            listed(gpu.measured_n_state),
            listed(gpu.predicted_n_state),
        ]
        for gpu in hardware.GPUS
    ]
    header = ["GPU", "published n_state", "published maximum", "the published formula gives"]
    return [*header, "measured here", "predicted"], rows


def presets() -> Table:
    rows = []
    for preset in PRESETS.values():
        config, corrected = preset.config, preset.corrected_dim
        d_inner = d_inner_of(config)
        rows.append(
            [
                preset.name,
                str(preset.dim),
                str(preset.depth),
                preset.published,
                _parameters(preset.formula_params),
                _parameters(config.count_params()),
                str(corrected or ""),
                f"{preset.dim / d_inner:.2f} ({balance(preset.dim, d_inner)})",
            ]
        )
    header = ["preset", "dim", "depth", "published", "its formula gives", "exact"]
    return [*header, "dim of the published count", "dim / d_inner"], rows


def comparison() -> Table:
    """Models of 500M parameters, by `--compare`."""
    gpu, batch, length = hardware.find_gpu("h100"), 8, 2048
    rows = report.comparison(compare(500_000_000, gpu=gpu), gpu, batch, length)
    header, *cells = report.comparison_cells(rows, length)
    return header, cells


def remat() -> Table:
    """Estimated training memory, by what the backward pass recomputes."""
    config, batch, length = PRESETS["h72n32-500m"].config, 8, 2048
    choices: tuple[Remat, ...] = get_args(Remat)
    executions = (dataclasses.replace(config.execution, remat=choice) for choice in choices)
    configs = (dataclasses.replace(config, execution=execution) for execution in executions)
    totals = [training_memory(config, batch, length).total for config in configs]
    row = ["training GB", *(f"{total / 1e9:.0f}" for total in totals)]
    return [f"h72n32-500m, {length} x {batch}, --remat", *choices], [row]


def _parameters(n: int) -> str:
    return f"{n / 1e9:.3f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"


TABLES: dict[str, Callable[[], Table]] = {
    "comparison": comparison,
    "gpus": gpus,
    "presets": presets,
    "remat": remat,
}
