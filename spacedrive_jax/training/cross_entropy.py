"""Cross-entropy over a large vocabulary: only where there are labels, in chunks, the vocabulary sharded."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spacedrive_jax.vlm.logical_axes import constrain

CHUNK = 128
"""Places per sample whose logits are in memory at once (152k ids: 78 MB of float32 a sample)."""


def label_cross_entropy(
    logits_of: Callable[[Float[Array, "B m D"]], Float[Array, "B m vocabulary"]],
    hidden: Float[Array, "B M D"],
    target_ids: Int[Array, "B M"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, "B M"]:
    """Cross-entropy of every labelled place.

    The logits of a chunk are computed again in the backward pass instead of being kept. The label's logit is
    picked by comparison, not by index, so that nothing has to be gathered where the vocabulary is sharded.

    Args:
        logits_of: the language-model head.
        hidden: final-normed hidden states of the places that predict a label.
        target_ids: the labels.
        chunk: places per sample at once.
    """

    def entropy(hidden: Float[Array, "B m D"], ids: Int[Array, "B m"]) -> Float[Array, "B m"]:
        logits = constrain(logits_of(hidden), "batch", None, "vocab")
        is_label = jnp.arange(logits.shape[-1]) == ids[..., None]
        label = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - label

    count = target_ids.shape[1]
    if count <= chunk:
        return entropy(hidden, target_ids)
    # Filled up to whole chunks; what comes of the filling is cut off.
    pad = -count % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    ids = jnp.pad(target_ids, ((0, 0), (0, pad)))

    def chunks(values: Array) -> Array:
        return jnp.moveaxis(values.reshape(values.shape[0], -1, chunk, *values.shape[2:]), 1, 0)

    step = jax.checkpoint(entropy, prevent_cse=False)
    _, pieces = jax.lax.scan(lambda _, piece: (None, step(*piece)), None, (chunks(hidden), chunks(ids)))
    return jnp.moveaxis(pieces, 0, 1).reshape(target_ids.shape[0], -1)[:, :count]
