"""Plots of a suite's results: accuracy against length, and recall against the size of the state."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .controls import title
from .records import Cell, Group, Record, by_heading, groups

COLORS = {
    "e88": "#0072b2",
    "e88_linear": "#56b4e9",
    "e88_gate2": "#009e73",
    "e88_linear_gate2": "#a6d854",
    "gdn": "#e69f00",
    "gdn_negative": "#d55e00",
    "mamba2": "#cc79a7",
    "transformer": "#555555",
    "lstm": "#000000",
    "hybrid": "#8c6bb1",
    "e88_conv": "#f0e442",
    "e88_linear_conv": "#c2185b",
    "e88_raw_keys": "#b15928",
    "e88_no_silu": "#fb9a99",
    "e88_constant_decay": "#888888",
}
"""Okabe and Ito's palette, and others."""
_COLUMNS = 4
_LEGEND_WIDTH = 6.0
"""Inches of two columns of the longest titles of models."""


def write(directory: Path, lines: Sequence[Record], heading: str) -> list[Path]:
    """Draws the plots of the lines into a suite's directory; returns their files."""
    files = list[Path]()
    for models, mine in by_heading(lines).items():
        by_length = {c: g for c, g in mine.items() if len(_longest(g)) > 1}
        if by_length:
            cell = next(iter(mine))
            image = directory / f"accuracy_{cell.dim}x{cell.depth}_{cell.dtype}.png"
            _draw_lengths(by_length, f"{heading}: {models}", image)
            files.append(image)
    by_state = {
        c: g for c, g in groups(lines).items() if any("pairs" in reading for reading in g.readings)
    }
    if by_state:
        image = directory / "recall_by_state.png"
        _draw_states(by_state, heading, image)
        files.append(image)
    return files


def _longest(group: Group) -> dict[str, int]:
    """The readings that vary nothing but the length, and the greatest of each: 40 of `3 to 40`."""
    found = {reading: reading.split(" to ")[-1] for reading in group.readings}
    return {reading: int(length) for reading, length in found.items() if length.isdecimal()}


def _panels(n: int, heading: str) -> tuple[Figure, list[Axes]]:
    columns = min(n, _COLUMNS)
    rows = -(-n // columns)
    width = max(4 * columns + 0.5, _LEGEND_WIDTH)
    figure = Figure(figsize=(width, 3.2 * rows + 0.9), layout="constrained")
    figure.suptitle(heading)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for unused in panels[n:]:
        unused.set_visible(False)
    return figure, panels[:n]


def _finish(figure: Figure, panels: Sequence[Axes], image: Path) -> None:
    labelled = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    columns = 1 + min(len(panels), _COLUMNS)  # as many as the figure is wide for
    figure.legend(
        list(labelled.values()),
        list(labelled),
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
    )
    figure.savefig(image, dpi=110)


def _draw_lengths(found: dict[Cell, Group], heading: str, image: Path) -> None:
    problems = list(dict.fromkeys(cell.problem for cell in found))
    figure, panels = _panels(len(problems), heading)
    for axes, problem in zip(panels, problems, strict=True):
        mine = {c.model: g for c, g in found.items() if c.problem == problem}
        for drawn, (model, group) in enumerate(mine.items()):
            readings = _longest(group)
            lengths = list(readings.values())
            values = [group.values(reading) for reading in readings]
            means = [sum(x) / len(x) for x in values]
            color, name = COLORS.get(model), title(model)
            width = max(1.2, 5 - 1.2 * drawn)  # lines that coincide show, the first as the edge
            (line,) = axes.plot(lengths, means, marker="o", ms=3, lw=width, color=color, label=name)
            lows, highs = [min(x) for x in values], [max(x) for x in values]
            axes.fill_between(lengths, lows, highs, alpha=0.15, color=line.get_color(), lw=0)
        first = next(iter(mine.values()))
        readings, chance = _longest(first), first.runs[0]["chance"]
        lengths = list(readings.values())
        axes.plot(lengths, [chance[x] for x in readings], color="gray", ls=":", label="chance")
        axes.axvline(
            first.runs[0]["protocol"]["length"], color="gray", ls="--", lw=0.8, label="trained at"
        )
        axes.set_title(problem)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, list(readings), fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("length read")
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.25)
    _finish(figure, panels, image)


def _draw_states(found: dict[Cell, Group], heading: str, image: Path) -> None:
    readings = list(dict.fromkeys(x for g in found.values() for x in g.readings))
    figure, panels = _panels(len(readings), heading)
    for axes, reading in zip(panels, readings, strict=True):
        for model in dict.fromkeys(cell.model for cell in found):
            points = sorted(
                (g.runs[0]["state"][reading], sum(x) / len(x))
                for c, g in found.items()
                if c.model == model and (x := g.values(reading))
            )
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker="o",
                color=COLORS.get(model),
                label=title(model),
            )
        axes.set_title(reading)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("elements of state")
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.25)
    _finish(figure, panels, image)
