"""The sizing guide's formula and terms (`docs/references.md`), for models of equal E88 layers."""

from e88_jax.checks import require_instance, require_int
from e88_jax.config import E88Config, LMConfig


def calc_e88_params(dim: int, n_heads: int, n_state: int, depth: int, vocab_size: int = 256) -> int:
    """The guide's published formula ("Parameter Count Formula"), unchanged; `LMConfig.count_params`
    is exact for our models.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1.
    """
    dim, n_heads = require_int("dim", dim), require_int("n_heads", n_heads)
    n_state, depth = require_int("n_state", n_state), require_int("depth", depth)
    vocab_size = require_int("vocab_size", vocab_size)
    d_inner = n_heads * n_state
    embed = vocab_size * dim
    per_layer = dim * 4 * d_inner + d_inner * dim + 2 * dim
    final_norm = 2 * dim
    return embed + depth * per_layer + final_norm


def e88_layer(config: LMConfig) -> E88Config:
    """The layer of a model whose layers are all the same E88 layer.

    Raises:
        TypeError: no LMConfig.
        ValueError: a model of other layers, which the guide does not cover.
    """
    require_instance("config", config, LMConfig)
    layers = set(config.layers)
    layer = config.layers[0]
    if len(layers) > 1 or not isinstance(layer, E88Config):
        kinds = ", ".join(layer.kind for layer in config.layers)
        raise ValueError(
            f"config must be a model of equal e88 layers, which the sizing guide is about, got "
            f"{len(layers)} different ones: {kinds}."
        )
    return layer


def d_inner_of(config: LMConfig) -> int:
    """n_heads * n_state of a model of equal E88 layers.

    Raises:
        TypeError, ValueError: as `e88_layer`.
    """
    layer = e88_layer(config)
    return layer.n_heads * layer.n_state
