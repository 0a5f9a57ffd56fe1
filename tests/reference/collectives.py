"""Exchanges between devices in a program before it is compiled."""

import re
from collections import Counter

_SUMS = re.compile(
    r"stablehlo\.(all_reduce|reduce_scatter)\b.*?\}\) : \(tensor<([^>]*)>", re.DOTALL
)
_MOVES = re.compile(
    r"stablehlo\.(all_gather|all_to_all|collective_permute)\b.*? : \(tensor<([^>]*)>"
)


def collectives(program: str) -> Counter[tuple[str, str]]:
    """Count of each kind with its array, such as `("all_reduce", "2x9x16xbf16")`."""
    return Counter(_SUMS.findall(program)) + Counter(_MOVES.findall(program))
