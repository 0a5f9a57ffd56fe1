"""Mistakes are refused before JAX is imported: the programs' mains, in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.tasks.bytes import ByteLMConfig

ROOT = Path(__file__).parents[2]
SENTENCES = {
    # The directory of the run.
    "train_byte_lm --out full": "--out full is not empty: choose another directory.",
    "train_byte_lm --out file": "--out file is a file.",
    "train_byte_lm --out file/deeper": "--out file/deeper: Not a directory, as",
    "train_byte_lm --out dangling": "--out dangling is a link to nothing.",
    "train_byte_lm --out run": "run already holds a run: continue it with --resume",
    "train_byte_lm --out run/deeper --data file": "file is empty",
    "train_byte_lm --resume": "there is no run under runs/: name one with --out.",
    "train_byte_lm --resume --out nothing": "nothing holds no run (no run.json in it).",
    "train_byte_lm --resume --out full": "full holds no run (no run.json in it).",
    "train_byte_lm --resume --out run --dim 32": "another configuration, --dim 256 (not 32)",
    "train_byte_lm --resume --out run --steps 800": "which names the files of the corpus, is gone.",
    "train_byte_lm --resume --out run --steps 700": "run has done 800 steps: raise --steps.",
    "train_byte_lm --resume --out broken": "run.json",
    # The data.
    "train_byte_lm --data none": "none is no file, directory or matching glob.",
    "train_byte_lm --data pipe": "pipe is not a regular file.",
    "train_byte_lm --data file": "holds no bytes: every file is empty.",
    "train_byte_lm --data short": "corpus of 300 bytes leaves 15 for validation, shorter",
    "train_byte_lm --data short --seq-len 20": "leaves 15 for validation, shorter",
    "train_byte_lm --seq-len 1000000000": "make 8,000,000,008 tokens a step",
    "train_byte_lm --stateful --batch-size 1000000": "training bytes over 1000000 rows are shorter",
    # The model.
    "train_byte_lm --preset h1": "unknown preset 'h1'",
    "train_byte_lm --params x": "such as 500M",
    "train_byte_lm --gpu h100": "--params, which is not given",
    "train_byte_lm --dim 1000000000": "parameters, and 10,000,000,000 are the most",
    "train_byte_lm --dim 0": "dim must be at least 1, got 0",
    "train_byte_lm --tie-kv --expansion 2": "needs expansion = 1, got 2.0",
    "train_byte_lm --keep 0": "--keep must be at least 1, got 0.",
    "n_state_scaling --out full": "--out full is not empty: choose another directory.",
    "n_state_scaling --out file/deeper": "Not a directory",
    "n_state_scaling --d-inner 8 --n-state 16": "--d-inner must be at least as large as every",
    "n_state_scaling --repetitions 0": "--repetitions must be at least 1, got 0.",
    "sample nothing": "nothing holds no run (no run.json in it).",
    "sample run --top-p 3": "top_p must be in (0, 1], got 3.0",
    "sample run --top-k 0": "top_k must be",
    "sample run --temperature nan": "temperature must be",
    "sample run --temperature inf": "temperature must be",
    "sample run --length -1": "--length must be at least 0 bytes, got -1.",
    "train_step --json no/such/file": "no/such/file cannot be written: no/such is not a directory.",
    "train_step --json full": "full cannot be written: it is a directory.",
    "train_step --repeats 0": "--repeats must be at least 1, got 0.",
    "train_step --grid presets --json short": "short does not hold a grid",
    "decode --json no/such/file": "no/such/file cannot be written",
    "decode --batch-sizes": "--batch-sizes must name at least one size.",
    "plan --memory no/such/file": "no/such/file cannot be written",
    "plan --kernels -1": "--kernels must be at least 1, got -1.",
    "plan --implementation scan": "--implementation scan is a loop",
}
PROGRAM = """
import importlib, json, sys
answers = {}
for line in json.loads(sys.argv[1]):
    program, *args = line.split()
    try:
        importlib.import_module(program).main(args)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    answers[line] = said, sorted({"jax", "grain", "orbax"} & sys.modules.keys())
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The message of each program, and the slow modules that were imported by then."""
    here = tmp_path_factory.mktemp("here")
    for name in ("full", "run", "broken", "runs"):
        (here / name).mkdir()
    (here / "full" / "precious").touch()
    (here / "file").touch()
    (here / "dangling").symlink_to("nowhere")
    (here / "short").write_bytes(bytes(300))
    os.mkfifo(here / "pipe")
    described = {"config": ByteLMConfig().to_dict(), "devices": "", "versions": {}}
    (here / "run" / "run.json").write_text(json.dumps(described))
    (here / "run" / "checkpoints" / "800").mkdir(parents=True)
    (here / "run" / "checkpoints" / "900.orbax-checkpoint-tmp").mkdir()
    (here / "broken" / "run.json").write_text(json.dumps({**described, "config": {}}))
    before = sorted(here.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([*SENTENCES])],
        cwd=here,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "experiments"), str(ROOT / "benchmarks")]
            ),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(here.rglob("*")) == before
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", SENTENCES)
def test_mistakes_do_not_wait_for_jax(answers: dict[str, Any], line: str) -> None:
    said, imported = answers[line]
    assert said.startswith("UsageError: ")
    assert SENTENCES[line] in said
    assert "\n" not in said
    assert imported == []
