"""Models whose heads are divided over the devices of a mesh axis, inside `jax.shard_map`."""

import functools

import jax
from flax import nnx

from e88_jax.config import LMConfig
from e88_jax.model import LanguageModel
from e88_jax.typed import Variables


def merge(config: LMConfig, params: Variables, axis: str) -> LanguageModel:
    """The model of a device that has its part, along a mesh axis, of each layer's heads and of a
    channel mixer's hidden units.

    Devices add up the outputs of each mixer and channel mixer, and the gradients of their inputs,
    in the compute dtype: an all-reduce each. All else each computes for itself. A call gives whole
    logits and the states of the device's heads; the gradient is that of the device's parameters.

    Args:
        config: that of the whole model.
        params: parameters of `LanguageModel(config)`, of those with axes named "heads" or "hidden"
            the device's part along them, the others whole.
        axis: an axis of the mesh of a `jax.shard_map` with `check_vma=False`.

    Raises:
        ValueError: the axis does not divide the heads, or a layer has none.
    """
    n: int = jax.lax.axis_size(axis)
    model = nnx.merge(_graphdef(config.divided(n)), params)
    for block in model.blocks:
        block.divide_over(axis)
    return model


@functools.cache
def _graphdef(config: LMConfig) -> nnx.GraphDef[LanguageModel]:
    return nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
