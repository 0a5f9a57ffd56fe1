"""Bounds of the numbers that flags give."""

from typing import Any

INT32_LIMIT = 2**31
"""Steps, bytes and sizes are counted in int32."""
FLOAT32_LIMIT = 1e38
"""Rates and norms are kept in float32."""


def require(
    config: Any,
    *names: str,
    minimum: float | None = None,
    above: float | None = None,
    below: float = INT32_LIMIT,
) -> None:
    """Holds fields of `config`, each a number, numbers or None, to bounds; NaN is never within.

    Raises:
        ValueError: one is out of bounds; the message names it as a flag.
    """
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number is None:
                continue
            if minimum is not None and not number >= minimum:
                bound = f"at least {minimum}"
            elif above is not None and not number > above:
                bound = f"above {above}"
            elif not number < below:
                bound = f"below {_shown(below)}"
            else:
                continue
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}, got {number}.")


def _shown(bound: float) -> str:
    if isinstance(bound, int) and bound > 1 and bound & (bound - 1) == 0:
        return f"2**{bound.bit_length() - 1}"
    return f"{bound:.9g}"
