"""The ego status: the driving command, 74 numbers, past positions, and the tokens that carry them.

Two rules find a driving command: the published one, which sees the future, and one that cannot. Both sort an
angle into eight classes: 0 strictly forward, 1 forward, 2 slightly right, 3 right, 4 sharp right, 5 slightly
left, 6 left, 7 sharp left.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_PAST
from spacedrive_jax.data.prompts import CommandSource, format_coordinates, format_number
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.models.family import IGNORE, ChatTokens
from spacedrive_jax.models.spacedrive_config import EgoStatusInput

MINIMUM_MOTION = 0.5
"""Metres; an endpoint nearer than this counts as standing still, class 0."""
HORIZON = 3.0
"""Seconds to the endpoint: six keyframes."""


def angle_class(degrees: float) -> int:
    """The command class of an angle: 2..4 for positive angles, 5..7 for negative ones.

    The bounds (0.4, 2, 10 and 20 degrees) belong to the inner class (fidelity Q37).
    """
    magnitude = abs(degrees)
    if magnitude <= 0.4:
        return 0
    if magnitude <= 2.0:
        return 1
    size = 0 if magnitude <= 10.0 else 1 if magnitude <= 20.0 else 2
    return (2 if degrees > 0 else 5) + size


def released_command(endpoint: Float[np.ndarray, "3"]) -> int:
    """The command of the published data: from the ground-truth endpoint, words mirrored.

    The published script calls a positive angle "right" although +y is left in the ego frame; published
    checkpoints were trained with these words, so parity needs them (fidelity Q37).

    Args:
        endpoint: x, y (metres) and yaw (radians) of the ego vehicle three seconds ahead in the current ego
            frame, zeros where that keyframe does not exist. All three enter the published half-metre test.
    """
    if exact.norm(endpoint) < MINIMUM_MOTION:
        return 0
    return angle_class(float(np.degrees(exact.arctan2(endpoint[1], endpoint[0]))))


def navigation_command(
    past_to_ego: Float[np.ndarray, "2 4 4"],
    past_mask: Bool[np.ndarray, "2"],
    seconds_ago: Float[np.ndarray, "2"],
) -> int:
    """A command without a look at the future, with words that mean what they say.

    Drives on for three seconds with the speed and the yaw rate of the past keyframes (a unicycle) and
    takes the direction of the point reached. Without a past keyframe, or nearly at rest: class 0.

    Args:
        past_to_ego: poses of the previous two keyframes in the current ego frame, newest first.
        past_mask: which of them exist.
        seconds_ago: how long before now they were.
    """
    count = int(past_mask.sum())
    if count == 0:
        return 0
    oldest = count - 1
    positions = np.concatenate([np.zeros((1, 2)), past_to_ego[:count, :2, 3]])
    steps = positions[:-1] - positions[1:]
    # Reversing shows as motion against the ego heading.
    distance = float(np.sum(np.copysign(exact.norm(steps), steps[:, 0])))
    past_yaw = exact.arctan2(past_to_ego[oldest, 1, 0], past_to_ego[oldest, 0, 0])
    speed = distance / seconds_ago[oldest]
    turn = -past_yaw / seconds_ago[oldest] * HORIZON
    cos, sin = exact.cos_sin(turn / 2)
    # Chord of an arc of length speed * HORIZON that turns by `turn`.
    chord = speed * HORIZON * (sin / (turn / 2) if turn else 1.0)
    if abs(chord) < MINIMUM_MOTION:
        return 0
    endpoint = chord * np.array([cos, sin])
    return angle_class(-float(np.degrees(exact.arctan2(endpoint[1], endpoint[0]))))


def mirrored_command(command: int) -> int:
    """The command class with left and right exchanged: the published words for it (fidelity Q37)."""
    return command if command < 2 else command + 3 if command < 5 else command - 3


MEMORY_GAP_US = 2_000_000
"""The published memory empties when two consecutive frames are two seconds or more apart."""


@dataclasses.dataclass(frozen=True)
class EgoStatus:
    """What the model is told about the ego vehicle."""

    status: Float[np.ndarray, "74"]
    past_positions: Float[np.ndarray, "2 3"]
    """Ego origin at t-1 and t-2 in the current ego frame, metres; (0, 0, 0) where there is no memory."""


def ego_status(record: Record, command_source: CommandSource) -> EgoStatus:
    """Builds the ego status from the record alone, as the published streaming memory would hold it.

    Memory is dropped as a whole at the first gap of two seconds or more (fidelity Q16);
    missing history is zero matrices and zero CAN values. With no command sentence the command number is 0,
    so that nothing of the ground truth reaches the model.
    """
    present = remembered(record)

    def command(name: str) -> np.ndarray:
        if command_source == "none":
            return np.zeros_like(np.asarray(record[f"{name}released"], np.float64))
        return np.asarray(record[f"{name}{command_source}"], np.float64)

    past = np.concatenate([command("past_command_")[:, None], record["past_can_bus"]], axis=1)
    past = past * present[:, None]
    poses = record["past_to_ego"] * present[:, None, None]
    now = np.concatenate([command("command_")[None], record["can_bus"]])
    status = np.concatenate([past.ravel(), now, poses.ravel()]).astype(np.float32)
    return EgoStatus(status, poses[:, :3, 3].astype(np.float32))


EgoFault = Literal["none", "zero", "late"]
"""What is wrong with what the vehicle says of itself, on purpose: to see how far a model relies on it."""


def with_ego_fault(record: Record, fault: EgoFault) -> Record:
    """A record whose CAN bus and past poses are lost, or those of the keyframe before; the rest as it is.

    Late, the record knows one keyframe behind the one that is told for now; that one is taken to have been
    driven as the next one was. Commands come from elsewhere and stay.

    Args:
        record: a keyframe.
        fault: `none`, `zero` (no speed, no past) or `late` (by a keyframe; lost where there was none).
    """
    if fault == "none":
        return record
    if fault == "zero" or not remembered(record)[0]:
        return {
            **record,
            "can_bus": np.zeros_like(record["can_bus"]),
            "past_can_bus": np.zeros_like(record["past_can_bus"]),
            "can_bus_valid": False,
            "past_mask": np.zeros_like(record["past_mask"]),
        }
    newest, older = record["past_to_ego"]
    if remembered(record)[1]:
        step = exact.matmul(exact.rigid_inverse(newest), older)
        can_bus = record["past_can_bus"]
    else:
        step, can_bus = newest, record["past_can_bus"][[0, 0]]
    return {
        **record,
        "can_bus": can_bus[0],
        "past_can_bus": can_bus[[1, 1]],
        "past_to_ego": np.stack([step, exact.matmul(step, step)]),
        "past_mask": np.ones_like(record["past_mask"]),
    }


def remembered(record: Record) -> Bool[np.ndarray, "2"]:
    """Which of the two past keyframes the memory still holds."""
    present = record["past_mask"].astype(bool).copy()
    times = [int(record["timestamp_us"]), *(int(time) for time in record["past_timestamp_us"])]
    for index in range(NUM_PAST):
        recent = present[index] and abs(times[index] - times[index + 1]) < MEMORY_GAP_US
        present[index] = recent and (index == 0 or present[index - 1])
    return present


def ego_status_in_words(record: Record) -> str:
    """The ego status as a sentence of the question, a space behind it (setting `language`).

    Speed, acceleration along the vehicle and yaw rate from the CAN bus, and the past positions in the current
    ego frame, coordinates as digits; what the record does not know is left out. The wording is this
    project's.
    """
    sentences = []
    if record["can_bus_valid"]:
        _, acceleration, rotation_rate, velocity = np.split(np.asarray(record["can_bus"]), [4, 7, 10])
        speed, along, turning = (
            format_number(float(value), 2) for value in (velocity[0], acceleration[0], rotation_rate[2])
        )
        sentences.append(
            f"The ego vehicle moves at {speed} m/s, accelerates at {along} m/s^2 and turns at {turning} "
            "rad/s. "
        )
    past = record["past_to_ego"][remembered(record)][:, :2, 3]
    if len(past):
        sentences.append(f"Its past positions are {format_coordinates(past)}. ")
    return "".join(sentences)


def insert_ego_tokens(
    tokenizer: DrivingTokenizer,
    chat: ChatTokens,
    ego_input: EgoStatusInput,
) -> tuple[ChatTokens, list[int]]:
    """Inserts the ego tokens after the last image, as the published code does.

    First the feature token as the family writes it (`ChatTemplate.ego_feature`), then [indicator, image,
    indicator, image] for the past positions. Inserted tokens are not supervised, and their image ids count
    as text for the rotary positions.

    Args:
        tokenizer: gives the special ids.
        chat: the conversation.
        ego_input: which tokens to insert.

    Returns:
        The longer conversation, and the indices of its ego slots in order feature, t-1, t-2 (those that
        `ego_input` asks for).
    """
    inserted: list[int] = []
    slots: list[int] = []
    if ego_input in ("feature", "both"):
        feature, slot = tokenizer.chat.ego_feature(tokenizer)
        slots.append(slot)
        inserted += feature
    if ego_input in ("positions", "both"):
        for _ in range(NUM_PAST):
            slots.append(len(inserted) + 1)
            inserted += [tokenizer.indicator, tokenizer.image]
    reverse = chat.token_ids[::-1]
    place = len(reverse) - reverse.index(tokenizer.chat.image_end(tokenizer))
    token_ids = chat.token_ids[:place] + inserted + chat.token_ids[place:]
    labels = chat.labels[:place] + [IGNORE] * len(inserted) + chat.labels[place:]
    return ChatTokens(token_ids, labels, chat.image_starts), [place + slot for slot in slots]
