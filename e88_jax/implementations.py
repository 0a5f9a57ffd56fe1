"""The choice of an op's implementation: the named one, or the fastest that takes the call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from e88_jax import checked_here, kernels
from e88_jax.checks import require_choice
from e88_jax.mixers.base import Implementation
from pallas_kernels import target

Implementations = Mapping[Implementation, Callable[..., Any]]
"""Implementations of an op by name. One that cannot take a call raises NotImplementedError, whose
message has the implementation as its subject."""


def check(op: str, implementations: Implementations, named: Any) -> None:
    """Raises:
    ValueError: no op has an implementation of this name.
    NotImplementedError: this op has none.
    """
    known = dict.fromkeys((None, *implementations, *get_args(Implementation)))
    require_choice("implementation", named, tuple(known))
    if named is not None and named not in implementations:
        raise NotImplementedError(
            f"implementation={named!r} is not one of {op}'s: "
            f"{', '.join(map(repr, implementations))}."
        )


def run(
    op: str,
    implementations: Implementations,
    named: Implementation | None,
    fastest_first: Sequence[Implementation],
    *arrays: Any,
    **options: Any,
) -> Any:
    """The op by the named implementation, or by the first of `fastest_first` that takes the call;
    the last takes every call. What falls back is logged once, and so is a GPU for which the
    kernels have only been compiled.

    Raises:
        NotImplementedError: the named implementation does not take the call.
    """
    *faster, last = fastest_first if named is None else (named, *fastest_first[-1:])
    for name in faster:
        try:
            result = implementations[name](*arrays, **options)
            if named is None and name == "mosaic_gpu":
                checked_here.suggest(target.current())
            return result
        except NotImplementedError as refusal:
            refused = NotImplementedError(
                f"implementation={name!r} {refusal}; use implementation={last!r}, which takes "
                "every size and dtype on every platform."
            )
            if named is not None:
                raise refused from refusal
            kernels.log_once(f"{op} falls back to {last!r}: {refused}")
    return implementations[last](*arrays, **options)
