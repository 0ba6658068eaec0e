"""What all vision-language models share: images into the embeddings, those through the language model.

`process`, `logits` and `generate` are the plain use. A model built around it (SpaceDrive) calls the steps one
by one, so that it can change the embeddings in between: `visual_features`, `embed`, `decoder` (the language
model), `decoder.logits`.
"""

from __future__ import annotations

import abc
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import (
    ComputeConfig,
    LoraConfig,
    NewTokensConfig,
    SpecialIds,
    VLConfig,
)
from spacedrive_jax.models.family import family_of
from spacedrive_jax.models.image_processor import ProcessorSettings, process_images
from spacedrive_jax.models.language_model import LanguageModel, continue_greedily
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import (
    Grids,
    PromptLayout,
    RopePositions,
    image_grids,
    lay_out,
    plain_sequence_positions,
)


class VisualFeatures(NamedTuple):
    """What a vision tower hands to the language model."""

    tokens: Float[Array, "I V D"]
    """Visual tokens in row-major order, for the embeddings."""
    deepstack: Float[Array, "K I V D"] | None = None
    """What is added at those tokens behind the language model's first K blocks; None without deepstack."""


class VisionLanguageModel(nnx.Module):
    """A vision tower whose tokens stand in a language model's sequence."""

    config: VLConfig
    decoder: LanguageModel
    processor_settings: ProcessorSettings | None = None
    """How the checkpoint's own files prepare images; None for the family's released settings."""
    special_ids: SpecialIds = SpecialIds()
    """What the checkpoint's own files say ends an answer."""

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
            config: architecture.
            compute: dtypes, rematerialisation, attention kernel.
            rngs: random streams (`params`).
            lora: adapters on the language model's projections; None for none.
            new_tokens: ids with trainable rows of their own; None for none.
        """
        self.config = config
        self.draw_vision(compute=compute, rngs=rngs)
        self.decoder = LanguageModel(
            config.decoder, compute=compute, rngs=rngs, lora=lora, new_tokens=new_tokens
        )

    @abc.abstractmethod
    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws what stands before the language model, on the way of construction.

        Args:
            compute: dtypes, rematerialisation, attention kernel.
            rngs: random streams (`params`).
        """

    @abc.abstractmethod
    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens of images that share a patch grid, in the language model's width.

        Args:
            pixel_values: flattened normalised patches, laid out as the family's vision tower says.
            grid: patch rows and columns of every image; static.

        Returns:
            Visual tokens in row-major order.

        Raises:
            ConfigError: the pixels do not fit the grid, or the tower cannot take it.
        """

    def visual_features(self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]) -> VisualFeatures:
        """Visual tokens, and what goes past the embeddings to deeper blocks in families that have it.

        Args:
            pixel_values: as `encode_images` takes them.
            grid: likewise.
        """
        return VisualFeatures(self.encode_images(pixel_values, grid))

    def sequence_positions(
        self, token_ids: Int[np.ndarray, " S"], visual_grids: Sequence[tuple[int, int]]
    ) -> RopePositions:
        """Position ids of one sequence without padding, on the host: 0, 1, 2, … unless the family says more.

        Args:
            token_ids: the sequence, with a placeholder id per visual token.
            visual_grids: rows and columns of each image in visual tokens, in order.

        Returns:
            Positions and the offset for generated tokens.

        Raises:
            ConfigError: the placeholders do not fit the images.
        """
        return plain_sequence_positions(token_ids, visual_grids, self.config.image_token_id)

    def embed(
        self,
        token_ids: Int[Array, "B S"],
        image_features: Float[Array, "B F D"] | None = None,
        image_mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Token embeddings, with visual tokens in the image slots.

        Args:
            token_ids: right-padded ids.
            image_features: each sample's visual tokens, all its images in order; None for text only.
            image_mask: the slots they fill, in order; None takes every image token id.

        Returns:
            Embeddings in the compute dtype. Slots behind the last feature keep their token's embedding.
        """
        embeddings = self.decoder.embed(token_ids)
        if image_features is None:
            return embeddings
        if image_mask is None:
            image_mask = token_ids == self.config.image_token_id
        return place_rows(embeddings, image_features, image_mask)

    def process(
        self, images: Sequence[Image.Image | UInt8[np.ndarray, "_ _ 3"]]
    ) -> tuple[Float[np.ndarray, "P K"], Int[np.ndarray, "N 3"]]:
        """Images as the published processor prepares them, bit for bit, for `logits` and `generate`.

        The settings are those of the checkpoint's preprocessor_config.json where it has one, else the
        family's released ones; tiles are off: one view is one image.

        Args:
            images: N images of any sizes, PIL's (any mode) or arrays, 0..255, RGB.

        Returns:
            `pixel_values`, normalised patches of all images one after the other, float32 (K values a patch),
            and `image_grid_thw`, (1, patch rows, patch columns) of each image.

        Raises:
            DataError: there are no images, or one is neither a PIL image nor such an array.
            ConfigError: the processor cannot take an image of that shape.
        """
        kind = family_of(self.config).image_processor
        return process_images(kind, self.config.vision, images, self.processor_settings)

    def logits(
        self,
        token_ids: Int[np.ndarray, "B S"],
        *,
        pixel_values: Float[Array | np.ndarray, "... K"] | None = None,
        image_grid_thw: Any = None,
        lengths: Int[np.ndarray, " B"] | None = None,
    ) -> Float[Array, "B S vocabulary"]:
        """Scores the next token at every place.

        Args:
            token_ids: right-padded ids on the host, with a placeholder id per visual token.
            pixel_values: normalised patches of all images, sample by sample: (P, K) as `process` gives them,
                or with leading axes such as (B, N, P, K), read in order.
            image_grid_thw: (N, 3), a row (1, patch rows, patch columns) for each image, or one such triple
                for all of them.
            lengths: valid tokens per sample; None when all are.

        Returns:
            Logits, float32.

        Raises:
            ConfigError: ids, images and lengths do not fit each other, or ids are padded on the left.
        """
        token_ids, valid = _on_host(token_ids, lengths, self.config)
        pixel_values = None if pixel_values is None else _array(pixel_values, "pixel_values")
        layout, grids = self.lay_out(token_ids, pixel_values, image_grid_thw, lengths=valid)
        device_lengths = None if lengths is None else jnp.asarray(valid, jnp.int32)
        return _logits(
            *nnx.split(self),
            jnp.asarray(token_ids, jnp.int32),
            pixel_values,
            layout,
            device_lengths,
            grids=grids,
        )

    def generate(
        self,
        token_ids: Int[np.ndarray, "B S"],
        *,
        max_new_tokens: int,
        pixel_values: Float[Array | np.ndarray, "... K"] | None = None,
        image_grid_thw: Any = None,
        lengths: Int[np.ndarray, " B"] | None = None,
        stop_ids: int | Sequence[int] | None = None,
        pad_id: int = 0,
    ) -> Int[np.ndarray, "B T"]:
        """Continues prompts with the most likely token each time.

        Args:
            token_ids: right-padded prompts on the host, with a placeholder id per visual token.
            max_new_tokens: T, tokens to generate per sample at most.
            pixel_values: see `logits`.
            image_grid_thw: likewise.
            lengths: valid tokens per prompt; None when all are.
            stop_ids: id or ids that end a sample (the id itself is kept). None takes those of the
                checkpoint's generation_config.json (`special_ids`); () never stops.
            pad_id: what stands behind the end of a sample that stopped.

        Returns:
            The new ids, without the prompt.

        Raises:
            ConfigError: `max_new_tokens` is not positive, a prompt is empty or padded on the left, images and
                ids do not fit, or the whole would be longer than the rotary angles hold.
        """
        token_ids, valid = _on_host(token_ids, lengths, self.config)
        pixel_values = None if pixel_values is None else _array(pixel_values, "pixel_values")
        stop_ids = self.special_ids.stop_ids if stop_ids is None else stop_ids
        several = stop_ids if isinstance(stop_ids, Iterable) else (stop_ids,)
        stops = tuple(_whole(each, "stop_ids") for each in several)
        max_new_tokens = _whole(max_new_tokens, "max_new_tokens")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.config.decoder.check_length(int(valid.max()) + max_new_tokens, "prompt and answer")
        layout, grids = self.lay_out(token_ids, pixel_values, image_grid_thw, lengths=valid)
        return np.asarray(
            _generate(
                *nnx.split(self),
                jnp.asarray(token_ids, jnp.int32),
                pixel_values,
                layout,
                jnp.asarray(valid, jnp.int32),
                grids=grids,
                max_new_tokens=max_new_tokens,
                stop_ids=stops,
                pad_id=_whole(pad_id, "pad_id"),
            )
        )

    def lay_out(
        self,
        token_ids: Int[np.ndarray, "B S"],
        pixel_values: Float[Array | np.ndarray, "... K"] | None,
        image_grid_thw: Any,
        *,
        lengths: Int[np.ndarray, " B"] | None = None,
    ) -> tuple[PromptLayout, Grids]:
        """Position ids and image slots of a batch, on the host, and the patch grid of each image.

        The arguments are those of `logits`.
        """
        token_ids, valid = _on_host(token_ids, lengths, self.config)
        self.config.decoder.check_length(int(valid.max()), "a sequence")
        grids, merge = image_grids(pixel_values, image_grid_thw), self.config.vision.merge_size
        layout = lay_out(
            token_ids,
            valid,
            tuple((rows // merge, columns // merge) for rows, columns in grids),
            image_token_id=self.config.image_token_id,
            sequence_positions=self.sequence_positions,
        )
        return layout, grids

    def embed_prompt(
        self,
        token_ids: Int[Array, "B S"],
        pixel_values: Float[Array, "... K"] | None,
        layout: PromptLayout,
        grids: Grids,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "depths B S D"] | None]:
        """Embeddings with visual tokens in their slots, and what is added behind the first blocks.

        Args:
            token_ids: right-padded ids.
            pixel_values: as `logits` takes them.
            layout: of `lay_out`.
            grids: likewise; static.
        """
        embeddings = self.decoder.embed(token_ids)
        if not grids:
            return embeddings, None
        assert pixel_values is not None
        features = self._encode(pixel_values.reshape(-1, pixel_values.shape[-1]), grids)
        slots = jnp.asarray(layout.visual_index)
        is_visual, index = slots[..., None] >= 0, jnp.maximum(slots, 0)
        tokens = jnp.take(features.tokens, index, axis=0).astype(embeddings.dtype)
        embeddings = constrain(jnp.where(is_visual, tokens, embeddings), "batch", "sequence", None)
        if features.deepstack is None:
            return embeddings, None
        deeper = jnp.where(is_visual, jnp.take(features.deepstack, index, axis=1), 0)
        return embeddings, constrain(deeper.astype(embeddings.dtype), None, "batch", "sequence", None)

    def _encode(self, patches: Float[Array, "P K"], grids: Grids) -> VisualFeatures:
        """Visual tokens (F, D) of images of any grids one after the other, and their deepstack (K, F, D)."""
        sizes = [rows * columns for rows, columns in grids]
        stops = np.cumsum(sizes)
        tokens: list[Any] = [None] * len(grids)
        deeper: list[Any] = [None] * len(grids)
        for grid in dict.fromkeys(grids):
            # Images of one size go through the tower together.
            own = [number for number, each in enumerate(grids) if each == grid]
            if len(own) == len(grids):
                pixels = patches.reshape(len(grids), sizes[0], -1)
            else:
                pixels = jnp.stack([patches[stops[number] - sizes[number] : stops[number]] for number in own])
            features = self.visual_features(pixels, grid)
            if len(own) == len(grids):
                deepstack = features.deepstack
                return VisualFeatures(
                    _one_after_the_other(features.tokens),
                    None if deepstack is None else _one_after_the_other(deepstack),
                )
            for place, number in enumerate(own):
                tokens[number] = features.tokens[place]
                deeper[number] = None if features.deepstack is None else features.deepstack[:, place]
        return VisualFeatures(
            jnp.concatenate(tokens), None if deeper[0] is None else jnp.concatenate(deeper, axis=1)
        )


def _one_after_the_other(features: Float[Array, "... I V D"]) -> Float[Array, "... F D"]:
    """The tokens of all images on one axis."""
    return features.reshape(*features.shape[:-3], -1, features.shape[-1])


def _on_host(
    token_ids: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, " B"] | None, config: VLConfig
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]:
    """Ids and lengths as arrays, checked."""
    token_ids = np.asarray(_array(token_ids, "token_ids"))
    if token_ids.ndim != 2 or token_ids.dtype.kind not in "iu" or not token_ids.size:
        raise ConfigError(
            f"token_ids {token_ids.shape} {token_ids.dtype} must be whole numbers (samples, length)"
        )
    batch, length = token_ids.shape
    valid = np.full(batch, length) if lengths is None else np.asarray(lengths)
    whole = valid.dtype.kind in "iu" and valid.shape == (batch,)
    if not whole or (valid < 1).any() or (valid > length).any():
        found = valid.tolist() if valid.ndim == 1 else f"of shape {valid.shape} (attention_mask.sum(-1)?)"
        raise ConfigError(f"prompt lengths {found} must be {batch} whole numbers in 1..{length}")
    for row, count in zip(token_ids, valid, strict=True):
        # As transformers' processors pad for generation; one place alone could be a token of the text.
        front, behind = row[: length - count], row[count:]
        if len(front) > 1 and (front == front[0]).all() and not (behind == behind[0]).all():
            raise ConfigError(
                f"token_ids begin with {len(front)} times {front[0]} and do not end with padding: they are "
                "read right-padded (processor.tokenizer.padding_side = 'right')"
            )
    # JAX would take the last row for an id above the table, and count a negative one from its end.
    rows, seen = config.decoder.vocab_size, token_ids[np.arange(length) < valid[:, None]]
    outside = seen[((seen < 0) | (seen >= rows)) & (seen != config.image_token_id)]
    if outside.size:
        raise ConfigError(f"token_ids hold {int(outside[0])}, and the table has rows 0 to {rows - 1}")
    return token_ids, valid


def _array(value: Any, what: str) -> Array | np.ndarray:
    """An array of jax or numpy; lists and tensors of others (on the host) become one of numpy."""
    if isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} are no one array ({str(error)[:160]}): give one of numpy") from error


def _whole(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{what} holds {value!r}, expected whole numbers") from None


@functools.partial(jax.jit, static_argnames=("graph", "grids"))
def _logits(
    graph: nnx.GraphDef,
    state: nnx.State,
    token_ids: Int[Array, "B S"],
    pixel_values: Float[Array, "... K"] | None,
    layout: PromptLayout,
    lengths: Int[Array, " B"] | None,
    *,
    grids: Grids,
) -> Float[Array, "B S vocabulary"]:
    model: VisionLanguageModel = nnx.merge(graph, state)
    embeddings, deepstack = model.embed_prompt(token_ids, pixel_values, layout, grids)
    position_ids = jnp.asarray(layout.position_ids)
    hidden, _ = model.decoder(embeddings, position_ids, lengths=lengths, deepstack=deepstack)
    return model.decoder.logits(hidden)


@functools.partial(jax.jit, static_argnames=("graph", "grids", "max_new_tokens", "stop_ids", "pad_id"))
def _generate(
    graph: nnx.GraphDef,
    state: nnx.State,
    token_ids: Int[Array, "B S"],
    pixel_values: Float[Array, "... K"] | None,
    layout: PromptLayout,
    lengths: Int[Array, " B"],
    *,
    grids: Grids,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Int[Array, "B T"]:
    model: VisionLanguageModel = nnx.merge(graph, state)
    embeddings, deepstack = model.embed_prompt(token_ids, pixel_values, layout, grids)
    return continue_greedily(
        model.decoder,
        embeddings,
        jnp.asarray(layout.position_ids),
        rope_delta=jnp.asarray(layout.rope_delta),
        lengths=lengths,
        deepstack=deepstack,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
    )


def place_rows(
    embeddings: Float[Array, "B S D"], rows: Float[Array, "B F D"], mask: Bool[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Puts each sample's rows, in order, where its mask is set; rows left over are not used."""
    # Of their own samples alone: cut otherwise, as the tower's images are, devices would gather all samples'.
    rows = constrain(rows, "batch", None, None)
    index = jnp.cumsum(mask, axis=1) - 1
    taken = jnp.take_along_axis(rows, jnp.clip(index, 0, rows.shape[1] - 1)[..., None], axis=1)
    filled = mask & (index < rows.shape[1])
    placed = jnp.where(filled[..., None], taken.astype(embeddings.dtype), embeddings)
    return constrain(placed, "batch", "sequence", None)
