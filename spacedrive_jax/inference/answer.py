"""Answers as text: the frame of the planning answer, and generated ids written out."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from spacedrive_jax.console import UserError
from spacedrive_jax.data.chat import Turn
from spacedrive_jax.data.chat_layouts import CHAT_LAYOUTS
from spacedrive_jax.data.prompts import context, planning_answer
from spacedrive_jax.data.tokenizer import COORDINATE, INDICATOR, POSITION, DrivingTokenizer


def planning_frame(
    tokenizer: DrivingTokenizer, num_coordinates: int = 6, path_points: int = 0
) -> tuple[int, ...]:
    """The ids of the planning answer as training lays it out, behind the assistant's header.

    A position token stands behind every indicator, the end of the turn comes last (30 ids in Qwen2.5's
    vocabulary, the newline behind the turn not counted).

    Args:
        tokenizer: gives the ids and the chat layout.
        num_coordinates: see `planning_answer`.
        path_points: likewise.

    Raises:
        UserError: this tokenizer runs the header and the answer's first letters together, so that an answer
            does not begin where the prompt ends.
    """
    question = Turn("user", context("boston"))
    answer_turn = Turn("assistant", planning_answer(num_coordinates, path_points=path_points))
    lay_out = CHAT_LAYOUTS[tokenizer.layout]
    prompt = lay_out(tokenizer, [question], 1, generation_prompt=True).token_ids
    whole = lay_out(tokenizer, [question, answer_turn], 1).token_ids
    if whole[: len(prompt)] != prompt:
        raise UserError("the tokenizer merges the assistant's header with the answer: no frame can be made")
    answer = whole[len(prompt) :]
    return tuple(answer[: answer.index(tokenizer.turn_end) + 1])


def answer_text(
    tokenizer: DrivingTokenizer,
    token_ids: Int[np.ndarray, " G"],
    coordinates: Float[np.ndarray, "G 3"],
    is_coordinate: Bool[np.ndarray, " G"],
    trajectory: Float[np.ndarray, "T 3"] | None = None,
) -> str:
    """One sample's answer as text, each coordinate printed as `(x, y)` with two decimals behind its
    indicator, special tokens spelled out, as the published code writes it.

    It puts position tokens where coordinates count, and the coordinates where the text has position tokens,
    the first at the first: one that the model said itself takes a coordinate from its place. The ids that
    stand in discarded places which do not count are printed as they are.

    Args:
        tokenizer: decodes the ids.
        token_ids: the generated ids, cut to their length.
        coordinates: metres.
        is_coordinate: where they stand.
        trajectory: where one token stands for the whole trajectory: printed at the first, an indicator before
            every point and nothing between them; what other tokens stand for is not printed.
    """
    text = tokenizer.decode(np.where(is_coordinate, tokenizer.position, token_ids).tolist())
    if trajectory is not None:
        whole = "".join(f"{INDICATOR}({x:.2f}, {y:.2f})" for x, y in trajectory[:, :2].tolist())
        return text.replace(COORDINATE, whole, 1) if is_coordinate.any() else text
    said, *rest = text.split(POSITION)
    points = [f"({x:.2f}, {y:.2f})" for x, y in coordinates[is_coordinate][:, :2].tolist()]
    filled = points + [POSITION] * (len(rest) - len(points))
    return said + "".join(value + piece for value, piece in zip(filled, rest, strict=True))
