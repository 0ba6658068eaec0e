"""What is said about a keyframe: the planning turn first, then questions, coordinates as tokens."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from spacedrive_jax.bounds import check_bounds
from spacedrive_jax.constants import NUM_TARGET_POINTS
from spacedrive_jax.data.ego_status import ego_status_in_words
from spacedrive_jax.data.language_data import (
    LanguageData,
    QuestionAnswer,
    pseudo_coordinate_questions,
    scene_questions,
    scene_reasons,
)
from spacedrive_jax.data.prompts import (
    CommandSource,
    context,
    counterfactual_question,
    planning_answer,
    planning_answer_in_digits,
    planning_question,
    replace_coordinates,
)
from spacedrive_jax.data.schema import Record
from spacedrive_jax.io import local
from spacedrive_jax.models.family import Message

Tasks = Literal["planning", "think_before_planning", "planning_and_questions", "questions", "counterfactual"]
"""What a conversation consists of: the planning turn; a planning turn whose answer reasons in words before
the trajectory (paper, supplement C.1); the planning turn and all questions; the questions alone; or
OmniDrive's two counterfactual questions alone, where only the coordinates asked about become tokens
(published `planning_only`, -, neither, -, `counter_only`)."""


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """What to talk about."""

    tasks: Tasks = "planning"
    language_data: str | None = None
    """Folder of OmniDrive's language data, for tasks beyond planning."""
    scene_texts: bool = False
    """Where there is no language data about a keyframe, ask what its own record knows
    (`scene_questions`). Reasons before planning come from there in any case."""
    pseudo_coordinates: bool = False
    """Add four questions of arithmetic on random coordinates."""
    command_in_answer: bool = False
    """Let the answer repeat the command before the trajectory."""
    supervise_position_tokens: bool = False
    """Let the cross-entropy see the position tokens' ids too (published `supervise_semantic_posemb`)."""

    def __post_init__(self) -> None:
        check_bounds(self, {}, "data.conversation")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns, and the coordinates that their position tokens stand for."""

    turns: list[Message]
    coordinates: Float[np.ndarray, "C 2"]
    """Metres, ego frame, in the order of the tokens, float32."""
    num_target_points: int = 0
    """The first so many coordinates are the target points that the question names."""
    reason_coordinates: int = 0
    """The first so many coordinates of the answer belong to the reasons before the trajectory."""


def question_turn(
    record: Record,
    command_source: CommandSource,
    *,
    plan: bool = True,
    ego_in_words: bool = False,
    target_points: bool = False,
    reasons: bool = False,
) -> Message:
    """The user turn that asks for the trajectory, with the command sentence that the source gives.

    Args:
        record: the keyframe.
        command_source: which command to name.
        plan: whether to ask for the trajectory.
        ego_in_words: say the ego status too.
        target_points: name the record's target points, as coordinate tokens.
        reasons: ask for words before the trajectory.
    """
    said = ego_status_in_words(record) if ego_in_words else ""
    command = _command(record, command_source)
    question = planning_question(
        record["location"],
        command,
        source=command_source,
        plan=plan,
        ego_status=said,
        num_target_points=NUM_TARGET_POINTS if target_points else 0,
        reasons=reasons,
    )
    return Message("user", question)


def question_coordinates(record: Record, *, target_points: bool) -> Float[np.ndarray, "C 2"]:
    """What the coordinate tokens of `question_turn` stand for, float32, metres."""
    points = record["target_points"] if target_points else np.zeros((0, 2))
    return np.asarray(points, np.float32)


def counterfactual_prompt(record: Record, trajectory: str, *, coordinate_tokens: bool) -> Conversation:
    """The question what would come of a trajectory, coordinates replaced by the test rule.

    Args:
        record: the keyframe.
        trajectory: its text, from the language data.
        coordinate_tokens: coordinates become tokens; False leaves them as digits.
    """
    question = counterfactual_question(record["location"], trajectory)
    coordinates = np.zeros((0, 2), np.float32)
    if coordinate_tokens:
        question, coordinates = replace_coordinates(question, keep_velocities=False)
    return Conversation([Message("user", question)], coordinates)


def training_conversation(
    record: Record,
    config: ConversationConfig,
    command_source: CommandSource,
    *,
    coordinate_tokens: int | None,
    path_points: int = 0,
    ego_in_words: bool = False,
    target_points: bool = False,
) -> Conversation:
    """The conversation of a keyframe with all answers.

    Where the future is incomplete there is no planning turn; if there are no questions either, nothing is
    asked and nothing answered (published). Questions come in an order of their own for each keyframe, the
    same in every epoch: it is drawn, like the wording of the description's question and the pseudo tasks,
    from the keyframe's token.

    Args:
        record: the keyframe.
        config: what to talk about.
        command_source: which command the planning question names.
        coordinate_tokens: tokens that stand for the planned trajectory: 6, or 1 for all of it; None writes
            all coordinates as digits.
        path_points: points of the path that the planning answer gives behind the trajectory.
        ego_in_words: the planning question says the ego status.
        target_points: the planning question names the record's target points.

    Raises:
        DataError: a file of the language data is not laid out as it should be.
    """
    rng = _keyframe_rng(record["token"])
    planned = is_planned(record, config.tasks)
    thinks = planned and config.tasks == "think_before_planning"
    questions = _questions(record, config, rng)
    turns: list[Message] = []
    coordinates: list[np.ndarray] = []
    num_target_points = NUM_TARGET_POINTS if planned and target_points else 0
    reason_coordinates = 0
    if planned:
        turns.append(
            question_turn(
                record,
                command_source,
                ego_in_words=ego_in_words,
                target_points=target_points,
                reasons=thinks,
            )
        )
        coordinates.append(question_coordinates(record, target_points=target_points))
        command = _command(record, command_source) if config.command_in_answer else None
        waypoints = np.asarray(record["waypoints"], np.float32)
        reasons = _reasons(record, config) if thinks else ""
        if coordinate_tokens is not None:
            reasons, in_reasons = replace_coordinates(reasons, keep_velocities=True)
            coordinates.append(in_reasons)
            reason_coordinates = len(in_reasons)
        if coordinate_tokens is None:
            answer = planning_answer_in_digits(waypoints, command=command, source=command_source)
        else:
            answer = planning_answer(
                coordinate_tokens, command=command, source=command_source, path_points=path_points
            )
            coordinates.append(waypoints[:coordinate_tokens])
            if path_points:
                coordinates.append(np.asarray(record["path"][:path_points], np.float32))
        turns.append(Message("assistant", f"{reasons} {answer}" if reasons else answer))
    for index, pair in enumerate(questions):
        opening = "" if turns or index else context(record["location"])
        for turn in (Message("user", opening + pair.question), Message("assistant", pair.answer)):
            asked_only = config.tasks == "counterfactual" and turn.role == "assistant"
            if coordinate_tokens is not None and not asked_only:
                text, found = replace_coordinates(turn.content, keep_velocities=True)
                turn = Message(turn.role, text)
                coordinates.append(found)
            turns.append(turn)
    if not turns:
        turns.append(question_turn(record, command_source, plan=False))
    whole = np.concatenate([np.zeros((0, 2), np.float32), *coordinates])
    return Conversation(turns, whole, num_target_points, reason_coordinates)


def is_planned(record: Record, tasks: Tasks) -> bool:
    """Whether the conversation of a keyframe has a planning turn: not where the future is incomplete."""
    return bool(record["waypoint_mask"].all()) and tasks not in ("counterfactual", "questions")


@functools.cache
def _language_data(folder: str) -> LanguageData:
    """The language data; of a bucket's folder a copy, which is asked for once."""
    return LanguageData(local(folder))


def _reasons(record: Record, config: ConversationConfig) -> str:
    """OmniDrive's words before a plan where there are any, else those from the record."""
    said = ""
    if config.language_data is not None:
        said = _language_data(config.language_data).reasons(record["token"])
    return said or scene_reasons(record)


def _questions(
    record: Record, config: ConversationConfig, rng: np.random.Generator
) -> Sequence[QuestionAnswer]:
    questions: list[QuestionAnswer] = []
    if config.tasks not in ("planning", "think_before_planning"):
        if config.language_data is not None:
            data = _language_data(config.language_data)
            if config.tasks == "counterfactual":
                questions = data.counterfactual_questions(record["token"])
            else:
                questions = data.questions(record["token"], rng)
        if not questions and config.scene_texts and config.tasks != "counterfactual":
            questions = scene_questions(record, rng)
        questions = [questions[index] for index in rng.permutation(len(questions))]
    return [*questions, *(pseudo_coordinate_questions(rng) if config.pseudo_coordinates else [])]


def _command(record: Record, source: CommandSource) -> int | None:
    return None if source == "none" else int(record[f"command_{source}"])


def _keyframe_rng(token: str) -> np.random.Generator:
    return np.random.default_rng(np.frombuffer(hashlib.sha256(token.encode()).digest(), np.uint32))
