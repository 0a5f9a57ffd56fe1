"""Draws tokens from logits: temperature, top k, top p."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from e88_jax.meshes import with_automatic_axes

NOT_FINITE = -2
"""In place of a token whose logits are not finite; `ENDED` follows."""

_MASS_ROUNDING = 1e-6
"""Rounding of a float32 sum of probabilities, by which a set may fall short of `top_p`."""


def filter_logits(
    logits: Array, temperature: Array, top_k: int | None, top_p: Array | None
) -> Array:
    """Logits `[B, vocab]` of the distribution to sample from; -inf where a filter excludes.

    top_k keeps the k likeliest tokens; top_p keeps of these the smallest set of likeliest tokens
    that holds at least that probability (nucleus sampling: `docs/references.md`), to within 1e-6.
    Among equal logits lower ids count as likelier. The likeliest token always stays.
    """
    temperature = jnp.asarray(temperature, logits.dtype)
    # Not the first of the top k: for a slice of these XLA sorts the whole vocabulary.
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    scaled = (logits - likeliest) / temperature
    if top_k is None and top_p is None:
        return scaled
    vocab_size = logits.shape[-1]
    n_candidates = vocab_size if top_k is None else min(top_k, vocab_size)
    logits = jnp.where(logits == 0, 0, logits)  # a sort would put -0.0 behind 0.0
    descending, ids = lax.top_k(logits, n_candidates)  # of equal ones the lowest ids first
    kept = jnp.ones_like(ids, bool)
    if top_p is not None:
        probabilities = jax.nn.softmax((descending - likeliest) / temperature, axis=-1)
        mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        is_first = jnp.arange(n_candidates, dtype=jnp.int32)[None, :] == 0
        # At 1 rounding must not cut the tail off.
        kept = is_first | (mass_before < top_p - _MASS_ROUNDING) | (top_p >= 1)
    last = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    last_id = jnp.max(jnp.where(kept & (descending == last), ids, 0), axis=-1, keepdims=True)
    its_id = jnp.arange(vocab_size, dtype=jnp.int32)[None, :]
    return jnp.where((logits > last) | ((logits == last) & (its_id <= last_id)), scaled, -jnp.inf)


def draw(
    logits: Array,
    key: Array,
    temperature: Array,
    top_p: Array | None,
    *,
    top_k: int | None,
    greedy: bool,
) -> Array:
    """One token for each row of logits `[B, vocab]`: `[B]` int32, or `NOT_FINITE`.

    Row b draws with `jax.random.fold_in(key, b)`, so that the other rows do not change its token.
    """

    def of_rows(logits: Array, key: Array, temperature: Array, top_p: Array | None) -> Array:
        if greedy:
            drawn = jnp.argmax(logits, axis=-1)
        else:
            filtered = filter_logits(logits, temperature, top_k, top_p)
            rows = jnp.arange(logits.shape[0], dtype=jnp.uint32)
            row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
            drawn = jax.vmap(jax.random.categorical)(row_keys, filtered)
        finite = jnp.all(jnp.isfinite(logits), axis=-1)
        return jnp.where(finite, drawn.astype(jnp.int32), NOT_FINITE)

    arguments = logits, key, temperature, top_p
    return with_automatic_axes(of_rows, arguments, ("b", "", "", ""), results="b")
