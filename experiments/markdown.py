"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

Table: TypeAlias = tuple[list[str], list[list[str]]]
"""Header and rows."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
