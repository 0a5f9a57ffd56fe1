"""Sizes of the axes of a run's mesh, from the flag `--mesh`; needs no JAX."""

import math
import re
from typing import NamedTuple

from e88_jax.checks import require_divisor
from e88_jax.config import LMConfig
from experiments.cli.errors import UsageError

AUTO = "auto"


class MeshSizes(NamedTuple):
    """Devices along each axis."""

    data: int = 1
    """Parts of the rows of a batch; weights are copied."""
    fsdp: int = 1
    """Parts of the rows again, and of weights and optimizer state along the model's dim."""
    heads: int = 1
    """Parts of each layer's heads, with their weights, and of a channel mixer's hidden units."""

    @property
    def n_devices(self) -> int:
        return math.prod(self)

    @property
    def n_parts(self) -> int:
        """Parts that rows are divided into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        sizes = zip(self._fields, self, strict=True)
        return ",".join(f"{name}={n}" for name, n in sizes if n > 1) or "data=1"


def parse_mesh(text: str, rows: int) -> MeshSizes | None:
    """The sizes; None for "auto".

    Args:
        text: the flag's value.
        rows: rows of a batch.

    Raises:
        ValueError: the text is no mesh, or the rows do not divide over it; the message has the
            nearest numbers that do.
    """
    if text == AUTO:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([a-z]+)=([1-9][0-9]{0,6})", part, re.ASCII)
        if match is None or match[1] not in MeshSizes._fields or match[1] in sizes:
            raise ValueError(
                f"--mesh must be {AUTO}, or sizes of {', '.join(MeshSizes._fields)} such as "
                f"data=2,fsdp=4, got {text!r}."
            )
        sizes[match[1]] = int(match[2])
    mesh = MeshSizes(**sizes)
    if rows % mesh.n_parts:
        raise ValueError(
            f"--batch-size {rows} does not divide into the {mesh.n_parts} parts of --mesh {mesh}: "
            f"{nearest_multiples(rows, mesh.n_parts)} would."
        )
    return mesh


def check_model(sizes: MeshSizes | None, model: LMConfig) -> None:
    """Raises UsageError, with the nearest sizes that would do, if the model's dim or its heads do
    not divide over the mesh."""
    if sizes is None:
        return
    try:
        require_divisor("dim", model.dim, "fsdp", sizes.fsdp)
        if sizes.heads > 1:
            model.divided(sizes.heads)
    except ValueError as error:
        raise UsageError(f"--mesh {sizes}: {error}") from None


def nearest_multiples(n: int, of: int) -> str:
    """The multiples of a number just below and above n, as words."""
    below = n // of * of
    return " or ".join(str(size) for size in (below, below + of) if size)
