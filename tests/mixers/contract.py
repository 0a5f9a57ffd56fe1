"""Contract of every mixer, as one class to inherit.

A test class names its layers and inherits the rest:

    class TestToy(MixerContract):
        layers = {"default": Layer(ToyConfig(), 10)}
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e88_jax.mixers.base import Mixer, MixerConfig
from e88_jax.naive import rms_ratio
from tests.recurrence_calls import QUICK_TO_COMPILE
from tests.reference.configs import E88Layer, Layer, n_params

BATCH, TIME = 2, 8
# Equal on both sides of the cut of `test_split_runs_equal_the_whole`.
SEGMENT_IDS = np.array([[0, 0, 1, 1, 1, 2, 2, 2], [5, 2, 2, 5, 5, 5, 5, 5]], np.int32)


AnyLayer = Layer | E88Layer


def build(layer: AnyLayer) -> Any:
    config, dim, execution = layer
    return config.build(dim, execution, rngs=nnx.Rngs(0))


@functools.cache
def _parts(layer: AnyLayer) -> Any:
    """The graph and the parameters of a layer, in NumPy; equal layers share the program."""
    graphs = []

    def init() -> Any:
        graphdef, params = nnx.split(build(layer))
        graphs.append(graphdef)
        return params

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = jax.jit(init, compiler_options=QUICK_TO_COMPILE)()
    return graphs[0], jax.tree.map(np.asarray, params)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_TO_COMPILE)
def _run(graphdef: Any, params: Any, *arguments: Any, **options: Any) -> Any:
    return nnx.merge(graphdef, params)(*arguments, **options)


def run(mixer: Mixer, x: Any, state: Any = None, segment_ids: Any = None, **lengths: Any) -> Any:
    """`mixer(x, state, segment_ids, **lengths)` in NumPy; equal layers share the program."""
    results = _run(*nnx.split(mixer), x, state, segment_ids, **lengths)
    return jax.tree.map(np.asarray, results)


def weighed_sum(results: Any, weights: Any) -> Any:
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), floats_of(results), weights)
    return sum(jax.tree.leaves(products))


def weights_of(results: Any) -> Any:
    """Random numbers to weigh `floats_of` the results by."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda y: rng.normal(size=y.shape), floats_of(results))


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def floats_of(tree: Any) -> Any:
    """The tree with None in place of arrays that are not differentiated, such as positions."""
    return jax.tree.map(lambda x: x if is_float(x) else None, tree)


def with_floats(tree: Any, floats: Any) -> Any:
    """The tree with the arrays of `floats_of` from another."""
    return jax.tree.map(
        lambda x, y: x if y is None else y, tree, floats, is_leaf=lambda x: x is None
    )


def close(actual: Any, expected: Any, bound: float) -> None:
    """Each array of two trees, by RMS ratio."""
    chex.assert_trees_all_equal_structs(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert rms_ratio(a, b) < bound


def rows_of(state: Any, rows: Any) -> Any:
    """The state of some rows of the batch."""
    return jax.tree.map(lambda x: x[rows], state)


class MixerContract:
    """Tests of `y, state = mixer(x, state, segment_ids, lengths=lengths)` and of its config."""

    layers: ClassVar[Mapping[str, AnyLayer]]
    """The layers that are tested, by name; their dtype is float64."""
    bound = 1e-12
    """RMS ratio of what is computed in two ways in float64."""
    context: ClassVar[int | None] = None
    """Context of `init_state`, for mixers that need one; longer than the tokens of a test."""
    counted_context: ClassVar[int | None] = None
    """Context of the state that `state_size` counts."""
    no_state_is_bitwise: ClassVar[bool] = True
    """Whether no state gives bit for bit what the initial state does; else up to `bound`."""

    def counted(self, state: Any) -> Any:
        """The part of a state that `state_size` counts."""
        return state

    def fresh(self, mixer: Mixer, batch: int = BATCH) -> Any:
        """The state before the first token: None, or that of `context`."""
        return None if self.context is None else mixer.init_state(batch, self.context)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "layer" in metafunc.fixturenames:
            metafunc.parametrize("layer", self.layers.values(), ids=self.layers.keys())

    @pytest.fixture
    def mixer(self, layer: AnyLayer, float64: None) -> Mixer:
        """A mixer whose parameters are not at the values they start with, such as norms of 1."""
        graphdef, params = _parts(layer)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda p: jnp.asarray(p + 0.1 * rng.normal(size=p.shape), jnp.float64), params
        )
        return nnx.merge(graphdef, params)

    @pytest.fixture
    def x(self, layer: AnyLayer, float64: None) -> np.ndarray:
        return np.random.default_rng(1).normal(size=(BATCH, TIME, layer.dim))

    @pytest.fixture
    def before(self, layer: AnyLayer, mixer: Mixer) -> Any:
        """A state that another call could have left: random numbers, or what other tokens leave
        where not every array is of floats."""
        rng = np.random.default_rng(2)
        initial = mixer.init_state(BATCH, self.context)
        if all(map(is_float, jax.tree.leaves(initial))):
            return jax.tree.map(
                lambda x: np.asarray(rng.uniform(-0.6, 0.6, x.shape), x.dtype), initial
            )
        others = rng.normal(size=(BATCH, TIME, layer.dim))
        _, state = run(mixer, others, initial, lengths=np.asarray([TIME, 3], np.int32))
        return state

    def test_split_runs_equal_the_whole(self, mixer: Mixer, x: np.ndarray, before: Any) -> None:
        # The id changes inside the parts only: across calls the caller resets the state.
        ids = SEGMENT_IDS
        whole = run(mixer, x, before, ids)
        y_0, state = run(mixer, x[:, :4], before, ids[:, :4])
        y_1, state = run(mixer, x[:, 4:], state, ids[:, 4:])
        close((np.concatenate([y_0, y_1], axis=1), state), whole, self.bound)

    def test_token_by_token_equals_the_whole(
        self, mixer: Mixer, x: np.ndarray, before: Any
    ) -> None:
        """As trained and as `for_inference` lays it out."""
        whole = run(mixer, x, before)
        for decoder in (mixer, mixer.for_inference()):
            close(run(decoder, x, before), whole, self.bound)
            state, rows = before, []
            for t in range(TIME):
                y, state = run(decoder, x[:, t : t + 1], state)
                rows.append(y)
            close((np.concatenate(rows, axis=1), state), whole, self.bound)

    def test_packed_documents_equal_separate_runs(
        self, mixer: Mixer, x: np.ndarray, before: Any
    ) -> None:
        """Token 0 continues the state; an id may come back, and documents be of one token."""
        ids = np.asarray([[4, 4, 4, 9, 4, 4, 4, 1]] * BATCH, np.int32)
        packed = run(mixer, x, before, ids)
        fresh, initial = self.fresh(mixer), mixer.init_state(BATCH, self.context)
        state, parts = before, []
        # Lengths that come again share a program.
        for start, end, state in ((0, 3, before), (3, 4, fresh), (4, 7, initial), (7, 8, fresh)):
            y, state = run(mixer, x[:, start:end], state)
            parts.append(y)
        close(packed, (np.concatenate(parts, axis=1), state), self.bound)

    def test_documents_are_apart_where_one_is_not_finite(
        self, mixer: Mixer, x: np.ndarray, before: Any
    ) -> None:
        """It is NaN from its first such token on; the others are as without it."""
        ids = np.asarray([[4, 4, 4, 7, 7, 7, 1, 1]] * BATCH, np.int32)
        expected, state = run(mixer, x, before, ids)
        spoilt = x.copy()
        spoilt[0, 4] = np.nan
        y, after = run(mixer, spoilt, before, ids)
        assert np.all(np.isnan(y[0, 4:6]))
        for b, steps in ((0, [0, 1, 2, 3, 6, 7]), (1, range(TIME))):
            close(y[b, np.asarray(steps)], expected[b, np.asarray(steps)], self.bound)
        close(after, state, self.bound)

    def test_rows_have_lengths_of_their_own(self, mixer: Mixer, x: np.ndarray, before: Any) -> None:
        """The state is that after a row's last token, whatever comes after it, and zeros come
        out there."""
        same = np.zeros_like(SEGMENT_IDS)
        for lengths, ids in (((8, 3), None), ((0, 4), None), ((4, 1), SEGMENT_IDS)):
            padded = x.copy()
            for b, n in enumerate(lengths):
                padded[b, n:] = np.nan
            y, state = run(mixer, padded, before, ids, lengths=np.asarray(lengths, np.int32))
            for b, n in enumerate(lengths):
                row, its_state = rows_of((y, state), slice(b, b + 1))
                expected = rows_of(before, slice(b, b + 1))
                assert not np.any(row[:, n:])
                if n > 0:
                    # Both rows without padding: `test_rows_are_apart` shows that neither reads the
                    # other. One id is as none, and both are programs that other tests run.
                    its_ids = None if n != 4 else (same if ids is None else ids)[:, :n]
                    wanted, expected = rows_of(
                        run(mixer, x[:, :n], before, its_ids), slice(b, b + 1)
                    )
                    close(row[:, :n], wanted, self.bound)
                close(its_state, expected, self.bound)

    def test_the_future_is_not_seen(self, mixer: Mixer, x: np.ndarray, before: Any) -> None:
        y, _ = run(mixer, x, before)
        changed, _ = run(mixer, np.concatenate([x[:, :5], x[:, 5:] + 1], axis=1), before)
        np.testing.assert_array_equal(y[:, :5], changed[:, :5])
        assert np.all(np.any(np.asarray(y[:, 5:] != changed[:, 5:]), axis=-1))

    def test_rows_are_apart(self, mixer: Mixer, x: np.ndarray, before: Any) -> None:
        """Neither is changed by the other's input, state and documents."""
        results = run(mixer, x, before, SEGMENT_IDS)
        for b in range(BATCH):

            def others_changed(ours: Any, theirs: Any, b: int = b) -> Any:
                mixed = np.array(theirs)
                mixed[b] = ours[b]
                return mixed

            changed = run(
                mixer,
                others_changed(x, x + 1),
                jax.tree.map(lambda a: others_changed(a, a[::-1]), before),
                others_changed(SEGMENT_IDS, SEGMENT_IDS[::-1]),
            )
            chex.assert_trees_all_equal(rows_of(changed, b), rows_of(results, b))
            assert np.all(changed[0][1 - b] != results[0][1 - b])

    def test_the_initial_state_is_that_of_no_state(self, mixer: Mixer, x: np.ndarray) -> None:
        given = mixer.init_state(BATCH, TIME)
        results = run(mixer, x)
        if self.no_state_is_bitwise:
            chex.assert_trees_all_equal(run(mixer, x, given), results)
        close(run(mixer, x, given), results, self.bound)
        chex.assert_trees_all_equal_shapes_and_dtypes(given, results[1])
        assert {x.shape[0] for x in jax.tree.leaves(given)} == {BATCH}
        one = mixer.init_state(1, TIME)
        assert all(
            a.shape == (1, *b.shape[1:])
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(given), strict=True)
        )

    def test_for_inference_leaves_the_trained_mixer_as_it_is(
        self, mixer: Mixer, x: np.ndarray, before: Any
    ) -> None:
        graphdef, params = nnx.split(mixer)
        params = jax.tree.map(np.array, params)
        decoder = mixer.for_inference()
        after = nnx.split(mixer)
        assert after[0] == graphdef
        chex.assert_trees_all_equal(after[1], params)
        # Nor is it by what is done to the other.
        doubled = jax.tree.map(lambda x: 2 * x, nnx.state(decoder))
        nnx.update(decoder, doubled)
        chex.assert_trees_all_equal(nnx.split(mixer)[1], params)
        again = mixer.for_inference()
        twice = again.for_inference()
        assert nnx.graphdef(twice) == nnx.graphdef(again)
        chex.assert_trees_all_equal(nnx.state(twice), nnx.state(again))
        chex.assert_trees_all_equal(run(twice, x, before), run(again, x, before))

    def test_gradients_of_split_runs_are_slopes(
        self, mixer: Mixer, x: np.ndarray, before: Any
    ) -> None:
        """Every parameter, the input and the state, through the results of two calls: of one token,
        and of documents that an odd number of steps holds."""
        graphdef, params = nnx.split(mixer)
        arguments = jax.tree.map(np.asarray, (params, x, floats_of(before)))
        ids = np.concatenate([SEGMENT_IDS[:, 1:2], SEGMENT_IDS[:, 1:]], axis=1)
        whole = run(mixer, x, before, ids)
        weights = weights_of(whole)

        @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
        def loss_and_gradient(*arguments: Any) -> Any:
            def loss(params: Any, x: Any, floats: Any) -> Any:
                layer, state = nnx.merge(graphdef, params), with_floats(before, floats)
                first, state = layer(x[:, :1], state)
                rest, state = layer(x[:, 1:], state, jnp.asarray(ids[:, 1:]))
                return weighed_sum((jnp.concatenate([first, rest], axis=1), state), weights)

            return jax.value_and_grad(loss, argnums=(0, 1, 2))(*arguments)

        value, gradient = jax.tree.map(np.asarray, loss_and_gradient(*arguments))
        assert abs(value - weighed_sum(whole, weights)) < 10 * self.bound * abs(value)
        chex.assert_tree_all_finite(gradient)
        leaves, tree = jax.tree.flatten(arguments)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(arguments)]
        rng = np.random.default_rng(4)
        for i, (name, slope) in enumerate(zip(paths, jax.tree.leaves(gradient), strict=True)):
            norm = np.linalg.norm(slope)
            assert norm > 1e-4, name
            # The direction of the steepest slope; chance is added to it.
            direction = slope / norm + rng.normal(size=slope.shape) / np.sqrt(slope.size)

            def moved(step: float, i: int = i, direction: Any = direction) -> Any:
                at = [x + step * direction if i == j else x for j, x in enumerate(leaves)]
                return float(loss_and_gradient(*jax.tree.unflatten(tree, at))[0])

            measured = (moved(1e-5) - moved(-1e-5)) / 2e-5
            assert abs(measured - float(np.sum(slope * direction))) < 2e-6 * norm, name

    def test_counts_are_exact(self, layer: AnyLayer, float64: None) -> None:
        config: MixerConfig = layer.config
        mixer = nnx.eval_shape(lambda: build(layer))
        assert config.count_params(layer.dim) == n_params(mixer)
        state = jax.eval_shape(lambda: self.counted(mixer.init_state(1, self.counted_context)))
        assert config.state_size(layer.dim) == sum(x.size for x in jax.tree.leaves(state))
        flops = config.flops_per_token(layer.dim)
        kernels = [
            param.size
            for path, param in nnx.to_flat_state(nnx.state(mixer, nnx.Param))
            if path[-1] == "kernel"
        ]
        assert 6 * sum(kernels) <= flops.matmul <= 6 * n_params(mixer)
        assert flops.recurrence > config.state_size(layer.dim)
        assert flops.total == flops.matmul + flops.recurrence

    def test_bfloat16(self, layer: AnyLayer) -> None:
        """Matmuls in bfloat16; parameters and their gradients in float32. x has one row."""
        execution = dataclasses.replace(layer.execution, dtype="bfloat16")
        narrow = Layer(layer.config, layer.dim, execution)
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: build(narrow)))
        assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
        x = np.random.default_rng(1).normal(size=(1, TIME, layer.dim)).astype("float32")

        @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
        def evaluate(params: Any, x: Any) -> Any:
            def loss(params: Any) -> Any:
                y, _ = nnx.merge(graphdef, params)(x)
                return jnp.sum(y.astype(jnp.float32)), y

            return jax.grad(loss, has_aux=True)(params)

        gradient, y = evaluate(_parts(layer)[1], x)
        assert y.shape == x.shape
        assert y.dtype == jnp.bfloat16
        assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
        chex.assert_tree_all_finite(gradient)

    def test_it_is_written_and_read_by_its_kind(self, layer: AnyLayer) -> None:
        config = layer.config
        assert hash(config) == hash(dataclasses.replace(config))
        assert type(config)(**dataclasses.asdict(config)) == config
        assert isinstance(type(config).kind, str)
