"""Timing of training steps, on the device at hand."""

import jax
import pytest

from e88_jax.sizing import __main__ as command
from e88_jax.sizing import measure
from e88_jax.sizing.compare import Match
from pallas_kernels import target
from tests.reference.configs import lm_config

TINY = lm_config(dim=16, n_heads=2, n_state=4, depth=2, vocab_size=10)


@pytest.fixture(autouse=True)
def cleared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an entry for each time that JAX's caches would have been cleared: other tests' programs
    stay."""
    times: list[int] = []
    monkeypatch.setattr(jax, "clear_caches", lambda: times.append(1))
    return times


def test_tokens_per_second_are_those_of_the_median_step(
    monkeypatch: pytest.MonkeyPatch, cleared: list[int]
) -> None:
    """And what the model took is free again."""
    before = jax.live_arrays()  # held, lest another test's go meanwhile
    seconds = iter([0.0, 100.0, 200.0, 201.0, 205.0, 207.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(seconds))
    rate = measure.tokens_per_second(TINY, 2, 6, steps=3)
    assert rate == 2 * 6 / 2.0  # of 1, 4 and 2 seconds
    assert next(seconds, None) is None
    assert len(jax.live_arrays()) == len(before)
    assert cleared == [1]


def test_too_little_memory_is_a_missing_value(
    monkeypatch: pytest.MonkeyPatch, cleared: list[int]
) -> None:
    def fails(message: str) -> None:
        def step_seconds(*_: object) -> list[float]:
            raise RuntimeError(message)

        monkeypatch.setattr(measure, "_step_seconds", step_seconds)

    fails("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
    assert measure.tokens_per_second(TINY, 2, 6) is None
    assert cleared == [1]
    fails("INTERNAL: something else")
    with pytest.raises(RuntimeError, match="something else"):
        measure.tokens_per_second(TINY, 2, 6)


def test_the_command_times_each_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"E88": 12_345.6, "Mamba2": None}
    found = [Match(name, TINY, TINY.count_params(), TINY.count_params(), 0.0) for name in rates]
    monkeypatch.setattr("e88_jax.sizing.__main__.compare", lambda *_, **__: found)
    timed = iter(rates.values())
    monkeypatch.setattr(measure, "tokens_per_second", lambda *_: next(timed))
    with target.use(target.H100):
        assert command.main(["25M", "--compare", "--measure", "--gpu", "h100"]) == 0
    about, header, e88, mamba2, *_ = capsys.readouterr().out.splitlines()
    assert about.endswith("Tokens/s: training steps timed on an NVIDIA H100 80GB HBM3.")
    assert header.endswith("tokens/s")
    assert e88.endswith("12,346")
    assert mamba2.endswith("out of memory")
