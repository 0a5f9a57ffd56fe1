"""Attention against NumPy, its cache, and the calls that cuDNN takes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from e88_jax import AttentionConfig, AttentionMixer, E88Config, LanguageModel, LMConfig, kernels
from e88_jax.mixers.attention import AttentionState
from e88_jax.mixers.base import Execution
from e88_jax.naive import rms_ratio
from e88_jax.optim import muon_dimensions, weight_decay_mask
from e88_jax.typed import params_by_path, set_params
from pallas_kernels import target
from tests.reference.attention import (
    Weights,
    attention,
    keys_and_values,
    positions_of,
    shapes,
)

DIM, TIME = 10, 31
IDS = np.array([[0] * 31, [3] * 9 + [1] + [3] * 14 + [0] * 7])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"qk_norm": False, "rope_base": 50.0},
    {"n_kv_heads": 2},
    {"n_kv_heads": 1, "qk_norm": False, "window": 5},
    {"window": 1},
    {"window": 31, "n_kv_heads": 3, "rope_base": 3.0},
    {"window": 40},
]


def config_of(**options: Any) -> AttentionConfig:
    return AttentionConfig(n_heads=6, head_dim=4, **options)


def weights_of(config: AttentionConfig) -> Weights:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape) for name, shape in shapes(config, DIM).items()}
    # Scores of a few units, so that no weight is near 0 or 1.
    return {name: w if w.ndim == 1 else 0.4 * w for name, w in weights.items()}


def mixer_of(config: AttentionConfig, weights: Weights, dtype: Any = "float64") -> AttentionMixer:
    mixer = AttentionMixer(config, DIM, Execution(dtype=dtype), rngs=nnx.Rngs(0))
    params = params_by_path(mixer)
    assert {name: param.shape for name, param in params.items()} == shapes(config, DIM)
    set_params(mixer, {name: jnp.asarray(w) for name, w in weights.items()})
    return mixer


def inputs(time: int = TIME, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, time, DIM))


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef: Any, params: Any, *arguments: Any, **options: Any) -> Any:
    return nnx.merge(graphdef, params)(*arguments, **options)


def run(mixer: AttentionMixer, x: Any, *arguments: Any, **options: Any) -> Any:
    return _run(*nnx.split(mixer), jnp.asarray(x), *arguments, **options)


def expected_state(
    config: AttentionConfig, weights: Weights, x: np.ndarray, ids: np.ndarray, context: int
) -> AttentionState:
    """The state after x `[T, dim]`: the newest token of the last document in each slot."""
    positions = positions_of(ids)
    keys, values = keys_and_values(config, weights, x, positions)
    cache = np.zeros((2, context, *keys.shape[1:]))
    first = len(x) - 1 - positions[-1]
    for t in range(first, len(x)):  # later tokens take the place of earlier ones
        cache[:, positions[t] % context] = keys[t], values[t]
    return AttentionState(cache[0], cache[1], positions[-1] + 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_numpy(float64: None, options: dict[str, Any]) -> None:
    """Outputs and state; and differences of NumPy's loss along each gradient, with chance added to
    the direction."""
    config = config_of(**options)
    weights, x, ids = weights_of(config), inputs(), IDS
    rng = np.random.default_rng(2)
    cotangent = rng.normal(size=x.shape)
    mixer = mixer_of(config, weights)
    graphdef, params = nnx.split(mixer)

    def loss(params: Any, x: Any) -> Any:
        y, state = nnx.merge(graphdef, params)(x, None, jnp.asarray(ids))
        return jnp.sum(cotangent * y), (y, state)

    differentiated = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (by_path, d_x), results = differentiated(params, jnp.asarray(x))
    y, state = jax.tree.map(np.asarray, results)
    for b in range(2):
        assert rms_ratio(y[b], attention(config, weights, x[b], ids[b])) < 1e-12
        expected = expected_state(config, weights, x[b], ids[b], config.window or TIME)
        assert state.keys.shape[1:] == expected.keys.shape
        for actual, wanted in zip(state, expected, strict=True):
            assert rms_ratio(actual[b], wanted) < 1e-12
    by_name = {".".join(map(str, path)): g for path, g in nnx.to_flat_state(by_path)}
    slopes = {name: np.asarray(g[...]) for name, g in by_name.items()} | {"x": np.asarray(d_x)}
    assert slopes.keys() == weights.keys() | {"x"}

    def numpy_loss(name: str, step: np.ndarray) -> float:
        moved = {**weights, "x": x}
        moved[name] = moved[name] + step
        rows = (attention(config, moved, moved["x"][b], ids[b]) for b in range(2))
        return sum(float(np.sum(c * y)) for c, y in zip(cotangent, rows, strict=True))

    for name, slope in slopes.items():
        norm = np.linalg.norm(slope)
        is_dead = config.window == 1 and name.startswith(("q", "k"))  # softmax of one
        assert (norm < 1e-12) == is_dead, name
        direction = slope / max(norm, 1e-3) + rng.normal(size=slope.shape) / np.sqrt(slope.size)
        above, below = (numpy_loss(name, step * direction) for step in (1e-5, -1e-5))
        measured = (above - below) / 2e-5
        assert abs(measured - np.sum(slope * direction)) < 1e-6 * max(norm, 1), name


def decoded(mixer: AttentionMixer, x: np.ndarray, state: Any) -> Any:
    """Outputs and state of x read token by token."""

    def step(state: Any, x: Any) -> Any:
        y, state = mixer(x[:, None], state)
        return state, y[:, 0]

    state, y = jax.lax.scan(step, state, jnp.moveaxis(jnp.asarray(x), 1, 0))
    return jnp.moveaxis(y, 0, 1), state


@pytest.mark.parametrize("window", [1, 5, 16])
def test_decoding_far_beyond_the_window(float64: None, window: int) -> None:
    config = config_of(window=window, n_kv_heads=2)
    weights, x = weights_of(config), inputs(6 * 16 + 3)
    for mixer in (trained := mixer_of(config, weights), trained.for_inference()):
        y, state = decoded(mixer, x, mixer.init_state(2))
        for b in range(2):
            ids = np.zeros(x.shape[1])
            assert rms_ratio(y[b], attention(config, weights, x[b], ids)) < 1e-12
            expected = expected_state(config, weights, x[b], ids, window)
            for actual, wanted in zip(state, expected, strict=True):
                assert rms_ratio(actual[b], wanted) < 1e-12


@pytest.mark.parametrize("ends", [(1, 4, 5, 17, 23), (17, 18, 19, 20, 23), (23,), tuple(range(24))])
def test_a_full_cache_drops_the_oldest_tokens(float64: None, ends: tuple[int, ...]) -> None:
    """Without a window a token sees as many as the cache holds, however the calls are cut."""
    config = config_of()
    weights, x, ids = weights_of(config), inputs(23), IDS[:, :23]
    mixer, outputs, start = mixer_of(config, weights), [], 0
    state = mixer.init_state(2, context=6)
    # The document of row 1 that begins at token 9 is of one token. Cuts are inside of documents.
    for end in (end for end in ends if end not in (0, 9, 10)):
        y, state = run(mixer, x[:, start:end], state, jnp.asarray(ids[:, start:end]))
        outputs.append(y)
        start = end
    y = jnp.concatenate(outputs, axis=1)
    for b in range(2):
        assert rms_ratio(y[b], attention(config, weights, x[b], ids[b], reach=6)) < 1e-12
        assert rms_ratio(y[b], attention(config, weights, x[b], ids[b])) > 0.1
        for actual, wanted in zip(
            state, expected_state(config, weights, x[b], ids[b], 6), strict=True
        ):
            assert rms_ratio(actual[b], wanted) < 1e-12


def test_a_call_without_state_sees_all_and_remembers_as_much(float64: None) -> None:
    config = config_of()
    weights, x, ids = weights_of(config), inputs(20), np.zeros(20)
    mixer = mixer_of(config, weights)
    _, state = run(mixer, x[:, :13])
    assert state.keys.shape == (2, 13, 6, 4)
    y, after = run(mixer, x[:, 13:], state)
    assert after.keys.shape == state.keys.shape
    for b in range(2):
        assert rms_ratio(y[b], attention(config, weights, x[b], ids, reach=13)[13:]) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=str)
def test_narrow_dtypes_under_strict_promotion(dtype: str, options: dict[str, Any]) -> None:
    config = config_of(**options)
    weights, x = weights_of(config), inputs().astype(np.float32)
    mixer = mixer_of(config, {name: w.astype(np.float32) for name, w in weights.items()}, dtype)
    bound = {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
    ids, start = jnp.asarray(IDS), mixer.init_state(2, context=TIME)
    for state in (None, start):
        y, after = run(mixer, x, state, ids, lengths=jnp.asarray([TIME, 30]))
        assert y.dtype == after.keys.dtype == after.values.dtype == dtype
        assert after.position.dtype == jnp.int32
        for b, n in enumerate((TIME, 30)):
            expected = attention(config, weights, x[b, :n].astype(np.float64), IDS[b, :n])
            assert rms_ratio(y[b, :n], expected) < bound
        assert not np.any(np.asarray(y[1, 30:], np.float32))


def test_initial_values() -> None:
    mixer = AttentionConfig(n_heads=16, head_dim=32, n_kv_heads=4).build(
        300, Execution(dtype="float32"), rngs=nnx.Rngs(0)
    )
    params = params_by_path(mixer)
    for name, n_out in (("q", 512), ("k", 128), ("v", 128), ("output", 300)):
        kernel = params[f"{name}.kernel"][...]
        n_in = kernel.size // n_out
        assert 0.99 < float(jnp.max(jnp.abs(kernel))) / np.sqrt(6 / (n_in + n_out)) <= 1
    assert np.all(params["q_norm.scale"][...] == 1)


def test_what_decays_and_what_muon_takes() -> None:
    params = nnx.state(AttentionMixer(config_of(), DIM, rngs=nnx.Rngs(0)), nnx.Param)
    decays, taken = weight_decay_mask(params), muon_dimensions(params)
    for name in ("q", "k", "v", "output"):
        assert decays[name]["kernel"].get_raw_value() is True
        assert taken[name]["kernel"] is not None
    assert taken["output"]["kernel"].reduction_axis == (0, 1)
    assert decays["q_norm"]["scale"].get_raw_value() is False
    assert taken["k_norm"]["scale"] is None


def test_errors_of_sizes_and_states() -> None:
    full, windowed = (
        AttentionMixer(config_of(window=window), DIM, Execution(dtype="float32"), rngs=nnx.Rngs(0))
        for window in (None, 5)
    )
    x = jnp.zeros((2, 3, DIM))
    with pytest.raises(
        ValueError, match=r"context must be .* init_state\(3, context=2048\), got N"
    ):
        full.init_state(3)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        full.init_state(3, context=0)
    with pytest.raises(TypeError, match=r"context must be an integer.* got 2\.5"):
        full.init_state(3, context=2.5)  # pyright: ignore[reportArgumentType]
    for context in (1, 3, 100):
        _, state = jax.eval_shape(full, x, full.init_state(2, context))
        assert state.keys.shape[1] == context
    assert windowed.init_state(2, context=3).keys.shape == (2, 5, 6, 4)
    good = full.init_state(2, 7)
    wrong: list[tuple[AttentionMixer, Any, str]] = [
        (full, full.init_state(3, 7), r"a batch of 2, got .*\(3, 7, 6, 4\)"),
        (full, good._replace(keys=good.keys[:, :4]), r"\(2, 7, 6, 4\)"),
        (full, good._replace(values=good.values[..., :3]), r"\(2, 7, 6, 3\)"),
        (
            full,
            good._replace(keys=good.keys[:, :, :2]),
            r"\(2, 7, 6, 4\).*got .*\(2, 7, 2, 4\)",
        ),
        (full, good._replace(position=jnp.zeros((2,))), r"int32 \(2,\).*float32 \(2,\)"),
        (full, jax.tree.map(lambda a: a[:, :0], good._replace(position=x)), r"\(2, 0, 6, 4\)"),
        (full, good._replace(keys=None), "got .*keys=None"),
        (windowed, good, r"\(2, 5, 6, 4\).*\(2, 7, 6, 4\)"),
    ]
    for mixer, state, message in wrong:
        with pytest.raises(ValueError, match=f"state must be .*{message}"):
            mixer(x, state)
    for state in (tuple(good), {"keys": good.keys}, good.keys, 3.0):
        with pytest.raises(TypeError, match="state must be of type AttentionState, such as"):
            full(x, state)  # pyright: ignore[reportArgumentType]


def test_a_model_with_one_layer_of_attention() -> None:
    layers = E88Config(n_heads=2, n_state=4), config_of()
    config = LMConfig(dim=12, depth=2, layers=layers, execution=Execution(dtype="float32"))
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.int32)
    with pytest.raises(ValueError, match="context must be the most tokens"):
        model.init_state(2)
    assert model.needs_context
    state = model.init_state(2, context=12)
    whole, _ = jax.jit(model)(tokens)
    parts, step = [], jax.jit(model)
    for t in range(9):
        logits, state = step(tokens[:, t : t + 1], state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)
    wrong = model.init_state(3, 12)[0], state[1]
    with pytest.raises(
        ValueError, match=r"state\[1\] must be .* batch of 3, got .*\(2, 12, 6, 4\)"
    ):
        jax.eval_shape(model, jnp.zeros((3, 1), jnp.int32), wrong)
    windowed = LMConfig(dim=12, depth=1, layers=(config_of(window=4),))
    assert not nnx.eval_shape(lambda: LanguageModel(windowed, rngs=nnx.Rngs(0))).needs_context


@pytest.mark.parametrize("options", [{}, {"window": 4}], ids=str)
def test_programs_of_any_batch_and_length(options: dict[str, Any]) -> None:
    mixer = AttentionMixer(config_of(**options), DIM, Execution(dtype="float32"), rngs=nnx.Rngs(0))
    batch, time, context = export.symbolic_shape("b, t, c")
    graphdef, params = nnx.split(mixer)

    @jax.jit
    def call(x: Any, ids: Any, lengths: Any, state: Any) -> Any:
        return nnx.merge(graphdef, params)(x, state, ids, lengths=lengths)

    def arguments(
        make: Any, batch: Any, time: Any, context: Any
    ) -> tuple[Any, Any, Any, AttentionState]:
        cache = (batch, options.get("window", context), 6, 4)
        state = AttentionState(
            make(cache, "float32"), make(cache, "float32"), make((batch,), "int32")
        )
        x = make((batch, time, DIM), "float32")
        return x, make((batch, time), "int32"), make((batch,), "int32"), state

    def made(shape: Any, dtype: str) -> Any:
        return jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), dtype)

    # Either size with and without a state, over both options.
    sizes = ((1, 2, 3), (3, 7, 5)) if options else ((3, 7, 5), (1, 2, 3))
    for is_first, size in zip((True, False), sizes, strict=True):
        shapes_ = list(arguments(jax.ShapeDtypeStruct, batch, time, context))
        if is_first:
            shapes_[3] = None
        exported = export.export(call)(*shapes_)
        exported = export.deserialize(exported.serialize())
        given = list(arguments(made, *size))
        if is_first:
            given[3] = None
        for a, b in zip(
            jax.tree.leaves(exported.call(*given)), jax.tree.leaves(call(*given)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class TestCuDNN:
    """The choice, as if the target were a GPU: no cuDNN is here to take the calls."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []

        def call(function: Any, q: Any, k: Any, v: Any, *, window: int | None) -> Any:
            calls.append(window)
            raise NotImplementedError("is not here")

        monkeypatch.setattr(kernels, "call", call)
        monkeypatch.setattr(kernels, "log_once", lambda message: calls.append(message))
        return calls

    def mixer(self, config: AttentionConfig, **execution: Any) -> AttentionMixer:
        options = {"dtype": "bfloat16", **execution}
        return AttentionMixer(config, DIM, Execution(**options), rngs=nnx.Rngs(0))

    def test_what_it_is_asked(self, calls: list[Any]) -> None:
        x = jnp.asarray(inputs(7), jnp.float32)
        lengths = jnp.asarray([7, 3])
        config = AttentionConfig(n_heads=2, head_dim=8, window=4)
        with target.use(target.H100):
            for implementation in (None, "mosaic_gpu"):
                mixer = self.mixer(config, implementation=implementation)
                jax.eval_shape(mixer, x)
                jax.eval_shape(mixer, x[:, :4], lengths=lengths - 3)
                jax.eval_shape(mixer, x[:, :2])
                asked = [4, None, None]  # the window, if it is shorter than the call
                assert [c for c in calls if not isinstance(c, str)] == asked
                assert {c for c in calls if isinstance(c, str)} == {
                    "XLA computes attention: the kernel is not here"
                }
                calls.clear()
            _, state = jax.eval_shape(self.mixer(config), x)
            calls.clear()
            for implementation in ("scan", "chunked"):
                jax.eval_shape(self.mixer(config, implementation=implementation), x)
            jax.eval_shape(self.mixer(config, dtype="float32"), x)
            mixer = self.mixer(config)
            jax.eval_shape(mixer, x, state)
            jax.eval_shape(mixer, x, None, jnp.asarray(IDS[:, :7]))
            jax.eval_shape(mixer, x[:, :1])
            assert calls == []
            for head_dim in (12, 136):
                mixer = self.mixer(AttentionConfig(n_heads=2, head_dim=head_dim))
                jax.eval_shape(mixer, x)
            message = "XLA computes attention: the kernel needs a head_dim that is a multiple of 8 "
            assert calls == [f"{message}and at most 128, got {n}" for n in (12, 136)]
            calls.clear()
        jax.eval_shape(self.mixer(config), x)
        assert calls == []

    def test_without_cudnn_xla_computes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if jax.default_backend() == "gpu":
            pytest.skip("cuDNN is here")
        messages: list[str] = []
        monkeypatch.setattr(kernels, "log_once", messages.append)
        x = jnp.asarray(inputs(7), jnp.float32)
        mixer = self.mixer(AttentionConfig(n_heads=2, head_dim=8))
        with target.use(target.H100):
            y, _ = jax.jit(lambda x: mixer(x))(x)
        np.testing.assert_array_equal(y, jax.jit(lambda x: mixer(x))(x)[0])
        assert len(messages) == 1
        assert "cannot be lowered" in messages[0]
