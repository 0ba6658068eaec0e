"""What is asked and answered: protocol constants that published weights rely on."""

from __future__ import annotations

from typing import Literal

from spacedrive_jax.cameras import CAMERAS
from spacedrive_jax.data.tokenizer import INDICATOR, POSITION

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
COORDINATE = INDICATOR + POSITION


def planning_question(location: str, command: int | None, *, plan: bool = True) -> str:
    """The user turn of the planning task (published prompt).

    Args:
        location: nuScenes log location, e.g. `singapore-onenorth`; its first part is named.
        command: index into `COMMAND_WORDS`, or None for no command sentence.
        plan: whether to ask for the trajectory; the published loader does not where the future is missing.
    """
    images = "<image>\n" * len(CAMERAS)
    city = location.split("-")[0]
    text = f"{images}You are driving in {city}. "
    if not plan:
        return text
    if command is not None:
        text += f"The ego vehicle is {COMMAND_WORDS[command]}. "
    return text + PLANNING_QUESTION


def planning_answer(num_waypoints: int = 6) -> str:
    """The assistant turn: the fixed frame around the coordinates."""
    return f"Here is the planning trajectory [{', '.join([COORDINATE] * num_waypoints)}]."
