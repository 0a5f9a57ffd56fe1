import dataclasses
from typing import Any

import pytest

from e88_jax.config import E88Config, LMConfig
from e88_jax.hardware import find_gpu
from e88_jax.mixers.base import Execution
from e88_jax.sizing import PRESETS, balance, check, d_inner_of, training_memory
from tests.reference.configs import lm_config
from tests.reference.toy_mixer import ToyConfig

TURING = dataclasses.replace(find_gpu("rtx4090"), name="Turing", compute_capability=(7, 5))


def lm(dim: int, n_heads: int, n_state: int, depth: int = 20, **options: Any) -> LMConfig:
    return lm_config(dim=dim, n_heads=n_heads, n_state=n_state, depth=depth, **options)


@pytest.mark.parametrize(
    ("dim", "d_inner", "band"),
    [
        (2001, 1000, "severe bottleneck"),
        (2000, 1000, "mild bottleneck"),
        (1201, 1000, "mild bottleneck"),
        (1200, 1000, "balanced"),
        (1000, 1000, "balanced"),
        (800, 1000, "balanced"),
        (799, 1000, "over-provisioned d_inner"),
        (500, 1000, "over-provisioned d_inner"),
        (499, 1000, "wasteful"),
        # 0.8 and 1.2 are no floating-point numbers.
        (4 * 33, 5 * 33, "balanced"),
        (6 * 77, 5 * 77, "balanced"),
    ],
)
def test_bands_and_their_borders(dim: int, d_inner: int, band: str) -> None:
    assert balance(dim, d_inner) == band


@pytest.mark.parametrize(("dim", "d_inner"), [(0, 5), (5, -1)])
def test_sizes_below_1(dim: int, d_inner: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        balance(dim, d_inner)


def test_few_heads_with_a_large_dim() -> None:
    (finding,) = check(lm(8192, 20, 32))
    assert "few heads" in finding.problem
    assert "12.8" in finding.problem
    assert "256 heads" in finding.change


def test_dim_and_d_inner_far_apart() -> None:
    (finding,) = check(lm(512, 64, 32))
    assert "far apart" in finding.problem
    assert "16 heads" in finding.change
    assert check(lm(2176, 72, 32)) == []
    (finding,) = check(lm(8, 4, 32))
    assert "take 1 heads" in finding.change


def test_d_inner_is_of_keys() -> None:
    assert d_inner_of(lm(64, 2, 32, expansion=2.0)) == 64


def test_every_n_state_of_the_kernels_suits_their_gpus() -> None:
    """Above a published maximum too, which is of the original project's kernels."""
    for key in ("rtx4090", "h100"):
        assert check(lm(1024, 8, 128, depth=2), find_gpu(key)) == []


def test_what_the_kernels_do_not_take() -> None:
    keys, values = check(lm(256, 2, 130, depth=1), find_gpu("h200"))
    assert "n_state 130" in keys.problem
    assert "n_value 130" in values.problem
    assert "128" in keys.change
    keys, values = check(lm(64, 2, 30, depth=1), find_gpu("h200"))
    assert "n_state 30" in keys.problem
    (values,) = check(lm(64, 1, 64, depth=1, expansion=4.0), find_gpu("h200"))
    assert "n_value 256" in values.problem
    (finding,) = check(lm(64, 2, 32, depth=1), TURING)
    assert finding.problem == "Turing runs the recurrence by lax.scan"


def test_memory() -> None:
    config = PRESETS["h72n32-500m"].config
    assert check(config, find_gpu("h100"), batch=1, length=2048) == []
    (finding,) = check(config, find_gpu("h100"), batch=64, length=2048)
    assert "of 80 GB" in finding.problem
    (finding,) = check(config, find_gpu("h100"), batch=1, length=64 * 2048)
    assert "at batch 1 and length 131072, of 80 GB" in finding.problem
    again = dataclasses.replace(config, execution=Execution(remat="layer"))
    assert check(again, find_gpu("h100"), batch=32) == []


def test_memory_is_that_of_what_runs_the_recurrence_there() -> None:
    config = PRESETS["h40n64-500m"].config
    *_, finding = check(config, TURING, batch=64)
    by_scan, by_kernels = (
        training_memory(config, 64, 2048, implementation=name).total / 1e9
        for name in ("scan", "mosaic_gpu")
    )
    assert f"about {by_scan:.0f} GB" in finding.problem
    assert round(by_scan) != round(by_kernels)


def test_models_that_the_guide_says_nothing_of() -> None:
    config = lm(64, 2, 32)
    other = E88Config(n_heads=2, n_state=16)
    for layers, kinds in (
        ((ToyConfig(),), "got 1 different ones: toy"),
        ((*config.layers, other), "got 2 different ones: e88, e88"),
        ((*config.layers, ToyConfig()), "got 2 different ones: e88, toy"),
    ):
        with pytest.raises(ValueError, match=f"model of equal e88 layers.*{kinds}"):
            check(dataclasses.replace(config, layers=layers))
    twice = dataclasses.replace(config, layers=config.layers * 2)
    assert check(twice) == check(config)
