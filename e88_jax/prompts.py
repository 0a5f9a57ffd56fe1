"""Prompts, as text or ids in lists and arrays, to one padded array of ids."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core
from jax.typing import ArrayLike

from e88_jax.checks import shown

Prompt = str | bytes | ArrayLike | Sequence[str | bytes | ArrayLike]
"""One row of text, several as a list, or ids: see `generate`."""

_TEXT = (str, bytes, bytearray, memoryview)


def check_prompt(prompt: Any, lengths: Any, vocab_size: int) -> tuple[np.ndarray | Array, Any]:
    """A `Prompt` as int32 `[B, T]`, and the lengths of its rows, int32 `[B]`; None if each is T."""
    if isinstance(prompt, _TEXT):
        prompt = [prompt]
    if isinstance(prompt, list | tuple):
        given = cast("list[Any]", prompt)
        rows = [_text_ids(row, vocab_size) if isinstance(row, _TEXT) else row for row in given]
        rows = [_as_array("each row of the prompt", row) for row in rows]
        if any(isinstance(row, _TEXT) for row in given) or len({row.shape for row in rows}) > 1:
            if lengths is not None:
                raise ValueError(
                    "lengths must be None for a prompt that is text or rows of different lengths."
                )
            return _pad_rows(rows, vocab_size)
        prompt = rows
    ids: np.ndarray | Array = (
        jnp.asarray(prompt) if is_traced(prompt) else _as_array("prompt", prompt)
    )
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"prompt must be integers [B, T] with at least one token, got {ids.dtype} of shape "
            f"{ids.shape}."
        )
    batch, width = ids.shape
    held: np.ndarray | None = None  # the lengths, where their values are known
    if lengths is not None:
        if not is_traced(lengths):
            held = _as_array("lengths", lengths)
            lengths = cast(Any, held)
        if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
            raise ValueError(
                f"lengths must be {batch} integers, one for each row of the prompt, got "
                f"{lengths.dtype} of shape {lengths.shape}."
            )
        if held is not None:
            if held.min() < 1 or held.max() > width:
                raise ValueError(
                    f"lengths must be from 1 to the prompt's {width} tokens, got {held.min()} "
                    f"to {held.max()}."
                )
            width = int(held.max())
            ids = ids[:, :width]
        lengths = lengths.astype(np.int32)
    if isinstance(ids, np.ndarray):
        # Padding may hold any numbers.
        rows = slice(None) if held is None else np.arange(width)[None, :] < held[:, None]
        _check_ids(ids[rows], vocab_size)
    return ids.astype(np.int32), lengths


def _pad_rows(rows: list[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array `[B, T]`, and their lengths `[B]`."""
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(
                f"row {i} of the prompt must be text or integers [T], at least one, got "
                f"{row.dtype} of shape {row.shape}."
            )
        _check_ids(row, vocab_size)
    lengths = np.asarray([row.size for row in rows], np.int32)
    padded = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        padded[i, : row.size] = row
    return padded, lengths


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"the prompt's ids must be from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}."
        )


def _text_ids(text: Any, vocab_size: int) -> np.ndarray:
    if vocab_size != 256:
        raise ValueError(
            f"a prompt of text is for models of bytes, of 256 ids; this one has {vocab_size}: give "
            "the ids of its tokens."
        )
    return np.frombuffer(text.encode() if isinstance(text, str) else bytes(text), np.uint8)


def _as_array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array of integers, got {shown(value)}.") from None


def padded_length(length: int) -> int:
    """Length that a prompt of `length` tokens is padded to, so that few programs serve all lengths.

    A power of two up to 16, then a multiple of a quarter of the power of two below: 4 sizes per
    doubling, at most 25 % more than `length`; a power of two stays.
    """
    above = 1 << (length - 1).bit_length()
    return above if length <= 16 else -(-length // (above // 8)) * (above // 8)


def pad(tokens: np.ndarray | Array, lengths: Any, sharding: Any) -> tuple[Array, Any]:
    """`tokens` as `[B, padded_length(T)]` on devices, and `lengths`, None if no row is padded.

    Traced tokens stay as they are: their program is for one length.
    """
    if isinstance(tokens, Array):
        return tokens, lengths
    batch, width = tokens.shape
    padded = np.zeros((batch, padded_length(width)), np.int32)
    padded[:, :width] = tokens
    if lengths is None:
        lengths = np.full(batch, width, np.int32)
    is_whole = not isinstance(lengths, Array) and bool(np.all(lengths == padded.shape[1]))
    placed = cast(Array, jax.device_put(padded, sharding))  # pyright: ignore
    return placed, None if is_whole else lengths


def is_traced(x: object) -> bool:
    """Whether `x` is an array traced by a transformation such as `jax.jit`."""
    return isinstance(x, core.Tracer)
