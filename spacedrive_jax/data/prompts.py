"""What is asked and answered: protocol constants that published weights rely on."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

from spacedrive_jax.cameras import CAMERAS
from spacedrive_jax.data.coordinates_in_text import format_coordinates
from spacedrive_jax.data.tokenizer import COORDINATE

CommandSource = Literal["released", "navigation", "none"]
"""Where the command sentence comes from.

`released`: the record's `command_released`, computed from the ground-truth endpoint with mirrored words, as
the published weights expect; it leaks the answer's direction. `navigation`: `command_navigation`, from the
past only, words the right way round. `none`: no sentence (base SpaceDrive of the paper).
"""

COMMAND_WORDS: tuple[str, ...] = (
    "moving strictly forward",
    "moving forward",
    "moving slightly right",
    "turning right",
    "turning sharp right",
    "moving slightly left",
    "turning left",
    "turning sharp left",
)
"""Indexed by the record's command; a command outside it is a converter error."""

SYSTEM = "You are a helpful assistant."
PLANNING_QUESTION = "Please provide the planning trajectory for the ego car without reasons."


def context(location: str) -> str:
    """What begins a conversation: the images, then where the vehicle drives.

    Args:
        location: nuScenes log location, e.g. `singapore-onenorth`; its first part is named.
    """
    images = "<image>\n" * len(CAMERAS)
    return f"{images}You are driving in {location.split('-')[0]}. "


def command_sentence(command: int) -> str:
    """The command as a sentence, a space behind it; `command` is an index into `COMMAND_WORDS`."""
    return f"The ego vehicle is {COMMAND_WORDS[command]}. "


def planning_question(location: str, command: int | None, *, plan: bool = True, ego_status: str = "") -> str:
    """The user turn of the planning task (published prompt).

    Args:
        location: nuScenes log location.
        command: index into `COMMAND_WORDS`, or None for no command sentence.
        plan: whether to ask for the trajectory; the published loader does not where the future is missing.
        ego_status: what is said of the ego vehicle before the command, a space behind it.
    """
    if not plan:
        return context(location)
    return (
        context(location)
        + ego_status
        + (command_sentence(command) if command is not None else "")
        + PLANNING_QUESTION
    )


def planning_answer(num_coordinates: int = 6, *, command: int | None = None, path_points: int = 0) -> str:
    """The assistant turn: the fixed frame around the coordinates.

    Args:
        num_coordinates: 6, or 1 where one token stands for the whole trajectory (published
            `single_token_output`, which ends without a full stop).
        command: repeats the command before the trajectory (published `load_high_level_command`).
        path_points: coordinates of the path behind it, for closed-loop driving (the published prompts of
            that task are not public; the sentence is this project's).
    """
    stop = "" if num_coordinates == 1 else "."
    said = "" if command is None else command_sentence(command)
    path = f" Here is the path [{', '.join([COORDINATE] * path_points)}]." if path_points else ""
    return f"{said}Here is the planning trajectory [{', '.join([COORDINATE] * num_coordinates)}]{stop}{path}"


def planning_answer_in_digits(waypoints: Float[np.ndarray, "T 2"], *, command: int | None = None) -> str:
    """The assistant turn with coordinates as digits, two decimals: the baseline without coordinate tokens."""
    said = "" if command is None else command_sentence(command)
    return f"{said}Here is the planning trajectory [{format_coordinates(waypoints)}]."


def counterfactual_question(location: str, trajectory: str) -> str:
    """The user turn that asks what would come of another trajectory (OmniDrive's counterfactual test).

    Args:
        location: nuScenes log location.
        trajectory: its text, from the language data; coordinates are replaced by the test rule.
    """
    return context(location) + counterfactual_text(trajectory)


def counterfactual_text(trajectory: str) -> str:
    """The counterfactual question itself."""
    return f"If you follow the trajectory {trajectory}, what would happen?"
