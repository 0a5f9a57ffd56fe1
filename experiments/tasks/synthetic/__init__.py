"""Synthetic tasks: what a model can track, compute and recall. Each is a class by its name."""

from .arithmetic import Arithmetic
from .base import SyntheticConfig
from .groups import Group
from .memory import Copy, KeyedRing, Overwrite, Recall
from .mqar import MultiQuery
from .tracking import Counter, Dyck, Parity, Ring

TASKS: dict[str, type[SyntheticConfig]] = {
    kind.NAME: kind
    for kind in (
        *(Parity, Counter, Ring, Dyck, Group),
        *(Copy, Recall, Overwrite, KeyedRing, MultiQuery),
        Arithmetic,
    )
}
"""The tasks by name."""
