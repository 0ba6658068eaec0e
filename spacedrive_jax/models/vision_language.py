"""What Qwen2.5-VL and LLaVA-1.5 have in common: images into the embeddings, embeddings through the decoder.

`logits` is the plain use. A model built around it (SpaceDrive) calls the steps one by one, so that it can
change the embeddings in between: `encode_images`, `embed`, `decode`, `decoder.logits`.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import ComputeConfig, LoraConfig, NewTokensConfig, VLConfig
from spacedrive_jax.models.language_model import KVCache, LanguageModel
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import RopePositions


class VisionLanguageModel(nnx.Module):
    """A vision tower whose tokens stand in a language decoder's sequence."""

    config: VLConfig
    decoder: LanguageModel

    def __init__(
        self,
        config: VLConfig,
        *,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
        lora: LoraConfig | None = None,
        new_tokens: NewTokensConfig | None = None,
    ) -> None:
        """Draws a fresh model; `from_hf` builds one with published weights.

        Args:
            config: Architecture.
            compute: Dtypes, rematerialisation, attention kernel.
            rngs: Random streams (`params`).
            lora: Adapters on the decoder's attention projections; None for none.
            new_tokens: Ids with trainable rows of their own; None for none.
        """
        self.config = config
        self.draw_vision(compute=compute, rngs=rngs)
        self.decoder = LanguageModel(
            config.decoder, compute=compute, rngs=rngs, lora=lora, new_tokens=new_tokens
        )

    @abc.abstractmethod
    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws what stands before the decoder, on the way of construction.

        Args:
            compute: Dtypes, rematerialisation, attention kernel.
            rngs: Random streams (`params`).
        """

    @abc.abstractmethod
    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens of images that share a patch grid, in the decoder's width.

        Args:
            pixel_values: Flattened normalised patches, laid out as the family's vision tower says.
            grid: Patch rows and columns of every image; static.

        Returns:
            Visual tokens in row-major order.

        Raises:
            ConfigError: If the pixels do not fit the grid, or the tower cannot take it.
        """

    @abc.abstractmethod
    def sequence_positions(
        self, token_ids: Int[np.ndarray, " S"], visual_grids: Sequence[tuple[int, int]]
    ) -> RopePositions:
        """Position ids of one sequence without padding, on the host.

        Args:
            token_ids: The sequence, with a placeholder id per visual token.
            visual_grids: Rows and columns of each image in visual tokens, in order.

        Returns:
            Positions and the offset for generated tokens.

        Raises:
            ConfigError: If the placeholders do not fit the images.
        """

    def embed(
        self,
        token_ids: Int[Array, "B S"],
        image_features: Float[Array, "B F D"] | None = None,
        image_mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Token embeddings, with visual tokens in the image slots.

        Args:
            token_ids: Right-padded ids.
            image_features: Each sample's visual tokens, all its images in order; None for text only.
            image_mask: The slots they fill, in order; None takes every image token id.

        Returns:
            Embeddings in the compute dtype. Slots behind the last feature keep their token's embedding.
        """
        embeddings = self.decoder.embed(token_ids)
        if image_features is None:
            return embeddings
        if image_mask is None:
            image_mask = token_ids == self.config.image_token_id
        return place_rows(embeddings, image_features, image_mask)

    def decode(
        self,
        embeddings: Float[Array, "B S D"],
        position_ids: Int[Array, "3 B S"],
        *,
        lengths: Int[Array, " B"] | None = None,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Final-normed hidden states and the grown cache; see `Decoder`."""
        return self.decoder(embeddings, position_ids, lengths=lengths, cache=cache, dropout_key=dropout_key)

    def prefill(
        self,
        embeddings: Float[Array, "B S D"],
        position_ids: Int[Array, "3 B S"],
        *,
        lengths: Int[Array, " B"] | None = None,
        room: int,
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Final-normed hidden states and a new cache with room for more; see `Decoder.prefill`."""
        return self.decoder.prefill(embeddings, position_ids, lengths=lengths, room=room)

    def logits(
        self,
        token_ids: Int[np.ndarray, "B S"],
        *,
        images: Float[Array, "B N P C"] | None = None,
        image_grid: tuple[int, int] | None = None,
        lengths: Int[np.ndarray, " B"] | None = None,
    ) -> Float[Array, "B S vocabulary"]:
        """Scores the next token at every place.

        Args:
            token_ids: Right-padded ids on the host, with a placeholder id per visual token.
            images: Flattened patches of each sample's N images; see `encode_images`.
            image_grid: Patch rows and columns of every image.
            lengths: Valid tokens per sample; None when all are.

        Returns:
            Logits, float32.

        Raises:
            ConfigError: If the placeholders do not fit the images.
        """
        images_per_sample = 0 if images is None else images.shape[1]
        position_ids, _ = self.position_ids(token_ids, images_per_sample, image_grid, lengths=lengths)
        device_lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        return _logits(
            *nnx.split(self),
            jnp.asarray(token_ids, jnp.int32),
            images,
            jnp.asarray(position_ids),
            device_lengths,
            image_grid=image_grid,
        )

    def encode_image_batch(
        self, images: Float[Array, "B N P C"], grid: tuple[int, int] | None
    ) -> Float[Array, "B F D"]:
        """Visual tokens of all images of each sample in one row (F = N * V).

        Raises:
            ConfigError: If no grid is given.
        """
        if grid is None:
            raise ConfigError("image_grid (patch rows, patch columns) is needed with images")
        features = self.encode_images(images.reshape(-1, *images.shape[2:]), grid)
        return features.reshape(images.shape[0], -1, features.shape[-1])

    def position_ids(
        self,
        token_ids: Int[np.ndarray, "B S"],
        images_per_sample: int,
        image_grid: tuple[int, int] | None,
        *,
        lengths: Int[np.ndarray, " B"] | None = None,
    ) -> tuple[Int[np.ndarray, "3 B S"], Int[np.ndarray, " B"]]:
        """Position ids of a batch in which every image token id is a visual token.

        Args:
            token_ids: Right-padded ids on the host.
            images_per_sample: Images in each sample.
            image_grid: Patch rows and columns of every image; None when there are none.
            lengths: Valid tokens per sample; None when all are.

        Returns:
            Positions (zero in the padding) and each sample's offset for generated tokens.

        Raises:
            ConfigError: If the placeholders do not fit the images.
        """
        token_ids = np.asarray(token_ids)
        batch, length = token_ids.shape
        valid = np.full(batch, length) if lengths is None else np.asarray(lengths)
        merge = self.config.vision.merge_size
        grids = [] if image_grid is None else [(image_grid[0] // merge, image_grid[1] // merge)]
        position_ids = np.zeros((3, batch, length), np.int32)
        deltas = np.zeros(batch, np.int32)
        for row, count in enumerate(valid):
            position_ids[:, row, :count], deltas[row] = self.sequence_positions(
                token_ids[row, :count], grids * images_per_sample
            )
        return position_ids, deltas


@functools.partial(jax.jit, static_argnames=("graph", "image_grid"))
def _logits(
    graph: nnx.GraphDef,
    state: nnx.State,
    token_ids: Int[Array, "B S"],
    images: Float[Array, "B N P C"] | None,
    position_ids: Int[Array, "3 B S"],
    lengths: Int[Array, " B"] | None,
    *,
    image_grid: tuple[int, int] | None,
) -> Float[Array, "B S vocabulary"]:
    model: VisionLanguageModel = nnx.merge(graph, state)
    features = None if images is None else model.encode_image_batch(images, image_grid)
    hidden, _ = model.decode(model.embed(token_ids, features), position_ids, lengths=lengths)
    return model.decoder.logits(hidden)


def place_rows(
    embeddings: Float[Array, "B S D"], rows: Float[Array, "B F D"], mask: Bool[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Puts each sample's rows, in order, where its mask is set; rows left over are not used."""
    index = jnp.cumsum(mask, axis=1) - 1
    taken = jnp.take_along_axis(rows, jnp.clip(index, 0, rows.shape[1] - 1)[..., None], axis=1)
    filled = mask & (index < rows.shape[1])
    placed = jnp.where(filled[..., None], taken.astype(embeddings.dtype), embeddings)
    return constrain(placed, "batch", "sequence", None)
