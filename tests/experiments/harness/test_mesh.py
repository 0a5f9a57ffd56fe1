"""The mesh of a run: its sizes, and what of weights and rows each device holds."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from e88_jax import (
    AttentionConfig,
    E88Config,
    GatedDeltaNetConfig,
    LanguageModel,
    LMConfig,
    LSTMConfig,
    Mamba2Config,
)
from experiments.cli.errors import UsageError
from experiments.harness import mesh, program
from experiments.harness.config import OptimizerConfig
from experiments.harness.mesh import automatic, placement
from experiments.harness.mesh_sizes import MeshSizes, check_model, parse_mesh
from experiments.harness.optimizer import make_optimizer
from experiments.harness.step import TrainState, init_state, make_sharded, shapes_of
from experiments.tasks.base import Batch
from experiments.tasks.bytes import ByteLMConfig
from tests.reference.configs import lm_config

CONFIG = lm_config(dim=16, n_heads=2, n_state=4)


def test_sizes_of_a_mesh() -> None:
    assert parse_mesh("auto", 3) is None
    assert parse_mesh("fsdp=4,data=2", 16) == MeshSizes(data=2, fsdp=4)
    assert str(MeshSizes(data=2, fsdp=4)) == "data=2,fsdp=4"
    assert str(MeshSizes(fsdp=4)) == "fsdp=4"
    assert parse_mesh("data=2,heads=4", 2) == MeshSizes(data=2, heads=4)  # rows over data alone


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=2,data=2", "rows=2", "data=-1", "4"])
def test_what_is_no_mesh(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"--mesh must be auto, or sizes of data, fsdp, heads such as"
    ):
        parse_mesh(text, 8)


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("data=8", 12, r"12 does not divide into the 8 parts of --mesh data=8: 8 or 16"),
        ("data=2,fsdp=4", 3, r"--batch-size 3 .* data=2,fsdp=4: 8 would\."),
    ],
)
def test_rows_that_do_not_divide(text: str, rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mesh(text, rows)


@pytest.mark.parametrize(
    ("fsdp", "dim", "message"),
    [
        (3, 64, r"--mesh fsdp=3: dim 64 does not divide over fsdp=3: fsdp=2 or 4 would do\."),
        (8, 6, r"--mesh fsdp=8: dim 6 does not divide over fsdp=8: fsdp=6 would do\."),
    ],
)
def test_a_dim_that_does_not_divide(fsdp: int, dim: int, message: str) -> None:
    model = dataclasses.replace(CONFIG, dim=dim)
    check_model(None, model)
    check_model(MeshSizes(fsdp=2), model)
    with pytest.raises(UsageError, match=message):
        check_model(MeshSizes(fsdp=fsdp), model)


def test_heads_that_do_not_divide() -> None:
    check_model(MeshSizes(heads=2), CONFIG)
    message = r"--mesh data=2,heads=3: n_heads 2 does not divide over heads=3: heads=2 would do\."
    with pytest.raises(UsageError, match=message):
        check_model(MeshSizes(data=2, heads=3), CONFIG)


@pytest.mark.parametrize(("flag", "dim"), [(["--dim", "96"], 96), (["--params", "25M"], None)])
def test_the_dim_that_counts_is_the_chosen_model_s(flag: list[str], dim: int | None) -> None:
    """3 does not divide the default's."""
    mesh = ["--mesh", "fsdp=3", "--batch-size", "3"]
    config = program.parse_args(ByteLMConfig, [*flag, *mesh])
    assert config.model.dim == (dim or config.model.dim) != ByteLMConfig().model.dim


def test_more_devices_than_there_are() -> None:
    n = jax.device_count()
    with pytest.raises(UsageError, match=rf"fsdp=16 needs 16 devices, and there are {n}"):
        placement("fsdp=16", 16, CONFIG)


class Device:
    """A GPU with so many bytes."""

    def __init__(self, memory: int | None = None):
        self.memory = memory

    def memory_stats(self) -> dict[str, int] | None:
        return None if self.memory is None else {"bytes_limit": self.memory}


@pytest.mark.parametrize(
    ("rows", "used", "sizes"),
    [(12, 6, "8 or 16"), (1, 1, "8"), (9, 3, "8 or 16"), (20, 5, "16 or 24"), (8, 8, None)],
)
def test_devices_that_a_batch_leaves_idle(
    rows: int, used: int, sizes: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert automatic(rows, CONFIG, [Device()] * 8) == MeshSizes(data=used)
    said = capsys.readouterr().err
    if sizes is None:
        assert said == ""
    else:
        assert said == (
            f"warning: {used} of 8 devices are used, as a batch of {rows} does not divide over "
            f"all: {sizes} would use all.\n"
        )


def test_weights_are_divided_where_a_device_cannot_hold_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    needed = mesh.BYTES_PER_PARAMETER * CONFIG.count_params()
    memory = round(needed / mesh.SHARE_OF_MEMORY) + 1
    assert automatic(8, CONFIG, [Device(memory)] * 8) == MeshSizes(data=8)
    assert capsys.readouterr().err == ""
    assert automatic(8, CONFIG, [Device(memory - 2)] * 8) == MeshSizes(fsdp=8)
    assert "they are divided over 8 devices, as by --mesh fsdp=8." in capsys.readouterr().err
    odd = dataclasses.replace(CONFIG, dim=20)
    assert automatic(8, odd, [Device(1)] * 8) == MeshSizes(data=2, fsdp=4)
    assert automatic(8, CONFIG, [Device(1)]) == MeshSizes()


def test_rows_are_divided_where_they_can_be() -> None:
    where = placement("data=2,fsdp=2", 4, CONFIG)
    for shape, share in (((1, 8, 3), (1, 2, 3)), ((4, 3, 3), (4, 3, 3))):
        tokens = np.zeros(shape, np.uint8)
        batch: Any = where.put(Batch(tokens, tokens, np.ones(shape, np.float32), restart=True))
        for x in batch[:3]:
            assert {shard.data.shape for shard in x.addressable_shards} == {share}
        assert batch.restart
        assert where.put(Batch(tokens, tokens, None, restart=True)).weights is None


@pytest.mark.parametrize("mesh", ["data=4", "data=2,heads=2", "heads=2"])
def test_a_process_that_is_alone_has_all_rows(mesh: str) -> None:
    assert placement(mesh, 8, CONFIG).rows_here(8) == slice(0, 8)


def test_axes_have_names() -> None:
    """Each of these sizes is that of one kind of axis; of heads there are three."""
    kinds = {40: "dim", 7: "heads", 10: "heads", 5: "heads", 24: "hidden"}
    e88 = E88Config(
        n_heads=7, n_state=4, value_residual=True, write_gate=True, conv_size=3, output_norm=True
    )
    layers = (
        e88,
        dataclasses.replace(e88, head_mix="input_weighted", tie_kv=True),
        dataclasses.replace(e88, head_mix="weighted_sum", decay_mode="constant"),
        GatedDeltaNetConfig(n_heads=5, n_value_heads=10, head_dim=4),
        Mamba2Config(d_state=8, head_dim=8, n_groups=5),
        AttentionConfig(n_heads=10, n_kv_heads=5, head_dim=4),
        LSTMConfig(width=12),
    )
    config = LMConfig(dim=40, depth=len(layers), layers=layers, channel_mixer_dim=24)
    params = nnx.state(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))), nnx.Param)
    found = Counter[str | None]()
    for path, x in nnx.to_flat_state(params):
        names = x.get_metadata().get("out_sharding") or [None] * len(x.shape)
        expected = [kinds.get(n) for n in x.shape]
        assert list(names) == (expected if x.shape != (40,) else [None]), path  # a norm's scale
        found.update(names)
    assert found["dim"] > 40
    assert found["heads"] > 50
    assert found["hidden"] == 3 * len(layers)


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free", "muon"])
def test_no_device_holds_a_whole_matrix(optimizer: Any) -> None:
    make = maker(optimizer)
    state = make_sharded(make, shapes_of(make, placement("fsdp=4", 4, CONFIG)))
    matrices = [x for x in jax.tree.leaves(state) if x.ndim > 1]
    assert len(matrices) > 10
    for x in matrices:
        assert {4 * shard.data.size for shard in x.addressable_shards} == {x.size}


def test_no_device_makes_a_whole_matrix() -> None:
    """Random numbers are drawn where they stay, also before they have a shape."""
    make = maker("adamw")
    like = shapes_of(make, placement("fsdp=4", 4, CONFIG))
    there = jax.tree.map(lambda x: x.sharding, like)
    program = str(jax.jit(make, out_shardings=there).lower().compile().as_text())
    sizes = re.findall(r"= [a-z]+[0-9]+\[([0-9,]+)\]", program)
    largest = max(math.prod(map(int, size.split(","))) for size in sizes)
    assert largest == max(x.size for x in jax.tree.leaves(like)) // 4


def maker(optimizer: Any) -> Callable[[], TrainState]:
    of_run = make_optimizer(OptimizerConfig(optimizer=optimizer), steps=20)

    def make() -> TrainState:
        return init_state(LanguageModel(CONFIG, rngs=nnx.Rngs(0)), of_run, None)

    return make
