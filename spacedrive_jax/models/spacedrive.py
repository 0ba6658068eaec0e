"""SpaceDrive (arXiv 2512.10719): a vision-language model in which every 3D position has one encoding.

Read this page beside section 3 of the paper: patch depth is unprojected to 3D points (3.1); one coordinate
encoder phi turns points into embeddings that are added to the visual tokens and stand for the ego vehicle's
past (3.2); the hidden state at an indicator token is regressed to metres by the decoder psi (3.3).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.bounds import require_kind
from spacedrive_jax.constants import NUM_TARGET_POINTS, NUM_WAYPOINTS, STATUS_SIZE
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import NewTokensConfig
from spacedrive_jax.models.coordinate_decoder import (
    GridDecoder,
    VaeDecoder,
    make_decoder,
)
from spacedrive_jax.models.coordinate_encoder import (
    CoordinateEncoder,
    EgoStatusEncoder,
    closeness_along_route,
    rotate_features,
)
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.image_processor import normalise
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.models.unprojection import ego_to_image, patch_centres, unproject
from spacedrive_jax.models.vision_language import VisionLanguageModel, VisualFeatures, place_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What one pass over a batch gives."""

    hidden: Float[Array, "B S D"]
    """Final-normed hidden states."""
    at_indicators: Float[Array, "B C D"]
    """What the coordinate decoder reads: the hidden states of the coordinates asked for."""
    coordinates: Float[Array, "B C 3"]
    """Decoded there, metres, ego frame; the six waypoints unless other places were asked for."""


class SpaceDrive(nnx.Module):
    """The model: VLM with adapters, coordinate encoder phi, coordinate decoder psi, ego status encoder."""

    def __init__(self, config: ModelConfig, *, indicator_id: int, rngs: nnx.Rngs) -> None:
        """Draws a fresh model.

        Args:
            config: architecture and options.
            indicator_id: vocabulary id of the indicator token; the position token's id is the next one.
            rngs: random streams (`params`).

        Raises:
            ConfigError: it is no model's config, or its vocabulary has no such ids.
        """
        require_kind(config, ModelConfig, "SpaceDrive takes a ModelConfig (a run's config.model)")
        if not 0 <= indicator_id < config.vlm.decoder.vocab_size - 1:
            raise ConfigError(
                f"indicator_id {indicator_id} and the position token's behind it are not in the vocabulary "
                f"of {config.vlm.decoder.vocab_size} ids: load_tokenizer(config.data.tokenizer).indicator "
                "is a run's"
            )
        self.config = config
        self.indicator_id, self.position_id = indicator_id, indicator_id + 1
        self.vlm: VisionLanguageModel = family_of(config.vlm).model(
            config.vlm,
            compute=config.compute,
            rngs=rngs,
            lora=config.lora if config.use_lora else None,
            new_tokens=new_token_rows(config, indicator_id),
        )
        width = config.vlm.decoder.hidden_size
        self.encoder = CoordinateEncoder(config.encoder, width, rngs=rngs)
        self.decoder = make_decoder(config.decoder, width, NUM_WAYPOINTS, rngs=rngs)
        has_feature = config.ego_status in ("feature", "both")
        self.ego_encoder = (
            EgoStatusEncoder(
                STATUS_SIZE,
                width,
                units=config.ego_units,
                target_points=config.target_points_in_status,
                strips=config.strips_in_status,
                rngs=rngs,
            )
            if has_feature
            else None
        )

    def __call__(
        self,
        batch: DrivingBatch,
        *,
        dropout_key: jax.Array | None = None,
        indices: Int[Array, "B C"] | None = None,
        true_coordinates: Float[Array, "B C 2"] | None = None,
        noise: Float[Array, "B C Z"] | None = None,
    ) -> Outputs:
        """Runs prompt and answer at once (teacher forcing).

        Args:
            batch: a batch with answers.
            dropout_key: key of the adapters' dropout; None switches it off.
            indices: indicators to decode at; None takes the six waypoints'.
            true_coordinates: the true coordinates there, which the `vae` decoder sees in training.
            noise: standard normal for the `vae` decoder; None decodes without.

        Raises:
            ConfigError: the batch is none, or its views are not of the model's shapes.
        """
        embeddings, deepstack = self.decoder_inputs(batch)
        hidden, _ = self.vlm.decoder(
            embeddings,
            jnp.swapaxes(batch.position_ids, 0, 1),
            lengths=batch.lengths,
            deepstack=deepstack,
            dropout_key=dropout_key,
        )
        indices = batch.waypoint_indices if indices is None else indices
        at_indicators = jnp.take_along_axis(hidden, jnp.asarray(indices)[..., None], axis=1)
        at_indicators = self.without_semantics(at_indicators)
        return Outputs(hidden, at_indicators, self.decode_coordinates(at_indicators, true_coordinates, noise))

    def decode_coordinates(
        self,
        at_indicators: Float[Array, "... D"],
        true_coordinates: Float[Array, "... 2"] | None = None,
        noise: Float[Array, "... Z"] | None = None,
    ) -> Float[Array, "... 3"]:
        """psi: hidden states at indicators to metres, ego frame.

        With `decoder.whole_trajectory` only the first state of the second-last axis is read, and its T
        points stand on that axis.

        Args:
            at_indicators: final-normed hidden states.
            true_coordinates: see `VaeDecoder`.
            noise: see `VaeDecoder`.
        """
        if isinstance(self.decoder, GridDecoder):
            return self.decoder(at_indicators, self.encoder)
        if isinstance(self.decoder, VaeDecoder):
            return self.decoder(at_indicators, true_coordinates=true_coordinates, noise=noise)
        if self.config.decoder.whole_trajectory:
            return self.decoder(at_indicators[..., 0, :])
        return self.decoder(at_indicators)

    def without_semantics(self, at_indicators: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Takes the position token's embedding from hidden states, where `semantic_position` is on."""
        if not self.config.semantic_position:
            return at_indicators
        # As published: the row of the frozen table, not the trained one.
        row = self.vlm.decoder.embedding[...][self.position_id]
        return at_indicators - jax.lax.broadcast_to_rank(row, at_indicators.ndim)

    def embed_coordinates(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """What position input feeds at a coordinate's position token."""
        encoded = self.encoder(points)
        if not self.config.semantic_position:
            return encoded
        row = self.vlm.embed(jnp.asarray([[self.position_id]]))[0, 0].astype(encoded.dtype)
        return encoded + jax.lax.broadcast_to_rank(row, encoded.ndim)

    def decoder_inputs(
        self, batch: DrivingBatch
    ) -> tuple[Float[Array, "B S D"], Float[Array, "depths B S D"] | None]:
        """What the language model reads: embeddings, and what the vision tower adds behind the first K blocks
        at the visual tokens (None in families without deepstack).
        """
        _check_batch(batch)
        visual = self.visual_features(batch)
        embeddings = self.embeddings(batch, visual.tokens)
        if visual.deepstack is None:
            return embeddings, None
        is_image = batch.token_type_ids == TokenType.IMAGE
        nothing = jnp.zeros_like(embeddings)
        return embeddings, jnp.stack([place_rows(nothing, rows, is_image) for rows in visual.deepstack])

    def embeddings(
        self, batch: DrivingBatch, visual_tokens: Float[Array, "B NV D"] | None = None
    ) -> Float[Array, "B S D"]:
        """Token embeddings with everything spatial in its place.

        Args:
            batch: a batch.
            visual_tokens: those of its images, where they are known already.
        """
        config = self.config
        embeddings = self.vlm.embed(batch.token_ids)
        if visual_tokens is None:
            visual_tokens = self.visual_features(batch).tokens
        embeddings = place_rows(embeddings, visual_tokens, batch.token_type_ids == TokenType.IMAGE)
        if self.ego_encoder is not None:
            target_points = self._target_points(batch) if config.target_points_in_status else None
            closeness = None
            if target_points is not None and config.strips_in_status:
                patch_points = self.patch_points(batch)
                closeness = closeness_along_route(patch_points, target_points, config.strips_in_status)
            feature = self.ego_encoder(batch.ego_status, target_points, closeness)[:, None]
            embeddings = place_rows(embeddings, feature, batch.token_type_ids == TokenType.EGO_FEATURE)
        if config.ego_status in ("positions", "both"):
            past = self.encoder.past(batch.past_positions)
            embeddings = place_rows(embeddings, past, batch.token_type_ids == TokenType.EGO_POSITION)
        coordinates = self.embed_coordinates(batch.coordinates)
        is_target_point = batch.token_type_ids == TokenType.TARGET_POINT
        if config.position_input:
            is_coordinate = is_target_point | (batch.token_type_ids == TokenType.COORDINATE)
            fed = jnp.zeros_like(coordinates) if config.position_input_training == "zeros" else coordinates
            embeddings = place_rows(embeddings, fed, is_coordinate)
        # What is asked about is known, whatever is fed of the answer: a sample's target points are its first
        # rows.
        return place_rows(embeddings, coordinates, is_target_point)

    def _target_points(self, batch: DrivingBatch) -> Float[Array, "B points 3"]:
        """The target points that a sample's question names, zeros where it names none: then its first
        coordinates are something else, the answer's among it.
        """
        named = jnp.any(batch.token_type_ids == TokenType.TARGET_POINT, axis=1)
        return jnp.where(named[:, None, None], batch.coordinates[:, :NUM_TARGET_POINTS], 0.0)

    def visual_features(self, batch: DrivingBatch) -> VisualFeatures:
        """Visual tokens that know where they are, (B, NV, D): h + alpha * phi(point), order camera, row,
        column; `visual_positions` names the alternatives. Deepstack, (K, B, NV, D), stays as the tower has
        it: the tokens that it is added to know their places.
        """
        samples, cameras, rows, columns = batch.patch_depth.shape
        merge = self.config.vlm.vision.merge_size
        patches = batch.pixel_values.reshape(samples * cameras, *batch.pixel_values.shape[2:])
        if patches.dtype == jnp.uint8:
            vlm = self.config.vlm
            processor = family_of(vlm).image_processor(vlm.vision, patches.shape[1:3])
            patches = normalise(processor.view_patches(patches), processor.mean, processor.std)
        features, deepstack = self.vlm.visual_features(patches, (rows * merge, columns * merge))
        features = features.reshape(samples, cameras * rows * columns, -1)
        if deepstack is not None:
            deepstack = deepstack.reshape(len(deepstack), *features.shape)
        if self.config.visual_positions == "none":
            return VisualFeatures(features, deepstack)
        points = self.patch_points(batch)
        if self.config.visual_positions == "rotate":
            return VisualFeatures(rotate_features(features, points), deepstack)
        return VisualFeatures(features + self.encoder(points).astype(features.dtype), deepstack)

    def patch_points(self, batch: DrivingBatch) -> Float[Array, "B NV 3"]:
        """3D points of the visual tokens, ego frame, metres."""
        samples, _, rows, columns = batch.patch_depth.shape
        vision = self.config.vlm.vision
        centres = jnp.asarray(patch_centres((rows, columns), vision.patch_size * vision.merge_size))
        projection = ego_to_image(batch.intrinsics, batch.camera_to_ego)
        return unproject(batch.patch_depth, centres, projection).reshape(samples, -1, 3)


def _check_batch(batch: DrivingBatch) -> None:
    """Refuses what is no batch before arrays of other shapes are reshaped into something else."""
    require_kind(batch, DrivingBatch, "SpaceDrive reads a DrivingBatch (fake_batch(config))")
    shapes = {name: jnp.shape(getattr(batch, name)) for name in ("token_ids", "pixel_values", "patch_depth")}
    if len(shapes["token_ids"]) != 2:
        raise ConfigError(
            f"token_ids of shape {shapes['token_ids']} have no leading axis of samples: "
            "spacedrive_jax.batch.stack([sample]) makes a batch of one"
        )
    samples, views = shapes["token_ids"][0], shapes["pixel_values"]
    is_bytes = batch.pixel_values.dtype == jnp.uint8
    if len(views) != (5 if is_bytes else 4) or (is_bytes and views[-1] != 3):
        raise ConfigError(
            f"pixel_values of shape {views} are neither views in bytes, (B, N, H, W, 3), nor patches in "
            "floats, (B, N, P, K)"
        )
    if samples == 0 or views[:2] != shapes["patch_depth"][:2] or views[0] != samples:
        raise ConfigError(
            f"pixel_values of shape {views} and patch_depth of shape {shapes['patch_depth']} are not of the "
            f"same cameras of {samples} samples"
        )


def new_token_rows(config: ModelConfig, indicator_id: int) -> NewTokensConfig | None:
    """The two new tokens' own rows, where the config trains any."""
    if not (config.use_lora and config.new_token_rows):
        return None
    return NewTokensConfig(first_id=indicator_id)
