"""Rows of numbers about models, for JSON, and tables of them, for readers."""

import functools
from collections.abc import Sequence
from typing import Any

from e88_jax import hardware
from e88_jax.config import LMConfig
from e88_jax.sizing.compare import TOLERANCE, Match
from e88_jax.sizing.guide import calc_e88_params, d_inner_of, e88_layer
from e88_jax.sizing.memory import implementation_on, training_memory
from e88_jax.sizing.presets import BASELINES, PRESETS
from e88_jax.sizing.proportions import balance, check

Row = dict[str, Any]


def describe(
    config: LMConfig, gpu: hardware.GPU | None, batch: int, length: int, fsdp: int = 1
) -> Row:
    """Numbers of a model of E88 layers, for JSON."""
    layer = e88_layer(config)
    implementation = functools.partial(implementation_on, gpu)
    memory = training_memory(config, batch, length, implementation=implementation, fsdp=fsdp)
    findings = check(config, gpu, batch=batch, length=length, fsdp=fsdp)
    return {
        "dim": config.dim,
        "n_heads": layer.n_heads,
        "n_state": layer.n_state,
        "depth": config.depth,
        "d_inner": d_inner_of(config),
        "params": config.count_params(),
        "published_formula_params": calc_e88_params(
            config.dim, layer.n_heads, layer.n_state, config.depth, config.vocab_size
        ),
        "state_per_layer": layer.state_size(config.dim),
        "dim_over_d_inner": round(config.dim / d_inner_of(config), 3),
        "balance": balance(config.dim, d_inner_of(config)),
        "training_bytes": memory.total,
        "findings": [str(x) for x in findings],
    }


_COLUMNS = {
    "dim": ("dim", "d"),
    "heads": ("n_heads", "d"),
    "n_state": ("n_state", "d"),
    "depth": ("depth", "d"),
    "d_inner": ("d_inner", "d"),
    "parameters": ("params", ",d"),
    "state/layer": ("state_per_layer", ",d"),
    "dim/d_inner": ("dim_over_d_inner", ".2f"),
    "balance": ("balance", ""),
}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns, header first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def configurations_text(rows: Sequence[Row]) -> str:
    """A table of rows of `describe`, and their findings below it."""
    header = ["#", *_COLUMNS, "training GB"]
    cells = [
        [
            str(i),
            *(format(row[key], spec) for key, spec in _COLUMNS.values()),
            f"{row['training_bytes'] / 1e9:.1f}",
        ]
        for i, row in enumerate(rows, 1)
    ]
    said: dict[str, list[str]] = {}
    for i, row in enumerate(rows, 1):
        for finding in row["findings"]:
            said.setdefault(finding, []).append(str(i))
    lines = [f"  {', '.join(numbers)}: {finding}" for finding, numbers in said.items()]
    return "\n".join([table([header, *cells]), *lines])


def preset_row(name: str) -> Row:
    """Numbers of a preset, for JSON."""
    preset = PRESETS[name]
    dim = preset.corrected_dim
    return {
        "name": name,
        **describe(preset.config, None, 1, 2048),
        "published": preset.published,
        "published_state": preset.published_state,
        "corrected_dim": dim,
        "corrected_params": None if dim is None else preset.with_dim(dim).count_params(),
    }


def presets_text(rows: Sequence[Row]) -> str:
    """A table of rows of `preset_row`, and below it the state of the baselines."""
    header = ["preset", "dim", "heads", "n_state", "depth", "published", "its formula", "exact"]
    header += ["state/layer", "dim/d_inner", "corrected dim", "exact then", "balance"]
    cells = [
        [
            row["name"],
            *(str(row[key]) for key in ("dim", "n_heads", "n_state", "depth", "published")),
            f"{row['published_formula_params'] / 1e6:,.1f}M",
            f"{row['params'] / 1e6:,.1f}M",
            f"{row['state_per_layer']:,}",
            f"{row['dim_over_d_inner']:.2f}",
            str(row["corrected_dim"] or ""),
            f"{row['corrected_params'] / 1e6:,.1f}M" if row["corrected_dim"] else "",
            row["balance"],
        ]
        for row in rows
    ]
    note = (
        "Where there is a corrected dim, the guide's own formula does not give the count that it "
    )
    return "\n".join([table([header, *cells]), f"{note}printed.", *baseline_states()])


def baseline_states() -> list[str]:
    """The state of each baseline's layer and of two presets', a sentence per baseline."""
    h72, h40 = (
        e88_layer(preset.config).state_size(preset.dim)
        for preset in (PRESETS["h72n32-500m"], PRESETS["h40n64-500m"])
    )
    return [
        f"{baseline.name}, {baseline.title}: {state:,} numbers of state a layer, "
        f"{state / h72:.1f} times h72n32's and {state / h40:.1f} times h40n64's"
        for baseline in BASELINES.values()
        for state in [baseline.state_per_layer]
    ]


def comparison(
    matches: Sequence[Match], gpu: hardware.GPU | None, batch: int, length: int, fsdp: int = 1
) -> list[Row]:
    """Numbers of models of one budget, E88 first, for JSON."""
    e88_state = matches[0].state(length)
    rows: list[Row] = []
    for match in matches:
        config, flops = match.config, match.config.flops_per_token()
        memory, plain = (
            training_memory(config, batch, length, implementation=implementation, fsdp=fsdp).total
            for implementation in (functools.partial(implementation_on, gpu), "chunked")
        )
        rows.append(
            {
                "family": match.family,
                "dim": config.dim,
                "depth": config.depth,
                "sizes": match.sizes,
                "params": match.params,
                "error": round(match.error, 5),
                "within": match.within,
                "state_per_layer": match.states(length),
                "state": match.state(length),
                "state_over_e88": round(match.state(length) / e88_state, 2),
                "matmul_flops_per_token": flops.matmul,
                "recurrence_flops_per_token": flops.recurrence,
                "training_bytes": memory,
                "training_bytes_without_kernels": plain,
                "config": config.to_dict(),
            }
        )
    return rows


def comparison_cells(rows: Sequence[Row], length: int) -> list[list[str]]:
    """A table of rows of `comparison`, header first."""
    measured = any("tokens_per_second" in row for row in rows)
    header = ["model", "dim", "depth", "sizes", "parameters", "of budget", "state/layer"]
    header += [f"state at {length:,}", "over E88's", "matmul MFLOP", "recurrence MFLOP"]
    header += ["training GB", "without kernels"]
    cells = [[*header, *(["tokens/s"] if measured else [])]]
    for row in rows:
        cells.append(
            [
                row["family"],
                str(row["dim"]),
                str(row["depth"]),
                row["sizes"],
                f"{row['params']:,}",
                f"{row['error']:+.2%}",
                " / ".join(f"{state:,}" for state in row["state_per_layer"].values()),
                f"{row['state'] / 1e6:,.2f}M",
                f"{row['state_over_e88']:.1f}",
                f"{row['matmul_flops_per_token'] / 1e6:,.0f}",
                f"{row['recurrence_flops_per_token'] / 1e6:,.0f}",
                f"{row['training_bytes'] / 1e9:.1f}",
                f"{row['training_bytes_without_kernels'] / 1e9:.1f}",
            ]
        )
        if measured:
            rate = row["tokens_per_second"]
            cells[-1].append("out of memory" if rate is None else f"{rate:,.0f}")
    return cells


def comparison_text(rows: Sequence[Row], length: int) -> str:
    """The table of rows of `comparison`, and below it what it leaves open."""
    return "\n".join(
        [
            table(comparison_cells(rows, length)),
            *(
                f"No {row['family']} is within {TOLERANCE:.1%} of the budget: the nearest has "
                f"{row['params']:,} parameters, {row['error']:+.2%}."
                for row in rows
                if not row["within"]
            ),
            f"State: numbers of one sequence after {length:,} tokens; attention's are keys and "
            "values, and grow. FLOP: of training on a token; attention's at 2,048 tokens.",
            "The transformer's channel mixer is a SwiGLU of 8/3 dim, to a multiple of 64; the "
            "other models have none.",
            *baseline_states(),
        ]
    )
