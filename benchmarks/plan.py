"""XLA's plan for the training step on H100s: kernels, bytes that they move, what the GPUs exchange,
memory of each.

The step is compiled but not run, so no GPU is needed, only JAX's CUDA plugin, as in `jax[cuda13]`,
cuDNN with it for attention, and for the kernels of Gated DeltaNet and Mamba2 the extra `baselines`.
Matmuls are left to cuBLAS, as other GEMMs cannot be timed against it.
"""

import collections
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from benchmarks.measure.described_gpu import compiling_for
from benchmarks.measure.flags import parse_with_preset, require_writable
from benchmarks.measure.gpu_profile import part_of
from e88_jax import hardware
from e88_jax.config import LMConfig
from e88_jax.mixers.base import Execution
from e88_jax.sizing import find_preset, training_memory
from experiments import cli
from experiments.cli import require
from experiments.cli.errors import UsageError
from experiments.harness.config import DEFAULT_MODEL, OptimizerConfig, check_chunks
from experiments.harness.mesh_sizes import check_model, parse_mesh
from pallas_kernels import target


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """List what XLA compiles the training step of train_byte_lm.py to, for H100s of one host."""

    preset: str | None = None
    """Take a model of the sizing guide, such as h72n32-500m or mamba2-500m. Flags of the model
    change it."""
    kernels: int = 30
    """Kernels listed, those that move the most bytes."""
    memory: Path | None = None
    """Instead, compile each configuration of this JSON file (`tests/sizing/`) again and write its
    bytes."""
    batch_size: int = 8
    """Sequences of a step."""
    seq_len: int = 2048
    """Tokens of each."""
    mesh: str = "data=1"
    """GPUs, such as data=2,fsdp=4; the plan is that of one of them."""
    model: LMConfig = DEFAULT_MODEL

    def __post_init__(self) -> None:
        require(self, "batch_size", "seq_len", "kernels", minimum=1)
        if parse_mesh(self.mesh, self.batch_size) is None:
            raise ValueError(f"--mesh {self.mesh} takes the GPUs that are there: give numbers.")
        check_chunks(self.seq_len, self.model)


class Exchange(NamedTuple):
    """Collectives of one kind in a program."""

    n: int
    n_bytes: int
    """Whole arrays: gathered ones, and ones that are summed."""


class Kernel(NamedTuple):
    """One instruction of the compiled program."""

    name: str
    part: str
    n_bytes: int
    """Read and written, as if nothing came from a cache."""
    result: str


def on_a_gpu(model: LMConfig) -> LMConfig:
    """The model with what a GPU that has the kernels would choose."""
    execution = dataclasses.replace(
        model.execution,
        dtype=model.execution.dtype or "bfloat16",
        implementation=model.execution.implementation or "mosaic_gpu",
    )
    return dataclasses.replace(model, execution=execution)


def model_of(plan: dict[str, Any]) -> LMConfig:
    """The model of an entry of the file of `--memory`: a preset with changes.

    `layer` changes the preset's layer; `layers` of `model` replaces it.
    """
    preset = find_preset(plan["preset"]).config
    layer: Any = dataclasses.replace(cast(Any, preset.layers[0]), **plan["layer"])
    execution = Execution(**plan["execution"])
    config = dataclasses.replace(preset, layers=(layer,), depth=plan["depth"], execution=execution)
    return LMConfig.from_dict(config.to_dict() | plan["model"])


def lower_step(model: LMConfig, batch: int, length: int, where: Any = None) -> Any:
    """The training step for CUDA, to be compiled; `where` is the `Placement` of its arrays, None
    for one device."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from e88_jax.model import LanguageModel
    from experiments.harness.mesh import alone
    from experiments.harness.optimizer import make_optimizer
    from experiments.harness.step import TrainState, init_state, jit_train_step, shapes_of
    from experiments.tasks.base import Batch
    from experiments.tasks.bytes import BITS_PER_BYTE

    config, where = OptimizerConfig(), where or alone()
    optimizer = make_optimizer(config, steps=1000)

    def build() -> TrainState:
        return init_state(LanguageModel(model, rngs=nnx.Rngs(0)), optimizer, None)

    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        state = shapes_of(build, where)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0))))
        tokens: Any = jax.ShapeDtypeStruct((1, batch, length), jnp.uint8, sharding=where.by_row)
        restart: Any = jax.ShapeDtypeStruct((), bool, sharding=where.everywhere)
        step = jit_train_step(graphdef, optimizer, config.clip_norm, BITS_PER_BYTE, state)
        traced = step.trace(state, Batch(tokens, tokens, None, restart))
    return traced.lower(lowering_platforms=("cuda",))


def compile_for_h100(model: LMConfig, batch: int, length: int, mesh: str = "data=1") -> Any:
    """The training step, with the options of XLA that it has on a GPU."""
    sizes = parse_mesh(mesh, batch)
    assert sizes is not None
    with compiling_for(target.H100, sizes.n_devices) as devices:
        from experiments.harness.mesh import Placement

        lowered = lower_step(model, batch, length, Placement.of(sizes, devices))
    return lowered.compile()


def planned_bytes(compiled: Any) -> int:
    """Memory of arguments and of what is worked on."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def memory_line(
    model: LMConfig, batch: int, length: int, planned: int, mesh: str = "data=1"
) -> str:
    """The bytes of XLA's plan beside the estimate, which is left out for mixers without one and for
    meshes with heads."""
    sizes = parse_mesh(mesh, batch)
    assert sizes is not None
    planned_gb = f"memory: {planned / 1e9:.2f} GB"
    if sizes.n_devices > 1:
        planned_gb += f" on each device of {mesh}"
    if sizes.heads > 1:
        return planned_gb
    execution: Any = model.execution
    options = {"dtype": execution.dtype, "implementation": execution.implementation}
    try:
        estimate = training_memory(model, batch // sizes.data, length, fsdp=sizes.fsdp, **options)
        says = f"e88_jax.sizing says {estimate.total / 1e9:.2f}"
    except ValueError as error:
        says = str(error)
    return f"{planned_gb}; {says}"


_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_FREE = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple")
_AS_IT_IS = ("convert", "bitcast", "reshape", "copy")


class _Instruction(NamedTuple):
    shape: str
    op: str
    operands: list[str]
    line: str


def _elements(shape: str) -> Iterator[tuple[str, int]]:
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        if dtype in _SIZES:
            n = 1
            for dim in filter(None, dims.split(",")):
                n *= int(dim)
            yield dtype, n


def _bytes(shape: str) -> int:
    return sum(_SIZES[dtype] * n for dtype, n in _elements(shape))


def _computations(text: str) -> dict[str, dict[str, _Instruction]]:
    """The instructions of each computation by name; the program is `ENTRY`."""
    found = {}
    for block in re.split(r"\n(?=%|ENTRY)", text):
        header = re.match(r"(ENTRY|%[\w.\-]+) ", block)
        if header is None:
            continue
        found[header[1].removeprefix("%")] = {
            match[1]: _Instruction(
                match[2], match[3], re.findall(r"%([\w.\-]+)", match[4].split("), ")[0]), line
            )
            for line in block.splitlines()
            if (match := _INSTRUCTION.match(line))
        }
    return found


def _read(computation: dict[str, _Instruction], parameter: str) -> int:
    """Bytes of a fusion's parameter that it reads: of slices, if it takes only these."""
    users = collections.defaultdict(list)
    for name, instruction in computation.items():
        for operand in instruction.operands:
            users[operand].append(name)
    whole = _bytes(computation[parameter].shape)
    ((dtype, _),) = list(_elements(computation[parameter].shape)) or [("pred", 0)]
    total, reached = 0, [parameter]
    while reached:
        for name in users[reached.pop()]:
            instruction = computation[name]
            if instruction.op in ("slice", "dynamic-slice", "gather"):
                total += _SIZES[dtype] * sum(n for _, n in _elements(instruction.shape))
            elif instruction.op in _AS_IT_IS:
                reached.append(name)
            else:
                return whole
    return min(total, whole)


_COLLECTIVES = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"


def exchanges_of(text: str) -> dict[str, Exchange]:
    """Exchanges between the devices of a compiled program, by kind."""
    found: dict[str, Exchange] = {}
    for computation in _computations(text).values():
        for shape, op, operands, _ in computation.values():
            kind = op.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            given = sum(_bytes(computation[x].shape) for x in operands if x in computation)
            made = _bytes(shape)
            starts = op != kind and kind != "all-reduce"
            if starts or shape.startswith("(("):  # arguments, then results
                made -= given
            before = found.get(kind, Exchange(0, 0))
            found[kind] = Exchange(before.n + 1, before.n_bytes + max(given, made))
    return found


def kernels_of(text: str) -> list[Kernel]:
    """The kernels of a compiled program from its text, in their order, but for collectives."""
    computations = _computations(text)
    program, kernels = computations["ENTRY"], []
    for name, (shape, op, operands, line) in program.items():
        if op in _FREE or op.removesuffix("-start").removesuffix("-done") in _COLLECTIVES:
            continue
        called = re.search(r"calls=%([\w.\-]+)", line)
        fused = computations.get(called[1]) if op == "fusion" and called else None
        if fused is not None:
            parameters = [x for x, instruction in fused.items() if instruction.op == "parameter"]
            moved = _bytes(shape) + sum(_read(fused, parameter) for parameter in parameters)
        else:
            shapes = (program[x].shape for x in dict.fromkeys(operands) if x in program)
            moved = _bytes(shape) + sum(map(_bytes, shapes))
        part = part_of(line if op == "custom-call" else name)
        kernels.append(Kernel(name, part, moved, re.sub(r"\{[^}]*\}", "", shape)))
    return kernels


def fill_in(path: Path) -> None:
    """Compiles each configuration in the file and writes its bytes."""
    from rich.console import Console
    from rich.progress import track

    plans = json.loads(path.read_text())
    for plan in track(plans, "compiling", console=Console(stderr=True)):
        model = on_a_gpu(model_of(plan))
        compiled = compile_for_h100(model, plan["batch"], plan["length"], plan["mesh"])
        plan["bytes"] = planned_bytes(compiled)
    rows = ",\n".join(f"  {json.dumps(plan)}" for plan in plans)
    path.write_text(f"[\n{rows}\n]\n")


def main(args: Sequence[str]) -> None:
    """Parses, compiles, prints."""
    config = parse_with_preset(PlanConfig, args)
    require_writable(config.memory)
    if config.memory is not None:
        fill_in(config.memory)
        return
    model = on_a_gpu(config.model)
    execution: Any = model.execution
    if execution.implementation == "scan":
        raise UsageError("--implementation scan is a loop, whose kernels this does not list.")
    check_model(parse_mesh(config.mesh, config.batch_size), model)
    began = time.perf_counter()
    compiled = compile_for_h100(model, config.batch_size, config.seq_len, config.mesh)
    seconds = time.perf_counter() - began
    kernels = kernels_of(compiled.as_text())
    bandwidth = hardware.find_gpu("h100").memory_bandwidth_GBps
    for kernel in sorted(kernels, key=lambda kernel: -kernel.n_bytes)[: config.kernels]:
        print(
            f"{kernel.n_bytes / 1e6:9,.0f} MB  {kernel.part:20} {kernel.name:40.40} {kernel.result}"
        )
    print()
    for part in dict.fromkeys(kernel.part for kernel in kernels):
        own = [kernel.n_bytes for kernel in kernels if kernel.part == part]
        ms = sum(own) / bandwidth / 1e6
        print(
            f"{part:20} {len(own):5} kernels {sum(own) / 1e9:9.2f} GB, {ms:7.2f} ms at "
            f"{bandwidth:,} GB/s"
        )
    for kind, (n, n_bytes) in exchanges_of(compiled.as_text()).items():
        print(f"{kind:20} {n:5} times {n_bytes / 1e9:10.2f} GB of whole arrays")
    memory = planned_bytes(compiled)
    print(memory_line(model, config.batch_size, config.seq_len, memory, config.mesh))
    print(f"lowered and compiled in {seconds:.1f} s")


if __name__ == "__main__":
    cli.run(main)
