"""The very PTX for GPUs before Hopper, on the GPU at hand: it runs on every later GPU, once it is
assembled for that."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from e88_jax import hardware, selfcheck
from pallas_kernels import target
from tests.gpu import older_ptx

WRAPPER = """#!/bin/sh
# Keeps the PTX of E88's kernels in the folder KEEP, or assembles that of the same kernel in TAKE;
# XLA's own kernels pass as they are.
ptx="$1"
[ -f "$ptx" ] || exec {ptxas} "$@"
entry=$(sed -n 's/.*\\.entry \\(e88_[A-Za-z0-9_]*\\).*/\\1/p' "$ptx" | head -n 1)
[ -n "$entry" ] || exec {ptxas} "$@"
if [ -n "$KEEP" ]; then cp "$ptx" "$KEEP/$entry"; fi
if [ -n "$TAKE" ] && [ -f "$TAKE/$entry" ]; then
    cp "$TAKE/$entry" "$ptx"
    echo "$entry" >>"$TAKE/taken"
fi
exec {ptxas} "$@"
"""


def assembler() -> str | None:
    """ptxas as pip installs it with JAX's CUDA plugin, or on PATH."""
    nvidia = importlib.util.find_spec("nvidia")
    places = nvidia.submodule_search_locations or [] if nvidia else []
    pip = ":".join(f"{place}/cu13/bin" for place in places)
    return shutil.which("ptxas", path=pip) or shutil.which("ptxas")


PTXAS = assembler()


def in_a_process(function: str, name: str, case: int, wrapper: Path, **folder: Path) -> str:
    flags = [sys.executable, "-m", older_ptx.__name__, function, name, str(case)]
    own = {
        "PATH": f"{wrapper.parent}:{os.environ['PATH']}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    folders = {key: str(path) for key, path in folder.items()}
    done = subprocess.run(
        flags, env=os.environ | own | folders, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(
    target.kernels_refusal(target.current()) is not None or PTXAS is None,
    reason="needs a GPU with the kernels, and ptxas",
)
@pytest.mark.parametrize("case", range(len(older_ptx.CASES)), ids=lambda i: str(older_ptx.CASES[i]))
@pytest.mark.parametrize("name", ["a100-80gb", "rtx3090", "rtx4090"])
def test_older_ptx(name: str, case: int, tmp_path: Path) -> None:
    wrapper, kept = tmp_path / "bin" / "ptxas", tmp_path / "kept"
    wrapper.parent.mkdir()
    kept.mkdir()
    wrapper.write_text(WRAPPER.format(ptxas=PTXAS))
    wrapper.chmod(0o755)
    in_a_process("compile_for", name, case, wrapper, KEEP=kept)
    kernels = {path.name for path in kept.iterdir()}
    older = "sm_" + "".join(map(str, hardware.find_gpu(name).compute_capability))
    assert len(kernels) == 2
    assert all(f".target {older}\n" in path.read_text() for path in kept.iterdir())
    ratios = json.loads(in_a_process("run_as", name, case, wrapper, TAKE=kept))
    assert set((kept / "taken").read_text().split()) == kernels
    assert max(ratios.values()) < selfcheck.BOUNDS[older_ptx.CASES[case].dtype]
