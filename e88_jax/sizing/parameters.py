"""How many parameters a model has: by the guide's published formula, and exactly."""

from e88_jax.checks import require_instance, require_int
from e88_jax.config import E88Config, LMConfig


def calc_e88_params(dim: int, n_heads: int, n_state: int, depth: int, vocab_size: int = 256) -> int:
    """The sizing guide's published formula, unchanged; `count_params` is exact for our models.

    Source: E88 Matrix State Model Sizing Guide, "Parameter Count Formula".

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


def count_params(config: LMConfig) -> int:
    """Parameters of `E88LM(config)`, exactly, with every option, without building it.

    For the default layer it is the published formula and, for each layer, `dim * n_heads + 2 *
    n_heads` more (decay projection, A_log and dt_bias) and `dim` less (a norm has one vector, the
    formula counts two), and `dim` less for the final norm: together 0.3 to 0.6 % more at the
    guide's sizes. Without the output gate (`output_gate="none"`) a layer has `dim * d_inner` less,
    a fifth.

    Raises:
        TypeError: no LMConfig.
    """
    require_instance("config", config, LMConfig)
    dim = config.layer.dim
    block = dim + _mixer_params(config.layer)
    if config.channel_mixer_dim is not None:
        block += dim + 3 * dim * config.channel_mixer_dim
    return config.vocab_size * dim + config.depth * block + dim


def _mixer_params(layer: E88Config) -> int:
    """Of `E88Mixer(layer)`."""
    dim, heads, n_value = layer.dim, layer.n_heads, layer.n_value
    keys, values = heads * layer.n_state, heads * n_value
    streams = 2 * keys + (0 if layer.tie_kv else values)
    total = dim * streams
    if layer.conv_size is not None:
        total += layer.conv_size * streams
    total += {
        "mamba": dim * heads + 2 * heads,
        "simple": dim * heads,
        "constant": heads,
        "none": 0,
    }[layer.decay_mode]
    if layer.write_gate:
        total += dim * heads
    if layer.value_residual:
        total += values
    if layer.output_norm:
        total += n_value
    if layer.output_gate != "none":
        total += dim * values
    return (
        total
        + {
            "concat": dim * values,
            "per_head": dim * values,
            "weighted_sum": heads + dim * n_value,
            "input_weighted": dim * heads + dim * n_value,
            "sum": dim * n_value,
        }[layer.head_mix]
    )
