"""Times a language model that reads a prompt and writes on: prefill and decoding."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

from harness import cli
from harness.config import DEFAULT_MODEL
from harness.model_size import parse_with_preset
from harness.run_directory import versions

from e88_jax.config import LMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Time prefill and decoding of an untrained model; print and record the numbers."""

    preset: str | None = None
    """Take a model of the sizing guide, such as h72n32-500m. Flags of the model change it."""
    batch_sizes: tuple[int, ...] = (1, 32, 256)
    """Sequences at once."""
    prompt: int = 2048
    """Tokens read in one program, the prefill."""
    contexts: tuple[int, ...] = (2048, 100_000)
    """Tokens that were read, at least, before decoding is timed; past the prompt for one sequence
    only."""
    repeats: int = 7
    """Programs timed, after one that is not."""
    json: Path | None = None
    """File to write the numbers to, as JSON."""
    model: LMConfig = DEFAULT_MODEL

    def __post_init__(self) -> None:
        counts = {"prompt": self.prompt, "repeats": self.repeats}
        counts |= {f"batch-sizes ({n})": n for n in self.batch_sizes}
        counts |= {f"contexts ({n})": n for n in self.contexts}
        for flag, value in counts.items():
            if value < 1:
                raise ValueError(f"--{flag} must be at least 1, got {value}.")


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Median of so many runs, after one that is not timed."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main(args: Sequence[str]) -> None:
    """Parses, compiles, times, prints."""
    config = parse_with_preset(DecodeConfig, args)

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from harness import devices

    from e88_jax.generate import BLOCK, decode, inference_params, prefill
    from e88_jax.model import E88LM, count_params

    devices.set_up()
    model = E88LM(config.model, rngs=nnx.Rngs(0))
    graphdef, params = nnx.graphdef(model), inference_params(model)
    numbers: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "config": dataclasses.asdict(dataclasses.replace(config, json=None)),
        "parameters": count_params(model),
        "rows": [],
    }
    print(f"{numbers['parameters']:,} parameters on {numbers['device']}")
    initial_state = model.init_state
    del model  # its float32 weights are not read
    options: dict[str, Any] = {
        "temperature": jnp.float32(0.8),
        "top_p": jnp.float32(1),
        "top_k": 40,
        "greedy": False,
    }
    for batch in config.batch_sizes:
        prompt = np.random.default_rng(0).integers(
            0, config.model.vocab_size, (batch, config.prompt), dtype=np.int32
        )
        tokens, key = jnp.asarray(prompt), jax.random.key(0)
        state = initial_state(batch)
        drawn, length = tokens[:, 0], 0

        def read() -> None:
            nonlocal state, drawn, key, length
            state, drawn, key = prefill(graphdef, params, state, tokens, key, **options)  # noqa: B023
            np.asarray(drawn)
            length += config.prompt

        def write() -> None:
            nonlocal state, drawn, key, length
            state, block, key = decode(graphdef, params, state, drawn, key, **options, length=BLOCK)
            drawn = block[:, -1]
            np.asarray(block)
            length += BLOCK

        prefill_seconds = seconds_of(read, config.repeats)
        for context in config.contexts if batch == 1 else config.contexts[:1]:
            while length < context:
                read()
            row = {
                "batch": batch,
                "context": length,
                "prefill_tokens_per_second": batch * config.prompt / prefill_seconds,
                "decode_tokens_per_second": batch * BLOCK / seconds_of(write, config.repeats),
                "bytes_in_use": (jax.devices()[0].memory_stats() or {}).get("bytes_in_use"),
            }
            numbers["rows"].append(row)
            memory = "" if row["bytes_in_use"] is None else f", {row['bytes_in_use'] / 1e9:.2f} GB"
            print(
                f"batch {batch}, {row['context']:,} tokens read: prefill "
                f"{row['prefill_tokens_per_second']:,.0f} tokens/s, decoding "
                f"{row['decode_tokens_per_second']:,.0f} tokens/s{memory}",
                flush=True,
            )
    if config.json is not None:
        config.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
