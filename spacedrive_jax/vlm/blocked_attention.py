"""Attention for CPUs: a block of one head's queries at a time, so that its scores stay in the cache.

Written out whole, the scores of a 644x644 image's 2117 tokens take 18 MB a head, and moving them costs
several times the arithmetic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 256
"""Queries whose scores are held at once: 2 MB in float32 for 2117 keys."""


def blocked_attention(
    q: Float[Array, "B S heads H"], k: Float[Array, "B K kv_heads H"], v: Float[Array, "B K kv_heads H"]
) -> Float[Array, "B S heads H"]:
    """Softmax attention of every query to every key, with grouped queries, scaled by 1 / sqrt(H).

    Scores and sums are float32. The backward pass computes a block's scores again.
    """
    rows, length, heads, channels = q.shape
    groups = heads // k.shape[2]
    blocks = -(-length // BLOCK)
    padded = jnp.pad(q, ((0, 0), (0, blocks * BLOCK - length), (0, 0), (0, 0)))
    queries = jnp.swapaxes(padded, 1, 2).reshape(rows * heads * blocks, BLOCK, channels)
    keys, values = (jnp.swapaxes(each, 1, 2).reshape(-1, *each.shape[1::2]) for each in (k, v))

    @jax.checkpoint
    def one(block: Float[Array, "Q H"], head: Array) -> Float[Array, "Q H"]:
        scores = jnp.matmul(block, keys[head].T, preferred_element_type=jnp.float32) * channels**-0.5
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        mixed = jnp.matmul(weights.astype(v.dtype), values[head], preferred_element_type=jnp.float32)
        return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)

    key_heads = jnp.arange(rows * heads * blocks) // (blocks * groups)
    out = jax.lax.map(lambda inputs: one(*inputs), (queries, key_heads))
    whole = out.reshape(rows, heads, blocks * BLOCK, channels)[:, :, :length]
    return jnp.swapaxes(whole, 1, 2)
