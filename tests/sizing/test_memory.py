"""The estimate of memory against XLA's own figures."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan import model_of
from e88_jax.config import E88Config, LMConfig
from e88_jax.hardware import find_gpu
from e88_jax.mixers.base import Activations, Execution
from e88_jax.mixers.baselines import AttentionConfig, GatedDeltaNetConfig, Mamba2Config
from e88_jax.sizing import (
    PRESETS,
    TrainingMemory,
    check,
    state_bytes,
    training_memory,
)
from e88_jax.sizing.memory import implementation_on
from experiments.harness.mesh_sizes import parse_mesh
from tests.reference.configs import lm_config
from tests.reference.toy_mixer import ToyConfig

PLANS = json.loads((Path(__file__).parent / "training_memory_h100.json").read_text())
"""Bytes of arguments and working memory that XLA of JAX 0.11.2 plans for the training step of
`harness.step` on an H100, by `benchmarks/plan.py --memory`, which needs none."""


def name_of(plan: dict[str, Any]) -> str:
    options = {**plan["layer"], **plan["model"], **plan["execution"]}
    changed = " ".join(f"{name}={value}" for name, value in options.items())
    size = f"x{plan['depth']} {plan['batch']}x{plan['length']} {plan['mesh']}"
    return f"{plan['preset']} {size} {changed}"


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_training_memory_is_what_xla_plans_for_an_h100(plan: dict[str, Any]) -> None:
    options = plan["execution"].items()
    of_call = {name: x for name, x in options if name in ("dtype", "implementation")}
    mesh = parse_mesh(plan["mesh"], plan["batch"])
    assert mesh is not None
    rows = plan["batch"] // mesh.data
    estimate = training_memory(model_of(plan), rows, plan["length"], fsdp=mesh.fsdp, **of_call)
    assert 0.88 < estimate.total / plan["bytes"] < 1.12


def test_what_does_not_fit_is_told_how_it_would() -> None:
    config, gpu = PRESETS["h96n32-1b"].config, find_gpu("h100")
    assert not [x for x in check(config, gpu, batch=8) if "GB" in x.problem]
    (finding,) = [x for x in check(config, gpu, batch=16) if "GB" in x.problem]
    assert "GB at batch 16 and length 2048, of 80 GB" in finding.problem
    assert "fewer sequences" in finding.change
    assert "or remat 'recurrence', which takes" in finding.change
    (finding,) = [x for x in check(config, gpu, batch=1024) if "GB" in x.problem]
    assert finding.change == "take fewer sequences, shorter ones or a smaller model"


def test_what_does_not_fit_on_one_gpu_is_told_on_how_many_it_would() -> None:
    e88 = E88Config(n_heads=170, n_state=32)
    config, gpu = LMConfig(dim=5440, depth=47, layers=(e88,)), find_gpu("h100")
    way = "or remat 'layer' over 2 GPUs (--mesh fsdp=2), which takes 66 GB of each"
    (finding,) = check(config, gpu, batch=8)
    assert finding.change.endswith(way)
    (finding,) = check(config, gpu, batch=16, fsdp=4)
    assert finding.problem.startswith("training takes about 107 GB of each of 4 GPUs at batch 16")
    assert finding.change.endswith("or remat 'recurrence', which takes 62 GB of each")
    assert not check(config, gpu, batch=8, fsdp=8)
    (finding,) = check(config, gpu, batch=3)  # over 2, 4 and 8 GPUs it does not divide
    assert "GPUs" not in finding.change


def test_a_batch_or_dim_that_does_not_divide() -> None:
    config = PRESETS["h96n32-1b"].config
    for batch, n in ((8, 3), (10, 5)):
        name = f"batch {batch}" if batch % n else f"dim {config.dim}"
        for ask in (
            lambda **x: training_memory(config, length=2048, **x),
            lambda **x: check(config, **x),
        ):
            with pytest.raises(ValueError, match=f"^{name} does not divide over fsdp={n}: fsdp="):
                ask(batch=batch, fsdp=n)
    with pytest.raises(ValueError, match="fsdp must be at least 1, got 0"):
        training_memory(config, 8, 2048, fsdp=0)


def test_saved_states() -> None:
    def of(every: int, **options: Any) -> int:
        config = a_model(expansion=2.0, saved_state_interval=every)
        return training_memory(config, 2, 100, **options).saved_states

    state = 5 * 2 * 3 * 16 * 32
    assert of(32, dtype="float32", implementation="scan") == 4 * state * 4
    assert of(32) == of(1) == 2 * state * 13  # bfloat16, every 8 steps
    assert of(64) == 2 * state * 2
    assert of(64, dtype="float32") == 4 * state * 2


@pytest.mark.parametrize("moments", [0, 1, 2, 3])
def test_the_optimizers_moments(moments: int) -> None:
    config = PRESETS["h72n32-500m"].config
    memory = training_memory(config, 8, 2048, moments=moments)
    assert memory.optimizer == moments * memory.parameters == moments * 4 * config.count_params()
    assert training_memory(config, 8, 2048).optimizer == 2 * memory.parameters


def a_model(**options: Any) -> LMConfig:
    return lm_config(dim=64, n_heads=3, n_state=16, depth=5, **options)


def small(length: int = 100, **options: Any) -> TrainingMemory:
    return training_memory(a_model(**options), 2, length)


@pytest.mark.parametrize(
    ("options", "per_token"),
    [
        ({"conv_size": 4}, 2 * 3 * 48),  # what the convolutions read
        ({"use_l2_norm": False}, -4 * 2 * 3),  # lengths of q and k, of each head
        ({"write_gate": True}, 2 * 3),
        ({"decay_mode": "none"}, -2 * 3),
        ({"head_mix": "input_weighted"}, 2 * 3 - 2 * (48 - 16)),
        ({"output_gate": "none"}, -2 * 2 * 48),  # the gate, and what it gives
        ({"tie_kv": True}, -2 * 48),
        # A norm's input in float32 and output, gate, up and their product.
        ({"channel_mixer_dim": 40}, 4 * 64 + 2 * (64 + 3 * 40)),
    ],
)
def test_what_an_option_keeps_of_each_token(options: dict[str, Any], per_token: int) -> None:
    def of_tokens(**options: Any) -> int:
        return small(101, **options).activations - small(**options).activations

    assert of_tokens(**options) - of_tokens() == 5 * 2 * per_token


def test_what_remat_keeps_of_each_token() -> None:
    none, recurrence, layer = (small(remat=x) for x in ("none", "recurrence", "layer"))
    assert layer.activations == 5 * 200 * 4 * 64  # the residual stream
    matmuls = 2 * (4 * 48 + 3)  # q, k, v, gate and decay
    assert recurrence.activations - layer.activations == 5 * 200 * matmuls
    assert layer.working - recurrence.working == 200 * matmuls
    copies = 2 * none.parameters // 4
    states = none.saved_states // 5
    whole = (none.activations - copies) // 5
    assert layer.working - none.working == whole - 200 * 4 * 64 + states
    assert recurrence.saved_states == layer.saved_states == 0


def test_each_chunk_of_time_has_weights_and_gradients_of_its_own() -> None:
    one, four = small(), small(time_chunks=4)
    of_layers = 2 * (one.parameters // 4 - 256 * 64)
    states = 2 * 4 * 5 * 3 * 16 * 16  # of rows, layers and heads, between chunks
    assert four.activations - one.activations == 3 * (of_layers + states)
    assert four.gradients - one.gradients == 3 * of_layers
    layer, of_four = small(remat="layer"), small(remat="layer", time_chunks=4)
    assert of_four.activations - layer.activations == 3 * states
    assert small(time_chunks=3) == one  # which does not divide the length


def test_logits_and_their_gradient() -> None:
    more = small(vocab_size=300).working - small(vocab_size=256).working
    assert more == 2 * 4 * 200 * (300 - 256)


def test_the_larger_of_both_ends_of_the_backward_pass() -> None:
    assert TrainingMemory(1, 20, 300, 4000, 50_000, 600_000).total == 654_021
    assert TrainingMemory(1, 20, 300_000, 4000, 50_000, 600_000).total == 900_021


def test_who_runs_the_recurrence() -> None:
    """Those of jax-linear-attention are for Hopper alone."""
    turing = dataclasses.replace(find_gpu("rtx4090"), compute_capability=(7, 5))
    gpus = None, find_gpu("h100"), find_gpu("rtx4090"), find_gpu("b200"), turing
    by_kernels = {
        mixer.kind: [implementation_on(gpu, mixer) == "mosaic_gpu" for gpu in gpus]
        for mixer in (
            E88Config(n_heads=2, n_state=32),
            AttentionConfig(n_heads=1),
            GatedDeltaNetConfig(n_heads=1),
            Mamba2Config(),
        )
    }
    assert by_kernels["e88"] == by_kernels["attention"] == [True, True, True, True, False]
    assert by_kernels["mamba2"] == by_kernels["gated_deltanet"] == [True, True, False, False, False]


def test_a_hybrid_by_kernels_and_without() -> None:
    """Each mixer's own implementation counts."""
    layers = Mamba2Config(), AttentionConfig(n_heads=1)
    config = dataclasses.replace(lm_config(dim=64, n_heads=2, n_state=32, depth=2), layers=layers)

    def total(implementation: Any) -> int:
        return training_memory(config, 2, 1024, implementation=implementation).total

    on_4090 = total(functools.partial(implementation_on, find_gpu("rtx4090")))
    assert total("mosaic_gpu") < on_4090 < total("chunked")


def test_the_scan_is_counted_where_there_is_no_kernel() -> None:
    fits, odd = (lm_config(dim=64, n_heads=3, n_state=n, depth=5) for n in (32, 30))
    by = {
        config: [
            training_memory(config, 2, 100, implementation=implementation).total
            for implementation in ("mosaic_gpu", "chunked", "scan")
        ]
        for config in (fits, odd)
    }
    assert by[fits][0] != by[fits][1] == by[fits][2]
    assert by[odd][0] == by[odd][1] == by[odd][2]


def test_state() -> None:
    config = a_model(expansion=2.0)
    assert config.layers[0].state_size(config.dim) == 3 * 16 * 32
    assert config.state_size() == 5 * 3 * 16 * 32
    assert state_bytes(config) == 5 * 3 * 16 * 32 * 4
    assert state_bytes(config, "bfloat16") == 5 * 3 * 16 * 32 * 2
    with pytest.raises(ValueError, match="'int8'"):
        state_bytes(config, "int8")


def test_a_kind_without_activations_has_no_estimate() -> None:
    mixed = dataclasses.replace(a_model(), layers=(*a_model().layers, ToyConfig()))
    with pytest.raises(ValueError, match="the method activations; that of toy has none"):
        training_memory(mixed, 2, 100)
    assert state_bytes(mixed) == 4 * (3 * 3 * 16 * 16 + 2 * 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountedConfig(ToyConfig):
    """A mixer with an estimate of its own, of numbers that cannot be taken for others."""

    def activations(self, dim: int, length: int, execution: Execution) -> Activations:
        assert (dim, length) == (64, 100)
        assert (execution.dtype, execution.implementation) == ("bfloat16", "mosaic_gpu")
        return Activations(matmuls=10, others=300, saved_states=7_000, working=50_000)


@pytest.mark.parametrize(
    ("remat", "kept", "saved", "working"),
    [
        ("none", 310 + 128, 7_000, 50_000 * 200),
        ("recurrence", 10, 0, (50_000 + 300 + 128) * 200 + 2 * 7_000),
        ("layer", 0, 0, (50_000 + 310 + 128) * 200 + 2 * 7_000),
    ],
)
def test_a_mixer_s_own_estimate(remat: Any, kept: int, saved: int, working: int) -> None:
    """In a model of one E88 layer and two that say what they keep."""

    def memory(*layers: Any) -> TrainingMemory:
        execution = Execution(remat=remat)
        config = LMConfig(dim=64, depth=len(layers), layers=layers, execution=execution)
        return training_memory(config, 2, 100)

    (e88,), counted = a_model().layers, CountedConfig()
    alone, mixed = memory(e88), memory(e88, counted, counted)
    copies = (mixed.parameters - alone.parameters) // 2 if remat == "none" else 0
    assert mixed.activations - alone.activations == copies + 2 * 200 * (4 * 64 + kept)
    assert mixed.saved_states - alone.saved_states == 2 * 2 * saved
    temporary = 200 * ((3 * 2 + 4) * 64 + 2 * 4 * 256)
    assert mixed.working == temporary + working


def test_hybrids_are_the_sum_of_their_layers() -> None:
    """Without remat what two kinds keep is what each keeps alone."""
    gdn, e88 = GatedDeltaNetConfig(n_heads=2, head_dim=16), E88Config(n_heads=3, n_state=16)
    attention = AttentionConfig(n_heads=2, head_dim=32)

    def kept(*layers: Any) -> int:
        config = LMConfig(dim=64, depth=len(layers), layers=layers)
        memory = training_memory(config, 2, 100)
        own = memory.activations + memory.saved_states
        return own - 2 * config.count_params()

    assert kept(e88, gdn, attention) == kept(e88) + kept(gdn) + kept(attention)
    assert kept(e88, e88, gdn) == 2 * kept(e88) + kept(gdn)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (5, -1)])
def test_nothing_to_train_on(batch: int, length: int) -> None:
    config = a_model()
    with pytest.raises(ValueError, match="at least 1"):
        training_memory(config, batch, length)


@pytest.mark.parametrize(
    ("layer", "options", "runs_by"),
    [
        (GatedDeltaNetConfig(n_heads=2, head_dim=128), {}, "mosaic_gpu"),
        (GatedDeltaNetConfig(n_heads=2, head_dim=96), {}, "chunked"),
        (GatedDeltaNetConfig(n_heads=2, head_dim=128), {"dtype": "float32"}, "chunked"),
        (Mamba2Config(), {}, "mosaic_gpu"),
        (Mamba2Config(d_state=128, head_dim=256), {}, "chunked"),
        (Mamba2Config(), {"dtype": "float32"}, "chunked"),
        (AttentionConfig(n_heads=2, head_dim=128), {}, "mosaic_gpu"),
        (AttentionConfig(n_heads=2, head_dim=136), {}, "scan"),
        (AttentionConfig(n_heads=2, head_dim=12), {}, "scan"),
        (AttentionConfig(n_heads=2, head_dim=128), {"dtype": "float32"}, "scan"),
    ],
)
def test_kernels_are_counted_where_they_run(
    layer: Any, options: dict[str, Any], runs_by: str
) -> None:
    config = LMConfig(dim=256, depth=1, layers=(layer,))

    def total(implementation: Any) -> int:
        return training_memory(config, 2, 512, implementation=implementation, **options).total

    assert total("mosaic_gpu") == total(runs_by)
    plain = total("scan" if runs_by == "scan" else "chunked")
    assert (total("mosaic_gpu") < plain) == (runs_by == "mosaic_gpu")
