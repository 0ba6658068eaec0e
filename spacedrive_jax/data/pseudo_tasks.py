"""Tasks of arithmetic on random BEV points (published `pseudo_coords`)."""

from __future__ import annotations

import numpy as np

from spacedrive_jax.data.coordinates_in_text import format_number
from spacedrive_jax.data.language_data import QuestionAnswer

LOWEST = np.array([-51.2, -51.2, -5.0], np.float32)
HIGHEST = np.array([51.2, 51.2, 3.0], np.float32)
"""Range of the points, metres, ego frame."""


def pseudo_coordinate_questions(rng: np.random.Generator) -> list[QuestionAnswer]:
    """Four questions: what movement lies between two points, and where a movement leads, each once with
    the movement as a coordinate and once in words.

    Args:
        rng: draws the points.
    """
    starts, ends = (rng.uniform(LOWEST, HIGHEST, (4, 3)).astype(np.float32)[:, :2] for _ in range(2))
    questions = []
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        moved = end - start
        at, to, by = (_coordinate(point) for point in (start, end, moved))
        in_words = f"{moved[0]:.2f} in x direction and {moved[1]:.2f} in y direction"
        asks_movement, says_words = index < 2, index % 2 == 1
        before = f"If an object is located at {at}, and it moves "
        if asks_movement:
            question = f"{before}to {to} on BEV, what is the movement?"
            answer = f"The object has moved by {in_words if says_words else by}."
        else:
            # Two spaces before the words, as published.
            question = f"{before}by {' ' + in_words if says_words else by} on BEV, where is it now?"
            answer = f"The object is now at {to}."
        questions.append(QuestionAnswer(question, answer))
    return questions


def _coordinate(point: np.ndarray) -> str:
    return f"({format_number(float(point[0]), 2)}, {format_number(float(point[1]), 2)})"
