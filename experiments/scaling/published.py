"""Published speed of the original project's CUDA kernel against n_state (January 2026).

On an RTX 4090. Model, batch, sequence length, and whether tokens per second are of training, are
not stated: compare how they fall, not how high they are.
"""

from typing import NamedTuple

DEVICE = "RTX 4090"
BACKWARD_OVER_FORWARD = (4.0, 5.0)
"""Time of the backward pass over that of the forward pass, lowest and highest."""


class Throughput(NamedTuple):
    """Tokens per second, as published."""

    low: float | None
    """Lower end; None for an upper bound alone."""
    high: float
    text: str


TOKENS_PER_SECOND = {
    32: Throughput(18_000, 21_000, "18-21K"),
    64: Throughput(10_000, 10_000, "~10K"),
    72: Throughput(1_400, 1_400, "1.4K"),
    96: Throughput(None, 1_000, "<1K"),
}
"""Tokens/s by n_state."""
