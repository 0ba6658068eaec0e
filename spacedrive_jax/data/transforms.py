"""What a run reads, and how one record becomes one fixed-shape sample.

A sample is prompt, images, geometry, ego status and targets.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.bounds import COUNT, FROM_ZERO, SIDE, Bounds, check_bounds
from spacedrive_jax.constants import NUM_CAMERAS, NUM_PAST, NUM_WAYPOINTS
from spacedrive_jax.data.conversation import (
    Conversation,
    ConversationConfig,
    is_planned,
    question_coordinates,
    question_turn,
    training_conversation,
)
from spacedrive_jax.data.depth_cache import CachedDepth, DepthCache
from spacedrive_jax.data.depth_sources import DepthConfig, Pixels, open_depth_cache, record_patch_depth
from spacedrive_jax.data.ego_status import EgoFault, ego_status, insert_ego_tokens, with_ego_fault
from spacedrive_jax.data.images import CameraFault, ViewProcessor, check_kept_size, scaled_intrinsics
from spacedrive_jax.data.prompts import CommandSource
from spacedrive_jax.data.records import Records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.tokenizer import INDICATOR, POSITION, DrivingTokenizer, load_tokenizer
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.models.config import VLConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.family import IGNORE, ChatTokens, Family
from spacedrive_jax.models.positions import ImageSpan
from spacedrive_jax.models.spacedrive_config import EgoStatusInput, ModelConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """From records to batches."""

    records: str = "data/records"
    """Folder written by `python -m data_prep convert`; or several with their shares of the samples,
    `A:0.7,B:0.3`."""
    tokenizer: str | None = None
    """tokenizer.json or its folder; None takes the project's small one."""
    image_size: tuple[int, int] = (640, 640)
    """Height and width each view is resized to before the image processor."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """The published pipeline hands BGR to everything (fidelity Q26); use `bgr` with its weights."""
    cameras: CameraFault = CameraFault()
    """Bad conditions for the cameras, made on purpose; none by default."""
    command: CommandSource = "navigation"
    target_points: bool = False
    """Name the record's target points, the next two nodes of the route, in the question, as coordinate tokens
    (closed loop); they count towards `max_coordinates`."""
    depth: DepthConfig = DepthConfig()
    ego_fault: EgoFault = "none"
    """Tell the model nothing of its speed and past (`zero`), or what was so a keyframe ago (`late`)."""
    sequence_length: int = 3456
    """S; a longer conversation is an error, not a cut."""
    max_targets: int = 64
    """M; supervised tokens per sample."""
    max_coordinates: int = 6
    """C; coordinates per conversation, the six waypoints, the path points and those of the questions."""
    conversation: ConversationConfig = ConversationConfig()
    drop_without_future: bool = False
    """Leave keyframes without all six future poses out of training (they have no loss)."""
    cache_in_memory: bool = False
    """Keep prepared samples in host memory: for data sets that fit."""
    read_threads: int = 8
    """Samples made at a time, by every worker process where there are some."""
    prefetch_batches: int = 8
    """Batches made ahead; no fewer than `read_threads`, or some of those would have nothing to do."""
    worker_processes: int = 0
    """Processes that make samples, for hosts with more processors than threads of one Python keep busy;
    0 for threads alone. Batches and their order are the same."""

    BOUNDS: ClassVar[Bounds] = {
        "image_size": SIDE,
        "sequence_length": COUNT,
        "max_targets": COUNT,
        "max_coordinates": COUNT,
        "read_threads": COUNT,
        "worker_processes": FROM_ZERO,
        "prefetch_batches": COUNT,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "data")

    @property
    def pixels(self) -> Pixels:
        """What networks see of a view."""
        return Pixels(self.image_size, self.channel_order)


def add_depth_flags(data: DataConfig, vlm: VLConfig) -> str:
    """The flags of the `add-depth` that makes the depth of a run: pixels, grid of visual tokens, pooling.

    Args:
        data: of the run.
        vlm: its vision-language model.
    """
    height, width = data.image_size
    rows, columns = family_of(vlm).image_processor(vlm.vision, data.image_size).token_grid
    return (
        f"--image-size {width}x{height} --channel-order {data.channel_order} --grid {rows}x{columns} "
        f"--pooling {data.depth.pooling}"
    )


class SampleBuilder:
    """Builds samples; deterministic, so that a sample can be cached or rebuilt at will."""

    def __init__(self, data: DataConfig, model: ModelConfig, *, answer: bool = True) -> None:
        """Prepares the tokenizer and the image processor.

        Args:
            data: what to read and how.
            model: which ego tokens to lay out, and the vision tower's patch sizes.
            answer: with the answer (training) or ending in the assistant's header (prediction).

        Raises:
            ConfigError: sequences would be longer than the model's rotary angles hold.
        """
        model.vlm.decoder.check_length(data.sequence_length, "data.sequence_length")
        if model.target_points_in_status and not data.target_points:
            raise ConfigError(
                "model.target_points_in_status reads what data.target_points names: set it True"
            )
        self.data = data
        self.model = model
        self.answer = answer
        self.family = family_of(model.vlm)
        self.tokenizer: DrivingTokenizer = load_tokenizer(data.tokenizer, self.family.chat)
        self.images = ViewProcessor(
            self.family.image_processor(model.vlm.vision, data.image_size), channel_order=data.channel_order
        )
        check_vocabulary(self.tokenizer, model)
        if self.thinks and model.decoder.whole_trajectory:
            raise ConfigError(
                "data.conversation.tasks think_before_planning needs a token per waypoint: its words hold "
                "coordinates too; set model.decoder.whole_trajectory False"
            )
        self._markers = [
            self.tokenizer.decode([number])
            for name, number in self.tokenizer.special.items()
            if name != "image"
        ]

    @property
    def thinks(self) -> bool:
        """Answers reason in words before the trajectory."""
        return self.data.conversation.tasks == "think_before_planning"

    def __call__(self, record: Record, index: int, cached: CachedDepth | None = None) -> DrivingBatch:
        """One sample, numpy arrays without a batch axis.

        Args:
            record: a keyframe.
            index: the sample's.
            cached: a network's depth of the keyframe, where a source of `data.depth` is a network's.

        Raises:
            SpaceDriveError: the record lacks an image or depth, or the conversation does not fit the config's
                fixed shapes.
        """
        return self.sample(record, self.conversation(record), index, cached)

    def open_depth(self, records: Records, *, advice: str = "") -> DepthCache | None:
        """A network's depth of these records, where a source of `data.depth` is a network's.

        Args:
            records: a records folder.
            advice: flags of the `add-depth` that the run needs, for an error.

        Raises:
            SpaceDriveError: it is not there, or is not what the run would see; or the views of the records
                are kept at another size than the run's.
        """
        if records.view_size is not None:
            check_kept_size(records.view_size, self.data.image_size, str(records.directory))
        if self.model.visual_positions == "none":
            return None  # no visual token knows where it is: depth is not read
        data = self.data
        return open_depth_cache(records, data.depth, self.images.token_grid, data.pixels, advice=advice)

    def conversation(self, record: Record) -> Conversation:
        """What is said about a record; without the answers where the builder makes prompts."""
        data, in_words = self.data, self.model.ego_status == "language"
        record = with_ego_fault(record, data.ego_fault)
        if not self.answer:
            question = question_turn(
                record,
                data.command,
                ego_in_words=in_words,
                target_points=data.target_points,
                reasons=self.thinks,
            )
            coordinates = question_coordinates(record, target_points=data.target_points)
            return Conversation([question], coordinates, len(coordinates))
        return training_conversation(
            record,
            data.conversation,
            data.command,
            coordinate_tokens=self._coordinate_tokens(),
            path_points=self.model.path_points,
            ego_in_words=in_words,
            target_points=data.target_points,
        )

    def chat(self, talk: Conversation) -> ChatTokens:
        """A conversation's tokens and labels, the visual tokens in it, the ego tokens not yet.

        Raises:
            DataError: a text spells special tokens out.
        """
        rows, columns = self.images.token_grid
        chat = self.family.chat.apply_chat_template(
            self.tokenizer,
            talk.turns,
            rows * columns,
            add_generation_prompt=not self.answer,
            supervise_positions=self.data.conversation.supervise_position_tokens,
        )
        self._check_texts(talk, chat, rows * columns)
        return chat

    def sample(
        self, record: Record, talk: Conversation, index: int, cached: CachedDepth | None = None
    ) -> DrivingBatch:
        """One sample with a conversation of the caller's; the rest as when called.

        Raises:
            SpaceDriveError: as when called.
        """
        data, grid = self.data, self.images.token_grid
        status = ego_status(with_ego_fault(record, data.ego_fault), data.command)
        try:
            fields = token_fields(
                self.family,
                self.tokenizer,
                self.chat(talk),
                grid,
                self.model.ego_status,
                sequence_length=data.sequence_length,
                max_targets=data.max_targets,
                path_points=self.model.path_points,
                num_target_points=talk.num_target_points,
                reason_coordinates=talk.reason_coordinates,
            )
            coordinates = padded_coordinates(talk.coordinates, data.max_coordinates)
        except SpaceDriveError as error:
            raise type(error)(f"keyframe {record['token']}: {error}") from error
        # Without a planning turn the answers' first coordinates, if any, are not waypoints.
        planned = is_planned(record, data.conversation.tasks)
        fields["waypoint_mask"] &= planned
        waypoints = np.where(planned, record["waypoints"], 0).astype(np.float32)
        if self.model.path_points:
            count = self.model.path_points
            fields["path"] = np.where(planned, record["path"][:count], 0).astype(np.float32)
            fields["path_mask"] = record["path_mask"][:count] & planned & fields["waypoint_mask"].all()
        if self.model.visual_positions == "none":
            # No visual token knows where it is: depth is not read, and records need none.
            patch_depth = np.zeros((NUM_CAMERAS, *grid), np.float32)
        else:
            patch_depth, _ = record_patch_depth(record, grid, data.depth, cached)
        return DrivingBatch(
            **fields,
            pixel_values=data.cameras.views(self.images(record)),
            patch_depth=patch_depth,
            intrinsics=scaled_intrinsics(record, self.images.intrinsics_size).astype(np.float32),
            camera_to_ego=data.cameras.camera_to_ego(record["camera_to_ego"]).astype(np.float32),
            ego_status=status.status,
            past_positions=status.past_positions,
            coordinates=coordinates,
            waypoints=waypoints,
            index=np.int32(index),
        )

    def _check_texts(self, talk: Conversation, chat: ChatTokens, tokens_per_image: int) -> None:
        """Refuses texts that spell special tokens out: a tokenizer takes them for turns, images, coordinates.

        Raises:
            DataError: naming the text.
        """
        for turn in talk.turns:
            for marker in self._markers:
                if marker in turn.content:
                    raise DataError(
                        f"the {turn.role}'s text {turn.content[-60:]!r} spells {marker} out, which ends or "
                        "begins a turn: take it out of the language data"
                    )
        ids, tokenizer = chat.token_ids, self.tokenizer
        images, positions = ids.count(tokenizer.image), ids.count(tokenizer.position)
        if images != NUM_CAMERAS * tokens_per_image or len(chat.image_starts) != NUM_CAMERAS:
            raise DataError("a text spells an image's token out: take it out of the language data")
        if positions != ids.count(tokenizer.indicator) or positions > len(talk.coordinates):
            raise DataError(f"a text spells {INDICATOR} or {POSITION} out: write coordinates as (x, y)")

    def _coordinate_tokens(self) -> int | None:
        """Tokens that stand for the planned trajectory; None where it is written in digits."""
        if not self.model.coordinate_tokens:
            return None
        return 1 if self.model.decoder.whole_trajectory else NUM_WAYPOINTS


def padded_coordinates(
    coordinates: Float[np.ndarray, "C 2"], max_coordinates: int
) -> Float[np.ndarray, "max_coordinates 3"]:
    """Coordinates x, y as x, y, z with z = 0, float32, zeros behind the last.

    Raises:
        ConfigError: more than fit.
        DataError: one is too large for a number.
    """
    if not np.isfinite(coordinates).all():
        raise DataError("a text of its conversation holds a coordinate that no number can hold")
    if len(coordinates) > max_coordinates:
        raise ConfigError(
            f"{len(coordinates)} coordinates are more than data.max_coordinates {max_coordinates}: raise it"
        )
    return np.pad(coordinates, ((0, max_coordinates - len(coordinates)), (0, 1))).astype(np.float32)


def token_fields(
    family: Family,
    tokenizer: DrivingTokenizer,
    chat: ChatTokens,
    grid: tuple[int, int],
    ego_input: EgoStatusInput,
    *,
    sequence_length: int,
    max_targets: int,
    path_points: int = 0,
    num_target_points: int = 0,
    reason_coordinates: int = 0,
) -> dict[str, Any]:
    """Inserts the ego tokens and lays a conversation out in fixed shapes.

    Args:
        family: the model's, which says how positions count.
        tokenizer: gives the special ids.
        chat: the conversation; every image has as many visual tokens as the grid.
        grid: rows and columns of an image's visual tokens.
        ego_input: which ego tokens to insert.
        sequence_length: S.
        max_targets: M.
        path_points: R; indicators behind the waypoints' that belong to the path.
        num_target_points: position tokens, from the first on, that stand for target points.
        reason_coordinates: indicators of the answer that stand before those of the trajectory.

    Returns:
        The fields of `DrivingBatch` that follow from the tokens alone.

    Raises:
        ConfigError: the conversation does not fit S or M.
    """
    chat, ego_indices = insert_ego_tokens(tokenizer, chat, ego_input)
    length = len(chat.token_ids)
    if length > sequence_length:
        raise ConfigError(f"{length} tokens are more than data.sequence_length {sequence_length}: raise it")
    tokens, labels = np.asarray(chat.token_ids), np.asarray(chat.labels)
    spans = [ImageSpan(start, *grid) for start in chat.image_starts]
    position_ids, rope_delta = family.position_ids(length, spans)

    token_type_ids = np.full(length, TokenType.TEXT)
    for span in spans:
        token_type_ids[span.start : span.stop] = TokenType.IMAGE
    token_type_ids[ego_indices] = EGO_TOKEN_TYPES[ego_input]
    positions = np.flatnonzero(tokens == tokenizer.position)
    token_type_ids[positions] = TokenType.COORDINATE
    token_type_ids[positions[:num_target_points]] = TokenType.TARGET_POINT

    supervised = np.flatnonzero(labels != IGNORE)
    if len(supervised) > max_targets:
        raise ConfigError(
            f"{len(supervised)} supervised tokens are more than data.max_targets {max_targets}: raise it"
        )
    # The first six indicators of the answers are the planning turn's (published rule), then the path's;
    # where words come before the trajectory, their indicators come before both.
    answered = np.flatnonzero((tokens == tokenizer.indicator) & (labels != IGNORE))[reason_coordinates:]
    indicators = answered[:NUM_WAYPOINTS]
    on_path = answered[NUM_WAYPOINTS : NUM_WAYPOINTS + path_points]

    def padded(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
        width = [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])]
        return np.pad(values, width, constant_values=fill).astype(np.int32)

    path = {"path_indices": padded(on_path, path_points)} if path_points else {}
    return {
        **path,
        "token_ids": padded(tokens, sequence_length, tokenizer.padding),
        "lengths": np.int32(length),
        "position_ids": padded(position_ids, sequence_length),
        "rope_delta": np.int32(rope_delta),
        "token_type_ids": padded(token_type_ids, sequence_length),
        "target_indices": padded(supervised - 1, max_targets),
        "target_ids": padded(labels[supervised], max_targets),
        "target_mask": np.arange(max_targets) < len(supervised),
        "waypoint_indices": padded(indicators, NUM_WAYPOINTS),
        "waypoint_mask": np.arange(NUM_WAYPOINTS) < len(indicators),
    }


EGO_TOKEN_TYPES: dict[EgoStatusInput, list[TokenType]] = {
    "none": [],
    "language": [],
    "feature": [TokenType.EGO_FEATURE],
    "positions": [TokenType.EGO_POSITION] * NUM_PAST,
    "both": [TokenType.EGO_FEATURE] + [TokenType.EGO_POSITION] * NUM_PAST,
}
"""What the inserted ego tokens stand for, in order."""


def check_vocabulary(tokenizer: DrivingTokenizer, model: ModelConfig) -> None:
    """Refuses a tokenizer whose ids do not fit the model.

    Raises:
        ConfigError: an id lies outside the model's vocabulary.
    """
    vocabulary = model.vlm.decoder.vocab_size
    if tokenizer.highest_id >= vocabulary:
        raise ConfigError(
            f"the tokenizer has ids up to {tokenizer.highest_id} but model.vlm.decoder.vocab_size "
            f"is {vocabulary}: give the model's own tokenizer in data.tokenizer; where its table has no rows "
            "left for the two coordinate tokens, `import-weights --from hf` adds them"
        )
