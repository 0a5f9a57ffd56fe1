"""Writes text with a trained byte model, as long as asked for, in constant memory."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from e88_jax.sampling_options import check_sampling_options
from experiments import cli
from experiments.cli.errors import UsageError
from experiments.harness import run_directory
from experiments.tasks.bytes import ByteLMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Write text with the model of a run. The prompt is read in one pass. Attention without a
    window remembers as many bytes as the run's --seq-len, which it was trained on."""

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
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}.")
        check_sampling_options(self.temperature, self.top_k, self.top_p)


def main(args: Sequence[str]) -> None:
    """Parses, then writes each byte to standard output as it is drawn."""
    config = cli.parse(SampleConfig, args)
    # Checks the run before the seconds that JAX takes to start.
    trained_as = run_directory.load_config(config.run, ByteLMConfig)

    import jax

    from e88_jax.sampling import generate_stream
    from experiments.harness import devices
    from experiments.trained import load_trained

    devices.set_up()
    model, _ = load_trained(config.run, ByteLMConfig, latest=config.latest)
    prompt = os.fsencode(config.prompt)
    options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
    state = model.init_state(1, context=trained_as.batch.seq_len)
    out = sys.stdout.buffer
    try:
        key = jax.random.key(config.seed)
        tokens = generate_stream(model, prompt, key=key, state=state, **options)
        out.write(prompt)
        for _ in range(config.length):
            out.write(bytes(next(tokens).tolist()))
            out.flush()
    except ValueError as error:
        raise UsageError(str(error)) from None
    out.write(b"\n")
    out.flush()


if __name__ == "__main__":
    cli.run(main)
