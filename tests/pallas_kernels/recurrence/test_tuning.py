import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import pytest

from e88_jax.hardware import find_gpu
from pallas_kernels.common.launch import shared_memory_limit, thread_blocks
from pallas_kernels.common.sizes import round_up
from pallas_kernels.limits import UnsupportedError
from pallas_kernels.recurrence.operands import Inputs
from pallas_kernels.recurrence.tuning import (
    MOST_SCALARS,
    backward_config,
    backward_shared_bytes,
    forward_config,
    forward_shared_bytes,
    neighbours,
)
from pallas_kernels.recurrence.tuning_config import TuningConfig, column_multiple
from pallas_kernels.target import CPU, H100

SIZES = [4, 12, 32, 44, 48, 72, 100, 128]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 5), (4, 128), (8, 83), (64, 384)])
@pytest.mark.parametrize("gpu", ["h100", "a100-80gb", "rtx4090"])
def test_every_size_fits_in_shared_memory(gpu: str, batch: int, heads: int, dtype: Any) -> None:
    """With every option: 4 scalars a step."""
    target = find_gpu(gpu).target
    limit = shared_memory_limit(target)
    for n_state, n_value in itertools.product(SIZES, SIZES):
        sizes = batch, heads, n_state, n_value, target, dtype
        forward, backward = forward_config(*sizes), backward_config(*sizes)
        assert 0 < forward_shared_bytes(forward, n_state, dtype) <= limit
        assert 0 < backward_shared_bytes(backward, n_state, dtype) <= limit


@pytest.mark.parametrize("n_value", [8, 32, 48, 72, 128])
@pytest.mark.parametrize("heads", [1, 5, 83, 384])
def test_no_block_pads_more_than_the_smallest_would(heads: int, n_value: int) -> None:
    def columns(block_heads: int, values: int) -> int:
        return round_up(heads, block_heads) * round_up(n_value, values)

    least = min(columns(h, column_multiple(h)) for h in (1, 2, 4))
    for choose in (forward_config, backward_config):
        config = choose(8, heads, 32, n_value, H100, jnp.bfloat16)
        assert columns(config.heads, config.values) == least


def test_as_many_warpgroups_as_an_sm_has_work_for() -> None:
    def side_by_side(batch: int) -> int:
        return forward_config(batch, 132, 32, 32, H100, jnp.bfloat16).warpgroups

    assert [side_by_side(batch) for batch in (1, 2, 5)] == [1, 2, 5]


@pytest.mark.parametrize(
    ("batch", "heads", "size", "forward", "backward"),
    [
        # 576 warpgroups of one head fit at once, 5 an SM.
        (8, 72, 32, (1, 32, 5), (1, 32, 5)),
        # 768 do not: with two heads they do.
        (8, 96, 32, (2, 32, 3), (2, 32, 3)),
        # 576 of two heads need too many registers in the backward kernel to be held at once.
        (16, 72, 32, (2, 32, 5), (1, 32, 5)),
        (16, 71, 32, (1, 32, 5), (1, 32, 5)),
        (8, 384, 32, (4, 32, 2), (2, 32, 4)),
        (64, 384, 128, (1, 32, 2), (1, 32, 1)),
    ],
)
def test_no_sm_has_a_last_warpgroup_alone(
    batch: int,
    heads: int,
    size: int,
    forward: tuple[int, int, int],
    backward: tuple[int, int, int],
) -> None:
    sizes = batch, heads, size, size, H100, jnp.bfloat16
    for config, expected in (
        (forward_config(*sizes), forward),
        (backward_config(*sizes, n_scalars=1, has_write_gate=False), backward),
    ):
        assert (config.heads, config.values, config.warpgroups) == expected


@pytest.mark.parametrize(
    ("batch", "heads", "size", "dtype", "config"),
    [
        (8, 72, 32, jnp.bfloat16, TuningConfig(1, 32, 16, 8, 5)),
        (8, 384, 32, jnp.bfloat16, TuningConfig(2, 32, 8, 8, 4)),
        (8, 383, 32, jnp.bfloat16, TuningConfig(1, 32, 16, 8, 5)),
        (8, 384, 32, jnp.float32, TuningConfig(1, 32, 8, 8, 5)),
        (1, 72, 32, jnp.bfloat16, TuningConfig(1, 32, 32, 8, 1, pipelined=True)),
        (8, 96, 32, jnp.bfloat16, TuningConfig(2, 32, 16, 8, 3)),
        (8, 40, 64, jnp.bfloat16, TuningConfig(1, 32, 8, 8, 5)),
        (4, 16, 128, jnp.bfloat16, TuningConfig(1, 32, 8, 4, 2)),
        (8, 48, 48, jnp.bfloat16, TuningConfig(2, 16, 8, 8, 5)),
        (8, 288, 16, jnp.bfloat16, TuningConfig(2, 16, 16, 8, 5)),
        # Fewer warpgroups at once where five have too few registers, or take turns badly.
        (8, 72, 64, jnp.bfloat16, TuningConfig(1, 32, 16, 8, 3)),
        (8, 72, 96, jnp.bfloat16, TuningConfig(1, 32, 16, 8, 1)),
        (8, 72, 72, jnp.bfloat16, TuningConfig(4, 8, 16, 4, 1)),
        # One head a block, though that pads more, where all are then held in fewer turns.
        (2, 132, 56, jnp.bfloat16, TuningConfig(1, 32, 16, 8, 4)),
        (8, 72, 120, jnp.bfloat16, TuningConfig(1, 32, 8, 4, 1)),
        # Half of the states of a group in device memory, where more warpgroups then fit.
        (4, 132, 40, jnp.bfloat16, TuningConfig(4, 8, 8, 4, 5, states_held=4)),
        (8, 72, 56, jnp.bfloat16, TuningConfig(4, 8, 8, 4, 4, states_held=4)),
        (8, 36, 64, jnp.float32, TuningConfig(1, 32, 8, 2, 5, states_held=3)),
        (8, 72, 72, jnp.float32, TuningConfig(4, 8, 8, 2, 1, states_held=4)),
        (8, 36, 80, jnp.float32, TuningConfig(2, 16, 8, 2, 3, states_held=3)),
        (8, 72, 128, jnp.float32, TuningConfig(1, 32, 8, 1, 1, states_held=4)),
        # Else several: one took 11 and 14 % longer.
        (2, 132, 80, jnp.bfloat16, TuningConfig(2, 16, 8, 8, 3)),
        # Pipelined, with chunks of 16 steps or more: 8 took 14 % longer.
        (1, 132, 56, jnp.bfloat16, TuningConfig(1, 32, 16, 8, 2, pipelined=True)),
        (1, 132, 40, jnp.bfloat16, TuningConfig(4, 8, 16, 4, 2, pipelined=True)),
    ],
)
def test_backward_configs_that_were_measured(
    batch: int, heads: int, size: int, dtype: Any, config: TuningConfig
) -> None:
    sizes = batch, heads, size, size, H100, dtype
    assert backward_config(*sizes, n_scalars=1, has_write_gate=False) == config


ASYNC: dict[str, Any] = {"copies": "async"}


@pytest.mark.parametrize(
    ("gpu", "batch", "heads", "size", "dtype", "config"),
    [
        ("a100-80gb", 8, 72, 32, jnp.bfloat16, TuningConfig(1, 32, 16, 8, 5, **ASYNC)),
        ("a100-80gb", 8, 40, 64, jnp.bfloat16, TuningConfig(1, 32, 16, 4, 5, False, 4, **ASYNC)),
        ("rtx4090", 8, 72, 32, jnp.bfloat16, TuningConfig(1, 32, 16, 4, 5, False, 4, **ASYNC)),
        ("a100-80gb", 8, 72, 56, jnp.bfloat16, TuningConfig(4, 8, 8, 4, 4, False, 4, **ASYNC)),
        ("rtx4090", 8, 40, 64, jnp.bfloat16, TuningConfig(1, 32, 8, 4, 5, False, 3, **ASYNC)),
        ("rtx4090", 8, 72, 64, jnp.bfloat16, TuningConfig(1, 32, 16, 4, 3, False, 4, **ASYNC)),
        ("rtx4090", 4, 16, 128, jnp.bfloat16, TuningConfig(1, 32, 8, 4, 2, False, 4, **ASYNC)),
        ("rtx4090", 8, 72, 128, jnp.float32, TuningConfig(1, 32, 8, 1, 1, False, 4, **ASYNC)),
        ("a100-80gb", 8, 72, 128, jnp.float32, TuningConfig(1, 32, 8, 1, 1, False, 3, **ASYNC)),
        ("a100-80gb", 8, 72, 100, jnp.float32, TuningConfig(1, 32, 8, 2, 1, False, 4, **ASYNC)),
    ],
)
def test_backward_configs_of_other_gpus_that_were_measured(
    gpu: str, batch: int, heads: int, size: int, dtype: Any, config: TuningConfig
) -> None:
    """On an H100, so with its number of SMs."""
    target = dataclasses.replace(find_gpu(gpu).target, n_sms=H100.n_sms)
    sizes = batch, heads, size, size, target, dtype
    assert backward_config(*sizes, n_scalars=1, has_write_gate=False) == config


def test_which_blocks_are_short_of_registers() -> None:
    """65,536 registers of an SM, for 128 lanes of each warpgroup with 16 elements of N = 64."""
    config = TuningConfig(1, 32, 8, 4, 5, states_held=3, copies="async")
    assert config.is_short_of_registers(64)  # 6.4 for each element
    assert not config.is_short_of_registers(32)  # 12.8
    assert not dataclasses.replace(config, warpgroups=3).is_short_of_registers(64)  # 10.7
    assert not dataclasses.replace(config, states_held=8).is_short_of_registers(64)


def test_registers_of_an_element() -> None:
    config = TuningConfig(1, 32, 8, warpgroups=3)
    assert config.registers_per_element(64) == pytest.approx(65_536 / 3 / 128 / 16)
    assert dataclasses.replace(config, warpgroups=1).registers_per_element(64) == 255 / 16


def test_few_rows_use_as_few_columns_as_they_have() -> None:
    """A block of one head of 4 columns would compute 28 of padding."""
    for gpu in ("h100", "rtx4090"):
        config = backward_config(1, 72, 4, 4, find_gpu(gpu).target, jnp.bfloat16)
        assert (config.heads, config.values) == (4, 8)


@pytest.mark.parametrize(("gpu", "kb"), [("h100", 112), ("a100-80gb", 81), ("rtx4090", 49)])
def test_thread_blocks_of_an_sm(gpu: str, kb: int) -> None:
    """Shared memory of an SM is 228, 164 and 100 KB; a thread block takes 1 KB more than its
    scratch, on an H100 another 1 KB for mbarriers."""
    target = find_gpu(gpu).target
    assert [thread_blocks(n * 1024, target) for n in (kb, kb + 1)] == [2, 1]
    assert thread_blocks(shared_memory_limit(target), target) == 1
    assert thread_blocks(shared_memory_limit(target) + 1, target) == 0


def test_two_thread_blocks_of_one_warpgroup_share_an_sm() -> None:
    """Rather than one of two warpgroups, where their memory lets them."""
    for gpu, size, expected in [
        ("h100", 96, (1, 2)),
        ("rtx4090", 96, (1, 2)),
        ("h100", 64, (3, 1)),
    ]:
        target = find_gpu(gpu).target
        config = backward_config(8, 72, size, size, target, jnp.bfloat16, 1, False)
        memory = backward_shared_bytes(config, size, jnp.bfloat16, 1, False)
        assert (config.warpgroups, thread_blocks(memory, target)) == expected


def test_an_unknown_target_is_tuned_for_as_an_h100() -> None:
    sizes = 8, 96, 32, 32
    for choose in (forward_config, backward_config):
        assert choose(*sizes, CPU, jnp.bfloat16) == choose(*sizes, H100, jnp.bfloat16)


def test_the_shared_memory_of_the_target_counts() -> None:
    sizes = 8, 72, 32, 32
    small = dataclasses.replace(H100, shared_memory_per_block=101_376)
    config = backward_config(*sizes, small, jnp.bfloat16)
    assert backward_shared_bytes(config, 32, jnp.bfloat16) <= 101_376
    assert (config.copies, config.in_place) == ("async", True)
    of_the_h100 = backward_config(*sizes, H100, jnp.bfloat16)
    assert (config.warpgroups, config.states_held) == (of_the_h100.warpgroups, 4)
    assert of_the_h100.states_held == 8


@pytest.mark.parametrize("n_scalars", [1, MOST_SCALARS])
def test_as_many_warpgroups_side_by_side_in_less_shared_memory(n_scalars: int) -> None:
    """640 warpgroups, 5 for an SM; with every option too."""
    sizes = 8, 40, 64, 64
    options = {"n_scalars": n_scalars, "has_write_gate": n_scalars > 1}
    configs = [
        backward_config(*sizes, find_gpu(key).target, jnp.bfloat16, **options)
        for key in ("rtx4090", "h100")
    ]
    assert [(x.warpgroups, x.states_held) for x in configs] == [(5, 3), (5, 8)]


def test_every_call_has_the_scalars_of_a_step() -> None:
    """The default number is that of a call with every option."""
    assert Inputs(*Inputs._fields).n_scalars == MOST_SCALARS  # pyright: ignore


def test_too_little_shared_memory() -> None:
    sizes = 8, 72, 32, 32
    tiny = dataclasses.replace(H100, shared_memory_per_block=5_000)
    with pytest.raises(
        UnsupportedError, match=r"needs \d+ bytes of shared memory, of 5000, even in"
    ):
        forward_config(*sizes, tiny, jnp.bfloat16)


def test_larger_warpgroups_hold_no_more_than_their_registers_do() -> None:
    for n_state in (16, 32, 64, 80, 112, 128):
        config = forward_config(64, 384, n_state, 128, H100, jnp.bfloat16)
        assert 2048 <= config.heads * config.values * n_state <= 4096


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"heads": 3}, ["1, 2 or 4", "3"]),
        ({"values": 24}, ["32", "24"]),
        ({"values": 0}, ["32", "0"]),
        ({"chunk": 12}, ["8", "12"]),
        ({"unroll": 0}, ["1", "0"]),
        ({"warpgroups": 9}, ["8", "9"]),
        ({"states_held": 6}, ["3, 4 or 8", "6"]),
        ({"states_held": 4, "pipelined": True}, ["8", "4"]),
    ],
)
def test_bad_config(changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (fragments below)
        dataclasses.replace(TuningConfig(heads=1, values=32, chunk=16), **changes)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_neighbours_differ_in_one_number() -> None:
    config = TuningConfig(heads=2, values=32, chunk=16, warpgroups=3)
    found = neighbours(config)
    assert len(set(found)) == len(found) > 5
    for other in found:
        pairs = zip(dataclasses.astuple(config), dataclasses.astuple(other), strict=True)
        assert sum(a != b for a, b in pairs) == 1
