"""Sampling options, checked without JAX."""

from typing import Any, NamedTuple

from e88_jax.checks import require_int, require_number


class SamplingOptions(NamedTuple):
    """Options of `e88_jax.sampling.generate`."""

    temperature: float
    top_k: int | None
    top_p: float


def check_sampling_options(temperature: Any, top_k: Any, top_p: Any) -> SamplingOptions:
    """The options as Python numbers.

    Raises:
        TypeError: one is of another type.
        ValueError: one is out of range.
    """
    options = SamplingOptions(
        require_number("temperature", temperature),
        None if top_k is None else require_int("top_k", top_k),
        require_number("top_p", top_p),
    )
    if options.temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {options.temperature}.")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {options.top_p}.")
    return options
