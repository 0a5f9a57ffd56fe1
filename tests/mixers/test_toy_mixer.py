"""A mixer that nothing but this file and one line of the registry knows: it trains, resumes,
samples and is counted."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array

from e88_jax import LanguageModel, LMConfig
from e88_jax.mixers import MIXERS
from e88_jax.mixers.base import Execution, Flops
from e88_jax.optim import muon_dimensions
from experiments import sample, train_byte_lm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A decaying mean of a projection of the input."""

    kind: ClassVar[str] = "toy"

    width: int = 6
    """Numbers that are averaged."""
    rate: float = 0.5
    """Share of the mean that a token replaces."""

    def build(self, dim: int, execution: Execution, *, rngs: nnx.Rngs) -> "ToyMixer":
        return ToyMixer(self, dim, rngs=rngs)

    def count_params(self, dim: int) -> int:
        return 2 * dim * self.width

    def state_size(self, dim: int) -> int:
        return self.width

    def flops_per_token(self, dim: int) -> Flops:
        return Flops(6 * self.count_params(dim), 9 * self.width)


class ToyMixer(nnx.Module):
    def __init__(self, config: ToyConfig, dim: int, *, rngs: nnx.Rngs):
        self.config = config
        self.read = nnx.Linear(dim, config.width, use_bias=False, rngs=rngs)
        self.write = nnx.Linear(config.width, dim, use_bias=False, rngs=rngs)

    def init_state(self, batch: int) -> Array:
        return jnp.zeros((batch, self.config.width))

    def __call__(
        self,
        x: Array,
        state: Array | None = None,
        segment_ids: Array | None = None,
        *,
        lengths: Array | None = None,
    ) -> tuple[Array, Array]:
        batch, time, _ = x.shape
        keep = jnp.ones((batch, time), bool)
        if segment_ids is not None:
            keep = keep.at[:, 1:].set(segment_ids[:, 1:] == segment_ids[:, :-1])
        live = jnp.ones((batch, time), bool)
        if lengths is not None:
            live = jnp.arange(time)[None, :] < lengths[:, None]

        def step(mean: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            u, keep, live = now
            new = (1 - self.config.rate) * keep[:, None] * mean + self.config.rate * u
            mean = jnp.where(live[:, None], new, mean)
            return mean, mean

        u, keep, live = (jnp.moveaxis(y, 1, 0) for y in (self.read(x), keep, live))
        start = self.init_state(batch) if state is None else state
        end, means = jax.lax.scan(step, start, (u, keep, live))
        return self.write(jnp.moveaxis(means, 0, 1)), end

    def for_inference(self) -> Self:
        return self


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one line."""
    monkeypatch.setitem(MIXERS, "toy", f"{__name__}:ToyConfig")
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        yield


def config(**layer: float) -> LMConfig:
    return LMConfig(dim=16, depth=2, layers=(ToyConfig(**layer),))  # pyright: ignore[reportArgumentType]


def test_counts() -> None:
    model = LanguageModel(config(width=5), rngs=nnx.Rngs(0))
    built = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert model.config.count_params() == built == 256 * 16 + 2 * (16 + 2 * 16 * 5) + 16
    assert model.config.state_size() == sum(x.size for x in model.init_state(1)) == 10
    assert model.config.flops_per_token() == (6 * built, 2 * 9 * 5)


def test_json() -> None:
    written = json.loads(json.dumps(config(width=5).to_dict()))
    assert written["layers"] == [{"kind": "toy", "width": 5, "rate": 0.5}]
    assert LMConfig.from_dict(written) == config(width=5)


def test_muon_takes_its_matrices() -> None:
    params = nnx.state(LanguageModel(config(), rngs=nnx.Rngs(0)), nnx.Param)
    taken = muon_dimensions(params)
    assert taken["blocks"][0]["mixer"]["read"]["kernel"] is not None
    assert taken["blocks"][1]["mixer"]["write"]["kernel"] is not None
    assert taken["embed"]["embedding"] is None
    assert taken["norm"]["scale"] is None


def test_it_trains_resumes_and_samples(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    data = tmp_path / "text"
    data.write_bytes(b"abcdefgh" * 500)
    model = ["--mixer", "toy", "--width", "7", "--rate", "0.25", "--dim", "16", "--depth", "2"]
    flags = ["--data", str(data), "--seq-len", "16", "--batch-size", "4", "--log-every", "2"]
    flags += [
        "--eval-every",
        "4",
        "--save-every",
        "2",
        "--eval-bytes",
        "128",
        "--sample-bytes",
        "0",
    ]
    # A rate that does not depend on the number of steps.
    flags += ["--optimizer", "muon", "--warmup-steps", "0", "--final-lr-fraction", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_byte_lm.main([*flags, *model, "--out", str(whole), "--steps", "8"])
    train_byte_lm.main([*flags, *model, "--out", str(parts), "--steps", "4"])
    train_byte_lm.main(["--out", str(parts), "--resume", "--steps", "8"])
    layers = json.loads((parts / "run.json").read_text())["config"]["model"]["layers"]
    assert layers == [{"kind": "toy", "width": 7, "rate": 0.25}]
    losses = [
        [
            record["loss"]
            for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if record["kind"] == "train"
        ]
        for run in (whole, parts)
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.01
    capfdbinary.readouterr()
    sample.main([str(parts), "--prompt", "abc", "--length", "9"])
    assert len(capfdbinary.readouterr().out.removeprefix(b"abc").rstrip(b"\n")) >= 9
