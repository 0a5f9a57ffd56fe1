"""Writes the measured tables of the documentation from the recorded results.

A page marks the place of a table by `<!-- table: NAME -->` and `<!-- end -->`; what stands between
them is rewritten. The recorded results are `benchmarks/results/` and `experiments/results/`.
"""

import argparse
import difflib
import functools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import expressivity_tables, gpu_tables, scaling, sizing_tables
from benchmarks.recorded import (
    N_STATE,
    ROOT,
    STEP_GPU,
    Record,
    about_recurrence,
    block,
    passes,
    percent,
    provenance,
    read,
)
from e88_jax import command
from experiments import markdown

PAGES = (
    "README.md",
    "docs/distributed.md",
    "docs/expressivity.md",
    "docs/gpus.md",
    "docs/performance.md",
    "docs/sizing.md",
)

DECODE = "benchmarks/results/decode_h100.json"
RECURRENCE = "benchmarks/results/recurrence_h100.json"
STEP_CPU = "benchmarks/results/train_step_cpu.json"
STEP_MIXERS = "benchmarks/results/mixers_h100.json"
SCALING = ("benchmarks/results/scaling_h200_x4.json", "benchmarks/results/scaling_h200_x2.json")
RUN = "experiments/results/h72n32-500m_h100"


def _recurrence() -> tuple[Record, str, list[Record], list[Record]]:
    """The file, its command, the named shapes and the sweep over N at equal B * H * N * V."""
    result = read(RECURRENCE)
    command = (
        f"python -m benchmarks.recurrence --repetitions {result['repetitions']} --json {RECURRENCE}"
    )
    sweep = [shape for shape in result["shapes"] if shape["name"].startswith("N=")]
    return result, command, [x for x in result["shapes"] if x not in sweep], sweep


def recurrence() -> str:
    result, command, shapes, _ = _recurrence()
    rows = []
    for shape in shapes:
        forward, backward, both = passes(shape)
        rows.append(
            [
                f"({', '.join(str(shape[axis]) for axis in 'BTHN')})",
                f"{forward['ms']:.3f}",
                f"{backward['ms']:.3f}",
                f"{both['tokens_per_second'] / 1e6:.1f}",
                f"{forward['times_tanh_limit']:.1f} / {backward['times_tanh_limit']:.1f}",
                f"{both['scan_ms']:.0f}",
            ]
        )
    header = [
        "(B, T, H, N = V)",
        "forward, ms",
        "backward, ms",
        "forward + backward, million tokens/s",
        "forward / backward over the tanh limit",
        "forward + backward by the scan, ms",
    ]
    about = f"{about_recurrence(result)}, {result['dtype']}"
    return block(about, command, markdown.table(header, rows))


def recurrence_sizes() -> str:
    result, command, _, sweep = _recurrence()
    of_shapes = [passes(shape) for shape in sweep]
    rows = [
        [name, *(f"{x[i]['ps_per_element']:.2f} ({x[i]['times_n32']:.2f})" for x in of_shapes)]
        for i, name in enumerate(("forward", "backward"))
    ]
    header = ["N = V", *(str(shape["N"]) for shape in sweep)]
    about = f"{about_recurrence(result)}, {result['dtype']}"
    return block(about, command, markdown.table(header, rows))


def train_step() -> str:
    points: Record = read(STEP_GPU)["points"]
    rows = []
    for point in points.values():
        data, parts = point["config"]["data"], point["part_ms"]
        forward, backward = parts["recurrence forward"], parts["recurrence backward"]
        share = (forward + backward) / sum(parts.values())
        rows.append(
            [
                f"{point['config']['preset']} ({point['parameters'] / 1e6:,.0f}M)",
                f"{data['seq_len']} x {data['batch_size']}",
                f"{point['tokens_per_second']:,.0f}",
                percent(point["mfu"]),
                f"{parts['matmuls']:.0f}",
                f"{forward:.0f} + {backward:.0f} ({percent(share)})",
                f"{parts['everything else']:.0f}",
                f"{parts['idle']:.1f}",
                f"{point['peak_bytes_in_use'] / 1e9:.0f}",
            ]
        )
    header = [
        "preset (parameters)",
        "tokens x batch",
        "tokens/s",
        "MFU",
        "matmuls, ms",
        "recurrence, forward + backward, ms",
        "everything else, ms",
        "idle, ms",
        "memory, GB",
    ]
    command = f"python -m benchmarks.train_step --grid presets --json {STEP_GPU}"
    (about,) = {provenance(point) for point in points.values()}
    return block(about, command, markdown.table(header, rows))


def train_step_cpu() -> str:
    result = read(STEP_CPU)
    data = result["config"]["data"]
    row = [
        f"{result['parameters']:,}",
        f"{data['seq_len']} x {data['batch_size']}",
        f"{result['tokens_per_second']:,.0f}",
        f"{result['compile_seconds']:.1f}",
    ]
    table = markdown.table(["parameters", "tokens x batch", "tokens/s", "compile, s"], [row])
    return block(provenance(result), f"python -m benchmarks.train_step --json {STEP_CPU}", table)


def decode() -> str:
    result = read(DECODE)
    rows = [
        [
            str(row["batch"]),
            f"{row['context']:,}",
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
            f"{row['bytes_in_use'] / 1e9:.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["batch", "tokens read before", "prefill, tokens/s", "decode, tokens/s", "memory, GB"]
    preset = result["config"]["preset"]
    command = f"python -m benchmarks.decode --preset {preset} --json {DECODE}"
    return block(provenance(result), command, markdown.table(header, rows))


def training_run() -> str:
    result = read(f"{RUN}/run.json")
    config = result["config"]
    data = config["data"]
    lines = (ROOT / RUN / "metrics.jsonl").read_text().splitlines()
    records: list[Record] = [json.loads(line) for line in lines]
    rates = [x["bytes_per_second"] for x in records if x["kind"] == "train"]
    losses = [x["bits_per_byte"] for x in records if x["kind"] == "validation"]
    row = [
        f"{config['preset']} ({result['parameters'] / 1e6:,.0f}M)",
        f"{data['seq_len']} x {data['batch_size']}",
        f"{config['steps']}",
        ", ".join(str(x["step"]) for x in result["resumed"][:1]) or "none",
        f"{statistics.median(rates):,.0f}",
        f"{losses[-1]:.2f}",
    ]
    header = ["preset (parameters)", "tokens x batch", "steps", "stopped and resumed at step"]
    header += ["tokens/s, median", "validation, bits per byte"]
    return f"{provenance(result)}:\n\n{markdown.table(header, [row])}"


_MIXERS = {
    "--preset h72n32-500m": "E88 (h72n32-500m)",
    "--preset gated-deltanet-500m": "Gated DeltaNet (gated-deltanet-500m)",
    "--preset mamba2-500m": "Mamba2 (mamba2-500m)",
    "--mixer attention": "transformer",
    "--layout e88": "E88 and attention, 3 : 1",
    "--layout gated_deltanet": "Gated DeltaNet and attention, 3 : 1",
}
"""Models of the grid `mixers` by how their flags begin."""


def mixers() -> str:
    """The best batch size of each model, fastest first."""
    points: Record = read(STEP_MIXERS)["points"]
    models: dict[str, Record] = {}
    for flags, point in points.items():
        (title,) = (title for begin, title in _MIXERS.items() if flags.startswith(begin))
        if "--implementation chunked" in flags:
            title += ", chunk form in plain JAX"
        best = models.setdefault(title, point)
        models[title] = max(best, point, key=lambda x: x["tokens_per_second"])
    rows = [
        [
            title,
            f"{point['parameters'] / 1e6:,.0f}M",
            str(point["config"]["batch"]["batch_size"]),
            f"{point['tokens_per_second']:,.0f}",
            f"{point['peak_bytes_in_use'] / 1e9:.0f}",
        ]
        for title, point in sorted(models.items(), key=lambda row: -row[1]["tokens_per_second"])
    ]
    command = f"python -m benchmarks.train_step --grid mixers --json {STEP_MIXERS}"
    commits = " and ".join(dict.fromkeys(point["commit"] for point in points.values()))
    (about,) = {provenance({**point, "commit": commits}) for point in points.values()}
    header = ["model", "parameters", "best batch", "tokens/s", "memory, GB"]
    return block(f"{about}, bfloat16, T 2048, bytes", command, markdown.table(header, rows))


def headline() -> str:
    """Three numbers: the recurrence of the first shape, training and decoding of one preset."""
    shape = _recurrence()[2][0]
    decoded = read(DECODE)
    preset, first = decoded["config"]["preset"], decoded["rows"][0]
    points = [x for x in read(STEP_GPU)["points"].values() if x["config"]["preset"] == preset]
    trained = max(
        (x for x in points if x["config"]["data"]["seq_len"] == shape["T"]),
        key=lambda point: point["tokens_per_second"],
    )
    data, sizes = trained["config"]["data"], ", ".join(f"{axis} {shape[axis]}" for axis in "BTHN")
    rows = [
        [f"the recurrence, forward + backward ({sizes})", passes(shape)[2]["tokens_per_second"]],
        [
            f"training {preset}, {data['seq_len']} x {data['batch_size']}",
            trained["tokens_per_second"],
        ],
        [f"decoding {preset}, batch {first['batch']}", first["decode_tokens_per_second"]],
    ]
    table = markdown.table(["", "tokens/s"], [[what, f"{rate:,.0f}"] for what, rate in rows])
    return f"{provenance(decoded)}, bfloat16:\n\n{table}"


def over_gpus() -> str:
    """Training steps over the GPUs of a host, by the record of each machine: a table for each kind
    of GPU, versions, date and commit. Points that failed have none of these and stand with the
    point before."""
    blocks: list[str] = []
    for record in SCALING:
        recorded: Record = read(record)["points"]
        of_point = {
            name: provenance({**numbers, "devices": scaling.kind_of(numbers)})
            for name, numbers in recorded.items()
            if "error" not in numbers
        }
        groups: dict[str, dict[str, Any]] = {}
        about = next(iter(of_point.values()))
        for name, numbers in recorded.items():
            about = of_point.get(name, about)
            groups.setdefault(about, {})[name] = numbers
        blocks += [_points_over_gpus(record, about, points) for about, points in groups.items()]
    return "\n\n".join(blocks)


def _points_over_gpus(record: str, about: str, points: dict[str, Any]) -> str:
    timed = [scaling.Point.of(name) for name in points]
    models = " ".join(dict.fromkeys(point.model for point in timed))
    gpus = " ".join(map(str, sorted({point.n for point in timed})))
    repeats = {x["config"]["repeats"] for x in points.values() if "error" not in x}
    command = f"python -m benchmarks.scaling --models {models} --gpus {gpus}"
    command += f" --repeats {' '.join(map(str, sorted(repeats)))} --json {record}"
    return block(about, command, markdown.table(*scaling.table(points)))


def n_state() -> str:
    result = read(N_STATE)
    config, measured = result["config"], result["results"]
    rows = [
        [
            "an element, forward + backward, ps",
            *(f"{x['both_ps_per_element']:.2f}" for x in measured),
        ],
        ["backward over forward", *(f"{x['backward_over_forward']:.1f}" for x in measured)],
        [
            "recurrence, million tokens/s",
            *(_millions(x["recurrence_tokens_per_second"], 1) for x in measured),
        ],
        [
            "training step of a layer, million tokens/s",
            *(_millions(x["training_step_tokens_per_second"], 2) for x in measured),
        ],
    ]
    published = result["published"]
    by_n = published["tokens_per_second"]
    rows.append(
        [
            f"published, tokens/s ({published['device']})",
            *(by_n.get(str(x["n_state"]), "") for x in measured),
        ]
    )
    about = provenance(result, *(t for x in measured for t in x["timings"].values()))
    sizes = f"d_inner {config['d_inner']}, {config['seq_len']} x {config['batch_size']}"
    command = f"python experiments/n_state_scaling.py --out {Path(N_STATE).parent}"
    table = markdown.table(["n_state", *(str(x["n_state"]) for x in measured)], rows)
    return block(f"{about}, {config['dtype']}, {sizes}", command, table)


def _millions(x: float, digits: int) -> str:
    return f"{x / 1e6:.{digits}f}"


def _text_of(table: Callable[[], markdown.Table]) -> Callable[[], str]:
    return lambda: markdown.table(*table())


TABLES: dict[str, Callable[[], str]] = {
    "decode": decode,
    "headline": headline,
    "mixers": mixers,
    "n-state": n_state,
    "over-gpus": over_gpus,
    "recurrence": recurrence,
    "recurrence-sizes": recurrence_sizes,
    "train-step": train_step,
    "train-step-cpu": train_step_cpu,
    "training-run": training_run,
    **gpu_tables.TABLES,
    **{name: _text_of(table) for name, table in sizing_tables.TABLES.items()},
    **{
        f"expressivity-{name}": functools.partial(expressivity_tables.suite, ROOT, name)
        for name in expressivity_tables.RECORDED
    },
}

_START = "<!-- table: "
_MARKED = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def rewritten(page: str) -> str:
    """A page with its tables rewritten.

    Raises:
        ValueError: a mark that names no table, or has no end.
    """

    def again(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"no table {name!r}: choose from {', '.join(TABLES)}.")
        return f"{_START}{name} -->\n\n{TABLES[name]()}\n\n<!-- end -->"

    found = [match[0] for match in _MARKED.finditer(page)]
    if len(found) != page.count(_START) or any(x.count(_START) > 1 for x in found):
        raise ValueError(f"a mark {_START}NAME --> is without its <!-- end -->.")
    return _MARKED.sub(again, page)


def main(args: Sequence[str]) -> int:
    """Rewrites the pages; with `--check` prints what would change, and returns 1 if anything."""
    parser = argparse.ArgumentParser(prog="benchmarks.tables", description=(__doc__ or "").strip())
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a page differs"
    )
    options = parser.parse_args(args)
    stale = 0
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if before == after:
            continue
        stale = 1
        if options.check:
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), name, name)
            print("\n".join(lines))
        else:
            path.write_text(after, encoding="utf-8")
            print(f"{name} rewritten")
    return stale if options.check else 0


if __name__ == "__main__":
    command.run(main)
