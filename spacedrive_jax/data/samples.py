"""One record to one fixed-shape sample: prompt, images, geometry, ego status, targets."""

from __future__ import annotations

import numpy as np

from spacedrive_jax.batch import DrivingBatch, Slot
from spacedrive_jax.config import DataConfig, ModelConfig
from spacedrive_jax.console import UserError
from spacedrive_jax.data.chat import IGNORE, Turn, chat_tokens
from spacedrive_jax.data.ego_status import ego_status, insert_ego_tokens
from spacedrive_jax.data.images import ImageProcessor, scaled_intrinsics
from spacedrive_jax.data.prompts import planning_answer, planning_question
from spacedrive_jax.data.records import NUM_WAYPOINTS, Record
from spacedrive_jax.data.tokenizer import DrivingTokenizer, load_tokenizer
from spacedrive_jax.depth.sources import record_patch_depth
from spacedrive_jax.vlm.positions import ImageSpan, mrope_positions


class SampleBuilder:
    """Builds samples; deterministic, so that a sample can be cached or rebuilt at will."""

    def __init__(self, data: DataConfig, model: ModelConfig, *, answer: bool = True) -> None:
        """Prepares the tokenizer and the image processor.

        Args:
            data: what to read and how.
            model: which ego tokens to lay out, and the vision tower's patch sizes.
            answer: with the answer (training) or ending in the assistant's header (prediction).
        """
        self.data = data
        self.model = model
        self.answer = answer
        self.tokenizer: DrivingTokenizer = load_tokenizer(data.tokenizer)
        self.images = ImageProcessor(model.vlm.vision, data.image_size, channel_order=data.channel_order)
        check_vocabulary(self.tokenizer, model)

    def __call__(self, record: Record, index: int) -> DrivingBatch:
        """One sample, numpy arrays without a batch axis.

        Raises:
            UserError: the record lacks an image or depth, or the conversation does not fit the config's
                fixed shapes.
        """
        data, rows_columns = self.data, self.images.token_grid
        status = ego_status(record, data.command)
        has_future = bool(record["waypoint_mask"].all())
        command = None if data.command == "none" else int(record[f"command_{data.command}"])
        ask = has_future or not self.answer
        turns = [Turn("user", planning_question(record["location"], command, plan=ask))]
        if self.answer and has_future:
            turns.append(Turn("assistant", planning_answer()))
        chat = chat_tokens(
            self.tokenizer, turns, rows_columns[0] * rows_columns[1], generation_prompt=not self.answer
        )
        chat, ego_slots = insert_ego_tokens(self.tokenizer, chat, self.model.ego_status)
        length = len(chat.token_ids)
        if length > data.sequence_length:
            raise UserError(
                f"keyframe {record['token']} makes {length} tokens, more than data.sequence_length "
                f"{data.sequence_length}: raise it"
            )

        tokens = np.asarray(chat.token_ids)
        labels = np.asarray(chat.labels)
        spans = [ImageSpan(start, *rows_columns) for start in chat.image_starts]
        positions, offset = mrope_positions(length, spans)
        slots = np.zeros(length, np.int32)
        for span in spans:
            slots[span.start : span.stop] = Slot.IMAGE
        kinds = {"none": [], "feature": [Slot.EGO_FEATURE], "positions": [Slot.EGO_POSITION] * 2}
        kinds["both"] = kinds["feature"] + kinds["positions"]
        slots[ego_slots] = kinds[self.model.ego_status]
        slots[tokens == self.tokenizer.position] = Slot.COORDINATE

        supervised = np.flatnonzero(labels != IGNORE)
        if len(supervised) > data.max_targets:
            raise UserError(
                f"{len(supervised)} supervised tokens, more than data.max_targets {data.max_targets}"
            )
        indicators = np.flatnonzero((tokens == self.tokenizer.indicator) & (labels != IGNORE))[:NUM_WAYPOINTS]
        waypoints = np.where(has_future, record["waypoints"], 0)
        coordinates = np.zeros((NUM_WAYPOINTS, 3), np.float32)
        if len(indicators):
            coordinates[:, :2] = waypoints
        depth, _ = record_patch_depth(record, rows_columns, data.depth)

        def padded(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
            width = [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])]
            return np.pad(values, width, constant_values=fill).astype(np.int32)

        size, targets = data.sequence_length, data.max_targets
        return DrivingBatch(
            token_ids=padded(tokens, size, self.tokenizer.padding),
            lengths=np.int32(length),
            positions=padded(positions, size),
            position_offset=np.int32(offset),
            slots=padded(slots, size),
            pixel_values=self.images(record),
            patch_depth=depth,
            intrinsics=scaled_intrinsics(record, data.image_size).astype(np.float32),
            camera_to_ego=record["camera_to_ego"].astype(np.float32),
            ego_status=status.status,
            past_positions=status.past_positions,
            coordinates=coordinates,
            target_places=padded(supervised - 1, targets),
            target_ids=padded(labels[supervised], targets),
            target_mask=np.arange(targets) < len(supervised),
            waypoint_places=padded(indicators, NUM_WAYPOINTS),
            waypoints=waypoints.astype(np.float32),
            waypoint_mask=np.arange(NUM_WAYPOINTS) < len(indicators),
            index=np.int32(index),
        )


def check_vocabulary(tokenizer: DrivingTokenizer, model: ModelConfig) -> None:
    """Refuses a tokenizer whose ids do not fit the model.

    Raises:
        UserError: an id lies outside the model's vocabulary.
    """
    vocabulary = model.vlm.decoder.vocab_size
    if max(tokenizer.indicator, tokenizer.position, tokenizer.vocabulary_size - 1) >= vocabulary:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocabulary_size - 1} but model.vlm.decoder.vocab_size "
            f"is {vocabulary}: give the model's own tokenizer in data.tokenizer"
        )
