"""Checks of arguments by name: each error says what is needed and what was got.

An argument of the wrong type is a TypeError, one out of range a ValueError. JAX and NumPy are
imported when an array is checked, not before.
"""

import math
import numbers
import operator
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    from jax import Array

LARGEST_INT = 2**31 - 1
"""Largest size or count: the reach of an int32 index."""


def shown(value: Any) -> str:
    """Text for a value in an error: the value if short and plain, else its type and size."""
    kind = type(value).__name__
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{kind} of {value.dtype} and shape {value.shape}"
    if isinstance(value, list | tuple | dict | set):
        return f"{kind} of length {len(cast(Sized, value))}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"{kind}"


def _is_bool(value: Any) -> bool:
    return type(value).__name__ == "bool"  # Python's and NumPy's


def require_int(name: str, value: Any, minimum: int = 1, maximum: int = LARGEST_INT) -> int:
    """The value as a Python int; NumPy's integers are integers, bools and floats are not.

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of range.
    """
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer, at least {minimum:,}, got {shown(value)}.")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum:,}, got {shown(number)}.")
    if number > maximum:
        raise ValueError(f"{name} must be at most {maximum:,}, got {shown(number)}.")
    return number


def require_divisor(name: str, size: int, axis: str, parts: int) -> None:
    """Raises:
    ValueError: the size of this name is no multiple of the parts along an axis of devices; the
        message has the nearest numbers of them that would do.
    """
    if size % parts == 0:
        return
    below = max(n for n in range(1, parts) if size % n == 0)
    above = next((n for n in range(parts, size + 1) if size % n == 0), None)
    nearest = f"{axis}={below}" if above is None else f"{axis}={below} or {above}"
    raise ValueError(f"{name} {size} does not divide over {axis}={parts}: {nearest} would do.")


def require_number(name: str, value: Any) -> float:
    """The value as a Python float.

    Raises:
        TypeError: it is no real number.
        ValueError: it is NaN, infinite or beyond what a float holds.
    """
    if _is_bool(value) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {shown(value)}.")
    return number


def require_bool(name: str, value: Any) -> bool:
    """The value as a Python bool.

    Raises:
        TypeError: it is neither True nor False.
    """
    if not _is_bool(value):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")
    return bool(value)


def require_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> Any:
    """The value, which is one of the choices.

    Raises:
        ValueError: it is none of them.
    """
    if not (value is None or isinstance(value, str)) or value not in choices:
        listed = ", ".join(map(str, choices))
        raise ValueError(f"{name} must be one of {listed}; got {shown(value)}.")
    return value


def require_instance(name: str, value: Any, kind: type, needs: str | None = None) -> None:
    """Raises:
    TypeError: the value is no instance of `kind`; `needs` says what would do.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be {needs or f'of type {kind.__name__}'}, got {shown(value)}."
        )


def check_fields(config: Any, check: Callable[..., Any], *names: str, **options: Any) -> None:
    """Checks fields of a frozen dataclass, and stores them as plain Python values.

    Args:
        config: the dataclass.
        check: `check(name, value, **options)`, such as `require_int`; returns the plain value.
        names: of the fields.
        options: of the check.
    """
    for name in names:
        given = getattr(config, name)
        plain = check(name, given, **options)
        if plain is not given:
            object.__setattr__(config, name, plain)


def require_rngs(rngs: Any) -> None:
    """Raises:
    TypeError: the value is no `nnx.Rngs` with a stream for `params`.
    """
    from flax import nnx

    if not isinstance(rngs, nnx.Rngs) or not hasattr(rngs, "params"):
        raise TypeError(
            f"rngs must be an nnx.Rngs with a stream for params, such as nnx.Rngs(0), "
            f"got {shown(rngs)}."
        )


def readable_values(array: Any) -> "np.ndarray | None":
    """The values of an array as NumPy if they can be read at no cost, else None.

    Values of NumPy arrays, of lists, and of untraced JAX arrays in this host's memory can.
    """
    import jax
    import numpy as np
    from jax.core import Tracer

    if isinstance(array, jax.Array) and (
        isinstance(array, Tracer)
        or not array.is_fully_addressable
        or any(device.platform != "cpu" for device in array.devices())
    ):
        return None
    return np.asarray(array)


def as_array(name: str, value: Any, shape: str) -> "Array":
    """The value as a JAX array: NumPy arrays, lists and numbers become one.

    Args:
        name: the argument.
        shape: names of its axes, for the error, such as `[B, T, H, N]`.

    Raises:
        TypeError: it cannot become an array.
        ValueError: an integer that JAX's default integer cannot hold.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    if isinstance(value, jax.Array):
        return value
    needs = f"{name} must be an array {shape}"
    if value is None:
        raise TypeError(f"{needs}, got None.")
    try:
        array = jnp.asarray(value)
        given = cast("np.ndarray", value) if isinstance(value, np.ndarray) else np.empty(0)
        if given.size and given.dtype.kind in "iu":
            held = jnp.iinfo(array.dtype)  # JAX would drop the high bits of others
            if given.min() < held.min or given.max() > held.max:
                raise OverflowError
    except OverflowError:
        raise ValueError(f"{needs}, got integers beyond int32: {shown(value)}.") from None
    except (TypeError, ValueError):
        raise TypeError(f"{needs}, got {shown(value)}.") from None
    return array


def as_integers(name: str, value: Any, axes: str, shape: tuple[int, ...] | None = None) -> "Array":
    """The value as a JAX array of integers.

    Args:
        name: the argument.
        value: what was given.
        axes: names of its axes, such as `[B, T]`.
        shape: sizes of these; None for any but 0.

    Raises:
        TypeError: it cannot become an array.
        ValueError: another shape, or no integers.
    """
    import jax.numpy as jnp

    array = as_array(name, value, axes)
    if shape is None:
        sizes, fits = "no axis empty", array.ndim == axes.count(",") + 1 and 0 not in array.shape
    else:
        sizes, fits = f"of shape {shape}", array.shape == shape
    if not fits or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers {axes}, {sizes}; got {array.dtype} of shape {array.shape}."
        )
    return array


def require_wide(name: str, array: "Array", dtype: Any) -> None:
    """Raises:
    ValueError: the array is not float32, nor float64 beside inputs of that dtype: bfloat16 would
        round a decay of 0.998 to 1.
    """
    wide = ("float32", "float64") if dtype == "float64" else ("float32",)
    if array.dtype not in wide:
        raise ValueError(f"{name} must be {' or '.join(wide)}, got {array.dtype}.")


def as_lengths(value: Any, batch: int, time: Any) -> "Array":
    """The lengths of the rows of a batch `[B, T, ...]` as a JAX array.

    Raises:
        TypeError: it cannot become an array.
        ValueError: no integers `[B]`, or values out of range, if they can be read at no cost.
    """
    lengths = as_integers("lengths", value, "[B]", (batch,))
    if isinstance(time, int):  # not symbolic, of `jax.export`
        require_range("lengths", value, 0, time)
    return lengths


def as_positions(value: Any, batch: int, time: Any) -> "Array":
    """Positions in the rows of a batch `[B, T, ...]` as a JAX array.

    Raises:
        TypeError: it cannot become an array.
        ValueError: no integers `[B, N]`, or values out of range, if they can be read at no cost.
    """
    positions = as_integers("positions", value, "[B, N]")
    if positions.shape[0] != batch:
        raise ValueError(f"positions must be [B, N] with B = {batch}, got {positions.shape}.")
    if isinstance(time, int):
        require_range("positions", value, 0, time - 1)
    return positions


def require_range(
    name: str, value: Any, minimum: int, maximum: int, lengths: "Array | None" = None
) -> None:
    """Checks the values of an array if they can be read at no cost.

    Args:
        name: the argument.
        value: an array `[B, T]`, or of any shape without lengths.
        minimum, maximum: the range of its numbers.
        lengths: how many of each row count, `[B]`; None for all.

    Raises:
        ValueError: a number that is out of range.
    """
    import numpy as np

    held, ends = readable_values(value), None if lengths is None else readable_values(lengths)
    if held is None or (lengths is not None and ends is None):
        return
    if ends is not None:
        held = held[np.arange(held.shape[1]) < ends[:, None]]
    if held.size and not minimum <= held.min() <= held.max() <= maximum:
        raise ValueError(
            f"{name} must be from {minimum} to {maximum}, got {held.min()} to {held.max()}."
        )
