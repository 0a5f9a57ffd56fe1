"""`python -m e88_jax.sizing`: from a budget and a GPU to configurations, in a table."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from e88_jax import command, hardware
from e88_jax.config import E88Config, LMConfig, OutputGate
from e88_jax.mixers.base import Execution
from e88_jax.sizing import report
from e88_jax.sizing.compare import compare
from e88_jax.sizing.presets import PRESETS
from e88_jax.sizing.search import parse_params, solve


def _parse_config(assignments: Sequence[str]) -> LMConfig:
    """A configuration from words such as `dim=2176`."""
    parts = {"layer": E88Config, "execution": Execution, "model": LMConfig}
    fields = {
        part: {field.name: field.type for field in dataclasses.fields(kind)}
        for part, kind in parts.items()
    }
    for name in ("layers", "execution"):
        del fields["model"][name]
    values: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for word in assignments:
        name, equals, value = word.partition("=")
        part = next((part for part, names in fields.items() if name in names), None)
        if not equals or part is None:
            names = ", ".join(name for names in fields.values() for name in names)
            raise ValueError(f"--check takes name=value, got {word!r}; the names are {names}.")
        if name in values[part]:
            raise ValueError(f"--check takes each name once, got {name} twice.")
        values[part][name] = _parse_value(name, value, fields[part][name])
    given = values["layer"] | values["model"]
    if missing := [name for name in ("dim", "n_heads", "depth") if name not in given]:
        raise ValueError(f"--check needs {', '.join(missing)} too.")
    return LMConfig(
        layers=(E88Config(**values["layer"]),),
        execution=Execution(**values["execution"]),
        **values["model"],
    )


_FOR_SOLVE = ("depth", "n_state", "gate", "rows")
_FOR_A_BUDGET = (*_FOR_SOLVE, "vocab_size", "compare")
_FOR_A_MODEL = ("gpu", "batch_size", "seq_len", "fsdp")


def _refuse_what_is_not_read(options: argparse.Namespace) -> None:
    """Raises:
    ValueError: an option is given that the task asked for does not read.
    """
    if options.presets:
        asked, names = "--presets", _FOR_A_BUDGET + _FOR_A_MODEL
    elif options.check is not None:
        asked, names = "--check, which takes name=value", _FOR_A_BUDGET
    else:
        asked, names = "--compare", _FOR_SOLVE if options.compare else ()
    parser = _parser()
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with {asked}.")
    if options.measure and not options.compare:
        raise ValueError("--measure goes with --compare only.")
    if options.measure and options.fsdp != 1:
        raise ValueError("--measure times on one GPU, so it does not go with --fsdp.")


def _parse_value(name: str, text: str, kind: Any) -> Any:
    if kind == int | None and text.lower() == "none":
        return None
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {text!r}.")
        return text.lower() == "true"
    if kind not in (int, int | None, float):
        return text  # checked by the configuration
    try:
        return float(text) if kind is float else int(text)
    except ValueError:
        what = "a number" if kind is float else "a whole number"
        raise ValueError(f"{name} must be {what}, got {text!r}.") from None


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m e88_jax.sizing",
        description="Finds configurations for a budget of parameters and a GPU, compares E88 with "
        "other mixers at a budget, checks a configuration, or prints the sizing guide's.",
        epilog="docs/sizing.md explains the columns. Exits with 2, and one sentence, for what "
        "cannot be done.",
    )
    parser.add_argument("params", nargs="?", help="budget, such as 500M, 1.3B or 25000000")
    parser.add_argument(
        "--gpu",
        help=f"{', '.join(gpu.key for gpu in hardware.GPUS)}; by default the one in this machine, "
        "if it is one of these",
    )
    parser.add_argument("--depth", type=int, help="layers; by default near the usual number")
    parser.add_argument("--n-state", type=int, help="by default what suits the GPU")
    parser.add_argument("--vocab-size", type=int, default=256, help="token ids (256: bytes)")
    parser.add_argument("--gate", default="silu", choices=get_args(OutputGate), help="output gate")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences of a step, for memory and timing (8)"
    )
    parser.add_argument(
        "--seq-len", type=int, default=2048, help="tokens of each, for memory and timing (2048)"
    )
    parser.add_argument(
        "--fsdp",
        type=int,
        default=1,
        help="GPUs that sequences, weights and optimizer state are divided over, for the memory of "
        "one (1)",
    )
    parser.add_argument("--rows", type=int, default=8, help="most configurations printed (8)")
    parser.add_argument(
        "--check",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="say what is wrong with one configuration, such as dim=8192 n_heads=20 n_state=32 "
        "depth=20",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="instead size E88, Gated DeltaNet, Mamba2, a transformer and hybrids to the budget",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="with --compare, time a training step of each on the GPU of this machine",
    )
    parser.add_argument("--presets", action="store_true", help="print the guide's configurations")
    parser.add_argument("--json", action="store_true", help="print plain data for machines")
    return parser


def run(options: argparse.Namespace) -> str:
    """The text to print.

    Raises:
        ValueError: options that contradict each other, or no such configuration.
    """
    if sum([options.params is not None, options.check is not None, options.presets]) != 1:
        raise ValueError("give a budget such as 500M, or --check, or --presets.")
    _refuse_what_is_not_read(options)
    for name in ("batch_size", "seq_len", "fsdp", "rows"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(options, name)}.")
    if options.presets:
        rows = [report.preset_row(name) for name in PRESETS]
        return json.dumps(rows, indent=2) if options.json else report.presets_text(rows)
    gpu = hardware.detect_gpu() if options.gpu is None else hardware.find_gpu(options.gpu)
    if options.compare:
        return _compare(options, gpu)
    if options.check is not None:
        configs = [_parse_config(options.check)]
    else:
        found = solve(
            parse_params(options.params),
            gpu=gpu,
            depth=options.depth,
            n_state=options.n_state,
            vocab_size=options.vocab_size,
            gate=options.gate,
        )
        configs = [solution.config for solution in found[: options.rows]]
    batch, length, fsdp = options.batch_size, options.seq_len, options.fsdp
    rows = [report.describe(config, gpu, batch, length, fsdp) for config in configs]
    if options.json:
        numbers = {"gpu": gpu and gpu.key, "fsdp": fsdp, "configurations": rows}
        return json.dumps(numbers, indent=2)
    text = report.configurations_text(rows)
    if options.check is not None and not rows[0]["findings"]:
        text += "\nNothing to change."
    return f"{_about(gpu, options)}\n{text}"


def _compare(options: argparse.Namespace, gpu: hardware.GPU | None) -> str:
    """The comparison at a budget."""
    batch, length = options.batch_size, options.seq_len
    params, measured_on = parse_params(options.params), None
    matches = compare(params, gpu=gpu, vocab_size=options.vocab_size)
    rows = report.comparison(matches, gpu, batch, length, options.fsdp)
    if options.measure:
        from e88_jax.sizing import measure  # imports JAX

        measured_on = measure.require_gpu()
        for row, match in zip(rows, matches, strict=True):
            row["tokens_per_second"] = measure.tokens_per_second(match.config, batch, length)
    if options.json:
        numbers = {"budget": params, "gpu": gpu and gpu.key, "measured_on": measured_on}
        numbers |= {"batch_size": batch, "seq_len": length, "fsdp": options.fsdp, "models": rows}
        return json.dumps(numbers, indent=2)
    about = _about(gpu, options)
    if measured_on is not None:
        about += f" Tokens/s: training steps timed on an {measured_on}."
    return f"{about}\n{report.comparison_text(rows, length)}"


def _about(gpu: hardware.GPU | None, options: argparse.Namespace) -> str:
    fsdp, batch = options.fsdp, f"batch {options.batch_size}"
    if fsdp > 1:
        batch = f"of each of {fsdp} GPUs (--mesh fsdp={fsdp}), {batch} over all"
    memory = f"training GB: {batch}, length {options.seq_len}, bfloat16, AdamW"
    if gpu is None:
        return f"No GPU given. {memory}."
    how = gpu.how_n_state_is_known
    text = f"{gpu.name}: n_state {', '.join(map(str, gpu.recommended_n_state))} ({how})"
    if gpu.published and how != "published":
        low, high = gpu.published.optimal_n_state
        text += f", {low} to {high} published"
    return f"{text}, {gpu.memory_GB} GB. {memory[0].upper()}{memory[1:]}."


def main(args: Sequence[str] | None = None) -> int:
    """Prints the answer; for a mistake prints one sentence to stderr and returns 2."""
    words = sys.argv[1:] if args is None else args
    # A word with a space is no flag: a negative budget is to be refused as a budget.
    words = [f" {word}" if re.match(r"-\d", word) else word for word in words]
    try:
        print(run(_parser().parse_args(words)))
    except ValueError as error:
        print(f"e88_jax.sizing: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    command.run(main, prog="e88_jax.sizing")
