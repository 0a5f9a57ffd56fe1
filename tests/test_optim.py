"""Which parameters decay, and which Muon takes as matrices of which axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from optax.contrib import MuonDimensionNumbers

from e88_jax.mixers.e88 import E88Mixer
from e88_jax.model import LanguageModel
from e88_jax.optim import muon_dimensions, weight_decay_mask
from tests.reference.configs import e88_layer, lm_config

OPTIONS: dict[str, Any] = {
    "write_gate": True,
    "value_residual": True,
    "conv_size": 2,
    "output_norm": True,
}


def params_of(**options: Any) -> Any:
    config = lm_config(channel_mixer_dim=14, **options)
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of a model of one block by their names, without that of the block."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: x is None or type(x) is _MUON)
    kept = ([getattr(entry, "key", None) for entry in path] for path, _ in leaves)
    names = (".".join(str(x) for x in path if x not in (None, "blocks", 0)) for path in kept)
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


_MUON = MuonDimensionNumbers
TO_OUTPUTS = _MUON((0,), (1, 2))
"""`[dim, H, columns]`"""
MATRIX = _MUON((0,), (1,))


def test_weight_decay_mask() -> None:
    params = params_of(**OPTIONS, head_mix="weighted_sum")
    mask = weight_decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    decayed = {
        ".".join(str(part) for part in path if part not in ("blocks", 0))
        for path, leaf in traverse_util.flatten_dict(nnx.to_pure_dict(mask)).items()
        if leaf is True
    }
    assert decayed == {
        "embed.embedding",
        "mixer.conv.taps",
        "mixer.heads.projection.kernel",
        *(f"mixer.inputs.{name}.kernel" for name in ("qkv", "decay", "gate", "write_gate")),
        *(f"channel_mixer.{name}_proj.kernel" for name in ("gate", "up", "down")),
    }
    assert all(leaf in (True, False) for leaf in jax.tree.leaves(mask))


def test_numbers_of_heads_do_not_decay() -> None:
    for options in ({"decay_mode": "constant"}, {"head_mix": "weighted_sum"}, {}):
        mask = weight_decay_mask(params_of(**OPTIONS, **options))
        kept = {path[-1] for path, leaf in nnx.to_flat_state(mask) if not jax.tree.leaves(leaf)[0]}
        assert {"scale", "value_residual"} <= kept
        expected = {"mamba": {"A_log", "dt_bias"}, "constant": {"logit"}}
        assert expected[options.get("decay_mode", "mamba")] <= kept
        assert ("weights" in kept) is (options.get("head_mix") == "weighted_sum")


def test_the_mask_of_a_tree_of_arrays() -> None:
    """As Optax passes it: the same paths, whatever holds the arrays."""
    params = params_of(**OPTIONS)
    plain = jax.tree.map(lambda x: np.zeros(x.shape, bool), nnx.to_pure_dict(params))
    mask = weight_decay_mask(plain)
    assert mask["blocks"][0]["mixer"]["conv"]["taps"] is True
    assert mask["blocks"][0]["mixer"]["decay"]["A_log"] is False
    assert jax.tree.leaves(mask) == jax.tree.leaves(weight_decay_mask(params))


@pytest.mark.parametrize(
    ("head_mix", "output"),
    [
        ("concat", _MUON((0, 1), (2,))),
        ("per_head", _MUON((0, 1), (2,))),
        ("sum", MATRIX),
        ("input_weighted", MATRIX),
    ],
)
def test_axes_of_muon(head_mix: str, output: MuonDimensionNumbers) -> None:
    found = by_name(muon_dimensions(params_of(**OPTIONS, head_mix=head_mix)))
    taken = {name: numbers for name, numbers in found.items() if numbers is not None}
    of_heads = ["decay", "write_gate"] + ["head_weights"] * (head_mix == "input_weighted")
    assert taken == {
        "mixer.inputs.qkv.kernel": TO_OUTPUTS,
        "mixer.inputs.gate.kernel": TO_OUTPUTS,
        "mixer.heads.projection.kernel": output,
        **{f"mixer.inputs.{name}.kernel": MATRIX for name in of_heads},
        **{f"channel_mixer.{name}_proj.kernel": MATRIX for name in ("gate", "up", "down")},
    }
    left = found.keys() - taken.keys()
    assert {"embed.embedding", "mixer.conv.taps", "mixer.decay.A_log", "norm.scale"} <= left


def test_axes_of_muon_of_flaxs_layers() -> None:
    """Two axes are a matrix; without word of which are summed over, more of them are none."""

    class Other(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.conv = nnx.Conv(3, 4, (2,), rngs=rngs)
            self.empty = nnx.data({"kernel": nnx.Param(jnp.zeros((3, 0)))})
            self.table = nnx.Embed(5, 3, rngs=rngs)

    params = nnx.state(Other(nnx.Rngs(0)), nnx.Param)
    found = by_name(muon_dimensions(params))
    assert {name for name, numbers in found.items() if numbers is not None} == {"linear.kernel"}
    assert found["linear.kernel"] == _MUON(0, 1)


def updates_of(params: Any, gradient: Any, **options: Any) -> Any:
    transform = optax.contrib.scale_by_muon(**options)
    run = jax.jit(
        lambda params, gradient: transform.update(gradient, transform.init(params), params)
    )
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        updates, _ = run(params, gradient)
    return jax.tree.map(np.asarray, updates)


@pytest.mark.parametrize("head_mix", ["concat", "sum"])
def test_muon_by_our_axes_is_that_of_the_matrix(head_mix: str) -> None:
    """Each kernel is orthogonalised as the matrix that its matmul reads."""
    layer = e88_layer(dtype="float32", head_mix=head_mix)
    mixer = E88Mixer(*layer, rngs=nnx.Rngs(0))
    params = nnx.state(mixer, nnx.Param)
    dimensions = muon_dimensions(params)
    is_kernel = [(path, p) for path, p in nnx.to_flat_state(params) if path[-1] == "kernel"]
    assert len(is_kernel) == 4
    rng = np.random.default_rng(0)
    axes = dict(nnx.to_flat_state(dimensions))
    kernels = {str(path): np.asarray(param[...]) for path, param in is_kernel}
    rows = {
        str(path): int(np.prod(param.shape[: param.get_metadata()["n_in_axes"]]))
        for path, param in is_kernel
    }

    def flat(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {path: x.reshape(rows[path], -1) for path, x in arrays.items()}

    gradient = {path: rng.normal(size=x.shape).astype("float32") for path, x in kernels.items()}
    numbers = {str(path): axes[path] for path, _ in is_kernel}
    ours = flat(updates_of(kernels, gradient, weight_dimension_numbers=numbers))
    matrices = updates_of(
        flat(kernels), flat(gradient), weight_dimension_numbers=dict.fromkeys(kernels, MATRIX)
    )
    for path, update in ours.items():
        np.testing.assert_allclose(update, matrices[path], rtol=1e-4, atol=1e-5, err_msg=path)
        values = np.linalg.svd(update, compute_uv=False)
        assert 0.5 < np.min(values) <= np.max(values) < 1.5


def test_plain_arrays_are_refused() -> None:
    """They do not say which axes are summed over."""
    arrays = nnx.to_pure_dict(params_of())
    with pytest.raises(TypeError, match=r"^params must be nnx.state.*the tree that"):
        muon_dimensions(arrays)


@pytest.mark.parametrize("how", ["nnx.Optimizer", "Optax"])
def test_muon_trains_a_model(how: str) -> None:
    model = LanguageModel(lm_config(dtype="float32", vocab_size=19, **OPTIONS), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, 8)))
    graphdef, params = nnx.split(model)
    dimensions = muon_dimensions(params) if how == "nnx.Optimizer" else muon_dimensions
    transform = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=dimensions)

    def loss(params: Any) -> Any:
        logits, _ = nnx.merge(graphdef, params)(tokens)
        targets = jnp.roll(tokens, -1, axis=1)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    @nnx.jit
    def step(model: LanguageModel, optimizer: nnx.Optimizer[Any]) -> Any:
        value, gradient = jax.value_and_grad(loss)(nnx.state(model, nnx.Param))
        optimizer.update(model, gradient)
        return value

    @jax.jit
    def plain_step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = transform.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    losses = []
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        if how == "nnx.Optimizer":
            optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
            losses = [step(model, optimizer) for _ in range(20)]
        else:
            state = transform.init(params)
            for _ in range(20):
                value, params, state = plain_step(params, state)
                losses.append(value)
    assert losses[-1] < 0.8 * losses[0]
