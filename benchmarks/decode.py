"""Times a language model that reads a prompt and writes on: prefill and decoding."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.flags import parse_with_preset, require_writable
from e88_jax.config import LMConfig
from experiments import cli
from experiments.cli import require
from experiments.harness.config import DEFAULT_MODEL
from experiments.harness.run_directory import versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Time prefill and decoding of an untrained model; print and record the numbers."""

    preset: str | None = None
    """Take a model of the sizing guide, such as h72n32-500m or mamba2-500m. Flags of the model
    change it."""
    batch_sizes: tuple[int, ...] = (1, 32, 256)
    """Sequences at once."""
    prompt: int = 2048
    """Tokens read in one program, the prefill."""
    context: int = 100_000
    """Tokens that one sequence has read, at least, when decoding is timed again. Attention without
    a window remembers as many; of several sequences, those of a prompt."""
    repeats: int = 7
    """Programs timed, after one that is not."""
    json: Path | None = None
    """File to write the numbers to, as JSON."""
    model: LMConfig = DEFAULT_MODEL

    def __post_init__(self) -> None:
        require(self, "prompt", "context", "repeats", "batch_sizes", minimum=1)
        if not self.batch_sizes:
            raise ValueError("--batch-sizes must name at least one size.")


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Median of so many runs, after one that is not timed."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def build(config: DecodeConfig) -> tuple[int, Any, Any, dict[int, Any]]:
    """Number of parameters, graph, parameters as they are read, and the shapes of the state by
    batch size. The model with its float32 weights is not kept."""
    import jax
    from flax import nnx

    from e88_jax.model import LanguageModel

    model = LanguageModel(config.model, rngs=nnx.Rngs(0))

    def state_of(batch: int) -> Any:
        context = max(config.prompt, config.context) if batch == 1 else config.prompt
        return jax.eval_shape(lambda: model.init_state(batch, context))

    states = {batch: state_of(batch) for batch in config.batch_sizes}
    return config.model.count_params(), *nnx.split(model.for_inference()), states


def main(args: Sequence[str]) -> None:
    """Parses, compiles, times, prints."""
    config = parse_with_preset(DecodeConfig, args)
    require_writable(config.json)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from e88_jax.sampling import BLOCK, decode, prefill
    from experiments.harness import devices

    devices.set_up()
    n_params, graphdef, params, states = build(config)
    numbers: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "config": dataclasses.asdict(dataclasses.replace(config, json=None)),
        "parameters": n_params,
        "rows": [],
    }
    print(f"{n_params:,} parameters on {numbers['device']}")
    options: dict[str, Any] = {
        "temperature": jnp.float32(0.8),
        "top_p": None,
        "top_k": 40,
        "greedy": False,
    }
    for batch in config.batch_sizes:
        prompt = np.random.default_rng(0).integers(
            0, config.model.vocab_size, (batch, config.prompt), dtype=np.int32
        )
        tokens = jnp.asarray(prompt)

        def start() -> tuple[Any, ...]:
            state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), states[batch])  # noqa: B023
            return state, tokens[:, 0], jax.random.key(0)  # noqa: B023

        def read() -> None:
            nonlocal carry
            state, _, key = carry
            carry = prefill(graphdef, params, state, tokens, key, **options)  # noqa: B023
            np.asarray(carry[1])

        def write() -> None:
            # As a stream does, with the next program queued.
            nonlocal carry, drawn
            state, block, key = decode(graphdef, params, *carry, **options, length=BLOCK)
            carry = state, block[:, -1], key
            np.asarray(drawn)
            drawn = block

        carry: Any = start()
        drawn: Any = None
        prefill_seconds = seconds_of(read, config.repeats)
        carry, n_read = start(), 0
        for context in (config.prompt, config.context) if batch == 1 else (config.prompt,):
            while n_read < context:
                read()
                n_read += config.prompt
            row = {
                "batch": batch,
                "context": n_read,
                "prefill_tokens_per_second": batch * config.prompt / prefill_seconds,
                "decode_tokens_per_second": batch * BLOCK / seconds_of(write, config.repeats),
                "bytes_in_use": (jax.devices()[0].memory_stats() or {}).get("bytes_in_use"),
            }
            numbers["rows"].append(row)
            memory = "" if row["bytes_in_use"] is None else f", {row['bytes_in_use'] / 1e9:.2f} GB"
            if config.json is not None:
                config.json.write_text(json.dumps(numbers, indent=2) + "\n")
            print(
                f"batch {batch}, {n_read:,} tokens read: prefill "
                f"{row['prefill_tokens_per_second']:,.0f} tokens/s, decoding "
                f"{row['decode_tokens_per_second']:,.0f} tokens/s{memory}",
                flush=True,
            )


if __name__ == "__main__":
    cli.run(main)
