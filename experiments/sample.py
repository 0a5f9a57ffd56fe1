"""Writes text with a trained byte model, as long as asked for, in constant memory."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from harness import cli, run_directory
from harness.bounds import FLOAT32_LIMIT, require
from harness.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Write text with the model of a run. The prompt is read in one pass."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run, as train_byte_lm.py made it."""
    prompt: str = "def "
    """Text to continue, at least one byte."""
    length: int = 1000
    """Bytes to write."""
    temperature: float = 0.8
    """Divides the logits: below 1 is more careful, 0 takes the likeliest byte each time."""
    top_k: int | None = 40
    """Choose among this many likeliest bytes; None for all."""
    top_p: float = 1.0
    """Choose among the likeliest bytes that together have this probability."""
    seed: int = 0
    """The same seed gives the same text."""
    latest: bool = False
    """Use the newest checkpoint, not the one with the best validation."""

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"--length must be at least 0 bytes, got {self.length}.")
        if not self.prompt:
            raise ValueError("--prompt must have at least one byte.")
        require(self, "temperature", minimum=0, below=FLOAT32_LIMIT)
        require(self, "top_k", minimum=1)
        require(self, "seed", minimum=0, below=2**32)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")


def main(args: Sequence[str]) -> None:
    """Parses, then writes to standard output as the bytes come."""
    config = cli.parse(SampleConfig, args)
    run_directory.load_config(config.run)  # before JAX, which mistakes need not wait for

    import jax
    import numpy as np
    from harness import devices
    from harness.trained import load_trained

    from e88_jax.generate import generate_stream

    devices.set_up()
    model, _ = load_trained(config.run, latest=config.latest)
    prompt = np.frombuffer(os.fsencode(config.prompt), np.uint8)
    try:
        tokens = generate_stream(
            model,
            prompt[None],
            key=jax.random.key(config.seed),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    out = sys.stdout.buffer
    out.write(prompt.tobytes())
    for _ in range(config.length):
        out.write(bytes(next(tokens).tolist()))
        out.flush()
    out.write(b"\n")
    out.flush()


if __name__ == "__main__":
    cli.run(main)
