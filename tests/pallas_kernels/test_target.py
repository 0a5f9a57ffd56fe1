import contextvars
import dataclasses
import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from e88_jax.recurrence import e88_recurrence
from pallas_kernels import target
from pallas_kernels.recurrence import calls
from pallas_kernels.recurrence import recurrence as by_kernels
from pallas_kernels.target import CPU, H100, Target


class Gpu:
    platform = "gpu"
    device_kind = "some GPU"

    def __init__(self, compute_capability: str, **attributes: Any) -> None:
        self.compute_capability = compute_capability
        vars(self).update(attributes)


def test_the_local_device_is_the_default() -> None:
    assert target.current() == target.of_device(jax.local_devices()[0])
    if jax.default_backend() == "cpu":
        assert target.current() == CPU


def test_a_target_holds_inside_its_context() -> None:
    outside = target.current()
    with target.use(H100) as chosen:
        assert target.current() is chosen is H100
        with target.use(CPU):
            assert target.current() is CPU
        assert target.current() is H100
    assert target.current() == outside


def test_a_thread_takes_the_target_of_its_context() -> None:
    found: list[Target] = []

    def look() -> None:
        found.append(target.current())

    with target.use(H100):
        for function, *arguments in ((look,), (contextvars.copy_context().run, look)):
            thread = threading.Thread(target=function, args=arguments)
            thread.start()
            thread.join()
    assert found == [target.of_device(jax.local_devices()[0]), H100]


def test_what_jax_tells_of_a_device() -> None:
    gpu = Gpu("9.0", core_count=132, shared_memory_per_block_optin=232_448)
    expected = dataclasses.replace(H100, name="some GPU", shared_memory_per_sm=None)
    assert target.of_device(gpu) == expected
    amd = Gpu("gfx90a", core_count=104)
    assert target.of_device(amd) == Target("gpu", "some GPU (gfx90a)", n_sms=104)


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.3", "12.1"])
def test_where_the_kernels_run(capability: str) -> None:
    gpu = Gpu(capability)
    assert target.kernels_refusal(target.of_device(gpu)) is None


@pytest.mark.parametrize("capability", ["7.5", "13.0", "gfx90a"])
def test_where_the_kernels_do_not_run(capability: str) -> None:
    gpu = Gpu(capability)
    refusal = str(target.kernels_refusal(target.of_device(gpu)))
    assert refusal.startswith("needs an NVIDIA GPU of compute capability 8.0 or later and below 13")
    assert "got some GPU" in refusal
    assert capability in refusal
    assert str(target.kernels_refusal(CPU)).endswith("got platform 'cpu'")
    assert target.kernels_refusal(H100) is None


def test_cached_calls_are_of_their_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config chosen for one target is not used for another."""
    chosen: list[Target] = []

    def seen(*sizes: Any) -> Any:
        chosen.append(sizes[4])
        raise NotImplementedError("seen")

    monkeypatch.setattr(calls.tuning, "forward_config", seen)
    x = jnp.zeros((1, 2, 1, 4))
    small = dataclasses.replace(H100, n_sms=7)
    for own in (H100, small, H100):
        with target.use(own), pytest.raises(NotImplementedError, match="seen"):
            by_kernels(x, x, x, x[..., 0], None, None, linear_state=False, saved_state_interval=32)
    assert chosen == [H100, small, H100]


@pytest.mark.parametrize("capability", ["7.5", "13.0", "gfx90a"])
def test_gpus_without_kernels_are_refused(capability: str) -> None:
    x = jnp.zeros((1, 2, 1, 4))
    with (
        target.use(target.of_device(Gpu(capability))),
        pytest.raises(NotImplementedError, match=rf"8\.0 or later.*{capability}.*'scan'"),
    ):
        e88_recurrence(x, x, x, jnp.zeros((1, 2, 1)), implementation="mosaic_gpu")


@pytest.mark.parametrize("capability", ["9.0", "10.3", "12.0"])
def test_hopper_and_blackwell_are_taken(capability: str) -> None:
    x = jnp.zeros((1, 2, 1, 6))
    with (
        target.use(target.of_device(Gpu(capability))),
        pytest.raises(NotImplementedError, match=r"mosaic_gpu' takes N.*got 6.*scan"),
    ):
        e88_recurrence(x, x, x, jnp.zeros((1, 2, 1)), implementation="mosaic_gpu")
