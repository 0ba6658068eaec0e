"""What is asked and answered: protocol constants that published weights rely on.

Coordinates in text are found, replaced by indicator and position token, and written out (paper, 3.2).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.tokenizer import COORDINATE

# Decimals may be signed and may lack the digits before the point; integers may not be signed: `(3, -4)`
# stays text (published: fidelity Q23).
_NUMBER = r"([-+]?\d*\.\d+|\d+)"
_TUPLE = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_ALL = re.compile(_TUPLE)
# A velocity takes the text up to the next closing bracket with it, whatever stands inside.
_ALL_BUT_VELOCITIES = re.compile(rf"velocity(?::| of)\s*\([^)]+\)|{_TUPLE}")


class ReplacedText(NamedTuple):
    """A text whose coordinates became tokens."""

    text: str
    coordinates: Float[np.ndarray, "C 2"]
    """x, y in metres, ego frame, float32; as the published code counts them: see `replace_coordinates`."""


def replace_coordinates(text: str, *, keep_velocities: bool) -> ReplacedText:
    """Puts an indicator and a position token in the place of every `(x, y)`, as published.

    The published code finds tuples with a lenient pattern and then replaces the first occurrence of the
    same two numbers written `(x, y)`. So `(1.0,2.0)` is counted as a coordinate but stays text, and a
    coordinate that repeats an earlier velocity replaces the velocity. Both are kept: published weights were
    trained on such texts.

    Args:
        text: any turn of a conversation.
        keep_velocities: the training rule, which leaves tuples behind `velocity:` and `velocity of` alone;
            the test rule replaces them too.
    """
    pattern = _ALL_BUT_VELOCITIES if keep_velocities else _ALL
    found = [(match[1], match[2]) for match in pattern.finditer(text) if match[1] is not None]
    for x, y in found:
        text = text.replace(f"({x}, {y})", COORDINATE, 1)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which the sample's builder refuses
        return ReplacedText(text, np.array(found, np.float32).reshape(-1, 2))


def format_number(number: float, decimals: int = 1) -> str:
    """A signed number as the published texts write it: `+4.10`, `-0.05`, and `0.0` where it rounds to no
    more than 0.01 (fidelity Q24).
    """
    return "0.0" if abs(round(number, decimals)) <= 1e-2 else f"{number:+.{decimals}f}"


def format_coordinates(coordinates: Float[np.ndarray, "C 2"]) -> str:
    """Coordinates as `(+4.10, 0.0), (+8.22, -0.05)`, two decimals."""
    return ", ".join(f"({format_number(float(x), 2)}, {format_number(float(y), 2)})" for x, y in coordinates)


def parse_coordinates(text: str) -> Float[np.ndarray, "C 2"]:
    """Every `(x, y)` of a text, metres; for answers that write coordinates as digits."""
    return np.array([(float(match[1]), float(match[2])) for match in _ALL.finditer(text)]).reshape(-1, 2)


CommandSource = Literal["released", "navigation", "route", "none"]
"""Where the command sentence comes from.

`released`: the record's `command_released`, computed from the ground-truth endpoint with mirrored words, as
the published weights expect; it leaks the answer's direction. `navigation`: `command_navigation`, from the
past only, words the right way round. `route`: `command_route`, CARLA's commands, which say where the route
turns within the next 50 m; without it a planner cannot know where to turn. `none`: no sentence (base
SpaceDrive of the paper).
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

ROUTE_WORDS: dict[int, str] = {
    -1: "Its route is not known. ",
    1: "Its route turns left. ",
    2: "Its route turns right. ",
    3: "Its route goes straight on over the intersection. ",
    4: "Its route follows the lane. ",
    5: "Its route changes to the left lane. ",
    6: "Its route changes to the right lane. ",
}
"""Sentences of `command_route` (RoadOption); this project's wording, no published model takes a route."""

PLANNING_QUESTION = "Please provide the planning trajectory for the ego car without reasons."
PLANNING_QUESTION_WITH_REASONS = "Please provide the planning trajectory for the ego car with reasons."
"""Asks to think before planning; the published prompts of that task are not public."""
PLANNING_OPENING = "Here is the planning trajectory ["
"""How the planning answer begins, behind a repeated command or reasons."""


def context(location: str) -> str:
    """What begins a conversation: the images, then where the vehicle drives.

    Args:
        location: nuScenes log location, e.g. `singapore-onenorth`; its first part is named.
    """
    images = "<image>\n" * len(CAMERAS)
    return f"{images}You are driving in {location.split('-')[0]}. "


def command_sentence(command: int, source: CommandSource = "navigation") -> str:
    """The command as a sentence, a space behind it.

    Args:
        command: index into `COMMAND_WORDS`, or a key of `ROUTE_WORDS` where the source is the route.
        source: where it comes from.
    """
    return ROUTE_WORDS[command] if source == "route" else f"The ego vehicle is {COMMAND_WORDS[command]}. "


def target_points_sentence(count: int) -> str:
    """Names the target points, a coordinate token for each, a space behind it."""
    return f"The next points of the route are {', '.join([COORDINATE] * count)}. "


def planning_question(
    location: str,
    command: int | None,
    *,
    source: CommandSource = "navigation",
    plan: bool = True,
    ego_status: str = "",
    num_target_points: int = 0,
    reasons: bool = False,
) -> str:
    """The user turn of the planning task (published prompt).

    Args:
        location: nuScenes log location.
        command: see `command_sentence`, or None for no command sentence.
        source: where the command comes from.
        plan: whether to ask for the trajectory; the published loader does not where the future is missing.
        ego_status: what is said of the ego vehicle before the command, a space behind it.
        num_target_points: target points to name behind the command.
        reasons: ask for words before the trajectory.
    """
    if not plan:
        return context(location)
    return (
        context(location)
        + ego_status
        + (command_sentence(command, source) if command is not None else "")
        + (target_points_sentence(num_target_points) if num_target_points else "")
        + (PLANNING_QUESTION_WITH_REASONS if reasons else PLANNING_QUESTION)
    )


def planning_answer(
    num_coordinates: int = 6,
    *,
    command: int | None = None,
    source: CommandSource = "navigation",
    path_points: int = 0,
) -> str:
    """The assistant turn: the fixed frame around the coordinates.

    Args:
        num_coordinates: 6, or 1 where one token stands for the whole trajectory (published
            `single_token_output`, which ends without a full stop).
        command: repeats the command before the trajectory (published `load_high_level_command`).
        source: where the command comes from.
        path_points: coordinates of the path behind it, for closed-loop driving (the published prompts of
            that task are not public; the sentence is this project's).
    """
    stop = "" if num_coordinates == 1 else "."
    said = "" if command is None else command_sentence(command, source)
    path = f" Here is the path [{', '.join([COORDINATE] * path_points)}]." if path_points else ""
    return f"{said}{PLANNING_OPENING}{', '.join([COORDINATE] * num_coordinates)}]{stop}{path}"


def planning_answer_in_digits(
    waypoints: Float[np.ndarray, "T 2"],
    *,
    command: int | None = None,
    source: CommandSource = "navigation",
) -> str:
    """The assistant turn with coordinates as digits, two decimals: the baseline without coordinate tokens."""
    said = "" if command is None else command_sentence(command, source)
    return f"{said}{PLANNING_OPENING}{format_coordinates(waypoints)}]."


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
