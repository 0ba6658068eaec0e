"""Language about a keyframe beyond planning: OmniDrive's data, pseudo coordinates, the record's own truth.

OmniDrive's are folders `vqa`, `conv`, `desc`, `keywords` (each with `train` and `val`) and `eval_cf`, one
file per token; any file may be absent. Pseudo coordinates are the published `pseudo_coords`: arithmetic on
random points.

Where nobody has written language data about a keyframe, its record still knows what stands around the ego
vehicle, what it does, and what the ego vehicle did: questions, answers, and reasons for a plan. Nothing else
is said: every number is the record's, a velocity or a future that it does not know is called unknown or left
out, and colours, which no record has, are not spoken of. The wording is this project's.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import EGO_WIDTH, WAYPOINT_STEP
from spacedrive_jax.data.prompts import format_coordinates, format_number
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import MEBIBYTE, inside
from spacedrive_jax.json_files import read_json
from spacedrive_jax.restricted_pickle import read_pickle

ACTION_QUESTION = "Please shortly describe your driving action."
DESCRIPTION_QUESTIONS: tuple[str, ...] = (
    "What can you tell about the current driving conditions from the images?",
    "What can be observed in the panoramic images provided?",
    "Can you provide a summary of the current driving scenario based on the input images?",
    "What can you observe from the provided images regarding the driving conditions?",
    "Please describe the current driving conditions based on the images provided.",
    "Can you describe the current weather conditions and the general environment depicted in the images?",
    "Please describe the current driving conditions based on the input images.",
    "Could you summarize the current driving conditions based on the input images?",
    "Please provide an overview of the current driving conditions based on the images.",
    "Can you summarize what the panoramic images show?",
    "Can you describe the overall conditions and environment based on the images?",
    "Could you describe the overall environment and objects captured in the images provided?",
)
"""One is drawn for each description (protocol constants of OmniDrive)."""
KINDS = ("keywords", "desc", "vqa", "conv")
"""Folders of questions; the counterfactual pairs are in `vqa`."""
MOST_BYTES = 16 * MEBIBYTE
COUNTERFACTUAL_PAIRS = slice(2, 4)
"""Of a `vqa` file: attention, action, then two counterfactual pairs."""
REASON_PAIRS = slice(0, 2)
"""Those which speak of what matters and what to do about it."""


@dataclasses.dataclass(frozen=True)
class QuestionAnswer:
    """A question about a keyframe and its answer."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Counterfactual:
    """A trajectory, as text, and the risks of following it."""

    trajectory: str
    risks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LanguageData:
    """The folder that holds the language data."""

    root: Path

    def tokens(self, kinds: Iterable[str]) -> set[str]:
        """Tokens of all keyframes of which there is a file.

        Args:
            kinds: of the folders `KINDS`.

        Raises:
            DataError: there is no such folder, or none of them holds a file; the message says where such
                files lie, if they are one folder off.
        """
        folders = [self.root / kind / split for kind in kinds for split in ("train", "val")]
        found = {file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.json")}
        if found:
            return found
        elsewhere = next((path.parent for path in self.root.glob("*/vqa") if path.is_dir()), None)
        elsewhere = elsewhere or next((path.parent for path in self.root.glob("*/*/vqa")), None)
        hint = (
            f": is {elsewhere} meant?" if elsewhere else f" ({' or '.join(map(str, folders[:2]))}/TOKEN.json)"
        )
        raise DataError(f"the language data folder {self.root} holds no question{hint}")

    def questions(self, token: str, rng: np.random.Generator) -> list[QuestionAnswer]:
        """Action, description, `vqa` and `conv` pairs of a keyframe, in this order; those there are.

        Args:
            token: of the keyframe.
            rng: draws the question to which the description is the answer.

        Raises:
            DataError: a file is not laid out as it should be.
        """
        pairs = []
        path, action = self._read("keywords", token)
        if action is not None:
            pairs.append(QuestionAnswer(ACTION_QUESTION, _text(action, path, "the file")))
        path, description = self._read("desc", token)
        if description is not None:
            question = DESCRIPTION_QUESTIONS[int(rng.integers(len(DESCRIPTION_QUESTIONS)))]
            pairs.append(QuestionAnswer(question, _field(description, "description", path)))
        return pairs + self._pairs("vqa", token) + self._pairs("conv", token)

    def reasons(self, token: str) -> str:
        """What OmniDrive says before a plan: the answers to its attention and action questions, else the
        short action; empty where there is neither.

        Raises:
            DataError: a file is not laid out as it should be.
        """
        said = [pair.answer for pair in self._pairs("vqa", token)[REASON_PAIRS]]
        if not said:
            path, action = self._read("keywords", token)
            said = [] if action is None else [_text(action, path, "the file")]
        sentences = " ".join(" ".join(said).split())
        return sentences if not sentences or sentences.endswith((".", "!", "?")) else f"{sentences}."

    def counterfactual_questions(self, token: str) -> list[QuestionAnswer]:
        """The two counterfactual pairs of a keyframe (published `counter_only`).

        Raises:
            DataError: the file is not laid out as it should be.
        """
        return self._pairs("vqa", token)[COUNTERFACTUAL_PAIRS]

    def counterfactual_test(self, token: str) -> list[Counterfactual]:
        """The counterfactual test of a keyframe; empty where there is none.

        Raises:
            DataError: the file holds anything but plain values, or is not laid out as it should be.
        """
        path = inside(self.root, f"eval_cf/{token}.pkl", "the keyframe token")
        if not path.exists():
            return []
        items = []
        for item in _list(read_pickle(path), path):
            risks = item.get("status") if isinstance(item, dict) else None
            if not isinstance(risks, list | tuple):
                raise DataError(f"{path}: every item needs `traj`, a text, and `status`, a list of risks")
            items.append(Counterfactual(_field(item, "traj", path), tuple(map(str, risks))))
        return items

    def _pairs(self, kind: str, token: str) -> list[QuestionAnswer]:
        path, content = self._read(kind, token)
        if content is None:
            return []
        return [
            QuestionAnswer(_field(pair, "question", path), _field(pair, "answer", path))
            for pair in _list(content, path)
        ]

    def _read(self, kind: str, token: str) -> tuple[Path, Any]:
        """The file of a kind and what it holds; None where there is none."""
        for split in ("train", "val"):
            path = inside(self.root, f"{kind}/{split}/{token}.json", "the keyframe token")
            if path.exists():
                return path, read_json(path, most=MOST_BYTES)
        return path, None


def _list(content: Any, path: Path) -> list[Any]:
    if not isinstance(content, list):
        raise DataError(f"{path} must hold a list, not {type(content).__name__}")
    return content


def _field(item: Any, name: str, path: Path) -> str:
    if not isinstance(item, dict) or name not in item:
        raise DataError(f"{path}: {str(item)[:60]!r} lacks the field `{name}`")
    return _text(item[name], path, f"`{name}`")


def _text(value: Any, path: Path, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{path}: {name} must be a text, not {type(value).__name__}")
    return value


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


REACH = 50.0
"""Metres from the ego vehicle's origin; what is farther away is not spoken of."""
MOST_OBJECTS = 3
"""Objects that reasons speak of: what is on the ego vehicle's path, what is ahead, then the nearest."""
STANDING = 0.5
"""Metres a second below which something stands still."""
SPEED_CHANGE = 1.0
"""Metres a second between the first and the last half second that count as speeding up or slowing down."""
TURN = np.deg2rad(15.0)
"""Change of heading over three seconds that counts as a turn."""
SIDE_STEP = 1.5
"""Metres to the side, without a turn, that count as moving over."""
CLEARANCE = 0.5
"""Metres that must be left beside the ego vehicle for its path to be free."""
BEHIND_PATH = 10.0
"""Metres by which the path is looked ahead beyond the last waypoint."""

_NAMES = {
    "human.pedestrian": "pedestrian",
    "vehicle.bus": "bus",
    "vehicle.construction": "construction vehicle",
    "vehicle.emergency.ambulance": "ambulance",
    "vehicle.emergency.police": "police car",
    "movable_object.trafficcone": "traffic cone",
    "movable_object.pushable_pullable": "movable object",
    "static_object.bicycle_rack": "bicycle rack",
}
"""Words for nuScenes' categories, by how these begin; others are called by their last part."""
_PLURALS = {"bus": "buses", "debris": "pieces of debris"}
_SECTORS = (
    "ahead",
    "ahead on the left",
    "on the left",
    "behind on the left",
    "behind",
    "behind on the right",
    "on the right",
    "ahead on the right",
)
"""Eighths of a circle, the first centred on the heading, counter-clockwise."""
ASKED_KINDS = ("car", "truck", "bus", "pedestrian", "bicycle", "motorcycle", "traffic cone", "barrier")
"""Kinds whose number is asked for, whether there are any or not."""


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """What a record knows about an object, in words."""

    kind: str
    """`car`, `pedestrian`, …"""
    position: Float[np.ndarray, "2"]
    """Centre, metres, ego frame."""
    distance: float
    """Metres from the ego vehicle's origin."""
    where: str
    """`ahead on the left`, …"""
    motion: str
    """What it does now: a clause that begins with a verb."""
    future: str
    """What it will do: a clause that begins with `will`; empty where the record does not know."""
    on_path: bool
    """Within the ego vehicle's width and `CLEARANCE` of its path."""

    @property
    def point(self) -> str:
        """Its position as `(x, y)`, which becomes a coordinate token."""
        return format_coordinates(self.position[None])


def scene_objects(record: Record) -> list[SceneObject]:
    """The annotated objects within `REACH`, the nearest first (as annotated where as near)."""
    boxes = np.asarray(record["agent_boxes"], np.float64)
    distances = exact.norm(boxes[:, :2]) if len(boxes) else np.zeros(0)
    path = _path(record)
    order = np.argsort(distances, kind="stable")
    return [
        _scene_object(record, int(index), float(distances[index]), path)
        for index in order
        if distances[index] <= REACH
    ]


def scene_reasons(record: Record) -> str:
    """The words before a plan: what there is, what it does, what follows; ends with a full stop.

    Args:
        record: a keyframe with a whole future.
    """
    objects = scene_objects(record)
    told = sorted(objects, key=lambda each: (not each.on_path, each.position[0] <= 0))[:MOST_OBJECTS]
    sentences = [_inventory(objects)]
    for each in told:
        place = ", on our path," if each.on_path else ""
        clauses = " and ".join(filter(None, (each.motion, each.future)))
        sentences.append(f"The {each.kind} {each.where} at {each.point}{place} {clauses}.")
    if not any(each.on_path for each in objects):
        sentences.append("Our path is free.")
    sentences.append(ego_action(record))
    return " ".join(sentences)


def scene_questions(record: Record, rng: np.random.Generator) -> list[QuestionAnswer]:
    """Questions about a keyframe with their answers: what is there, how many, where, what it does and will
    do, and, where the whole future is known, what the ego vehicle does.

    Args:
        record: a keyframe.
        rng: draws which kinds and which object are asked about.
    """
    objects = scene_objects(record)
    counts = Counter(each.kind for each in objects)
    pairs = [QuestionAnswer("What is around the ego vehicle?", _inventory(objects))]
    kind = ASKED_KINDS[int(rng.integers(len(ASKED_KINDS)))]
    question = f"How many {_plural(kind)} are within {REACH:.0f} m?"
    pairs.append(QuestionAnswer(question, f"{counts[kind]}."))
    chosen = int(rng.integers(1 << 30))
    if objects:
        kinds = sorted(counts)
        kind = kinds[chosen % len(kinds)]
        nearest = next(each for each in objects if each.kind == kind)
        answer = f"It is {nearest.where} at {nearest.point}."
        pairs.append(QuestionAnswer(f"Where is the nearest {kind}?", answer))
        asked = objects[chosen % len(objects)]
        pairs.append(QuestionAnswer(f"What is at {asked.point}?", f"{_article(asked.kind).capitalize()}."))
        question = f"What will the {asked.kind} at {asked.point} do?"
        answer = " and ".join(filter(None, (f"It {asked.motion}", asked.future)))
        pairs.append(QuestionAnswer(question, f"{answer}."))
    if np.all(record["waypoint_mask"]):
        pairs.append(QuestionAnswer(ACTION_QUESTION, ego_action(record)))
    return pairs


def ego_action(record: Record) -> str:
    """What the ego vehicle does over the next three seconds, as a sentence.

    Args:
        record: a keyframe with a whole future.
    """
    points = np.concatenate([np.zeros((1, 2)), np.asarray(record["waypoints"], np.float64)])
    speeds = exact.norm(points[1:] - points[:-1]) / WAYPOINT_STEP
    first, last = float(speeds[0]), float(speeds[-1])
    if float(speeds.max()) < STANDING:
        return "We stand still."
    if last < STANDING:
        pace = "stop"
    elif last - first > SPEED_CHANGE:
        pace = "speed up"
    elif first - last > SPEED_CHANGE:
        pace = "slow down"
    else:
        pace = "keep our speed"
    yaw, side = float(record["waypoint_yaw"][-1]), float(points[-1, 1])
    if abs(yaw) > TURN:
        way = f"turn {_side(yaw)}"
    elif abs(side) > SIDE_STEP:
        way = f"move to the {_side(side)}"
    else:
        way = "go straight on"
    return f"We {pace} and {way}."


def _scene_object(record: Record, index: int, distance: float, path: Float[np.ndarray, "K 2"]) -> SceneObject:
    box = np.asarray(record["agent_boxes"][index], np.float64)
    eighth = exact.arctan2(box[1], box[0]) / (np.pi / 4)
    free = EGO_WIDTH / 2 + float(box[4]) / 2 + CLEARANCE
    return SceneObject(
        kind=_kind(record["agent_category"][index]),
        position=box[:2],
        distance=distance,
        where=_SECTORS[int(np.floor(eighth + 0.5)) % len(_SECTORS)],
        motion=_motion(np.asarray(record["agent_velocity"][index], np.float64)),
        future=_future(record, index),
        on_path=_distance_to_path(box[:2], path) < free,
    )


def _motion(velocity: Float[np.ndarray, "2"]) -> str:
    if not np.isfinite(velocity).all():
        return "has a speed that is not known"
    speed = float(exact.norm(velocity))
    if speed < STANDING:
        return "stands still"
    along, across = float(velocity[0]), float(velocity[1])
    if abs(across) > abs(along):
        way = f"to the {_side(across)}"
    else:
        way = "our way" if along > 0 else "the other way"
    return f"moves {way} at {speed:.1f} m/s"


def _future(record: Record, index: int) -> str:
    mask = np.asarray(record["agent_future_mask"][index], bool)
    known = np.flatnonzero(mask)
    if not len(known):
        return ""
    last = int(known[-1])
    seconds = f"{(last + 1) * WAYPOINT_STEP:.1f}".removesuffix(".0")
    moved = np.asarray(record["agent_future"][index][last], np.float64)
    if float(exact.norm(moved)) < 2 * STANDING:
        return f"will stay there for {seconds} s"
    reached = np.asarray(record["agent_boxes"][index][:2], np.float64) + moved
    turned = float(record["agent_future_yaw"][index][last]) - float(record["agent_boxes"][index][6])
    cos, sin = exact.cos_sin(turned)
    turned = float(exact.arctan2(sin, cos))  # into half a turn either way
    turning = f"turn {_side(turned)} and " if abs(turned) > TURN else ""
    return f"will {turning}be at {format_coordinates(reached[None])} in {seconds} s"


def _path(record: Record) -> Float[np.ndarray, "K 2"]:
    """Where the ego vehicle goes, and `BEHIND_PATH` metres straight on from there."""
    known = np.asarray(record["waypoint_mask"], bool)
    points = np.concatenate([np.zeros((1, 2)), np.asarray(record["waypoints"], np.float64)[known]])
    yaw = float(record["waypoint_yaw"][np.flatnonzero(known)[-1]]) if known.any() else 0.0
    cos, sin = exact.cos_sin(yaw)
    return np.concatenate([points, points[-1:] + BEHIND_PATH * np.array([[cos, sin]])])


def _distance_to_path(point: Float[np.ndarray, "2"], path: Float[np.ndarray, "K 2"]) -> float:
    """To the nearest of its segments, metres; infinite for what lies behind the vehicle."""
    if point[0] <= 0:
        return float("inf")
    starts, steps = path[:-1], path[1:] - path[:-1]
    lengths = np.maximum(exact.dot(steps, steps), 1e-12)
    share = np.clip(exact.dot(point - starts, steps) / lengths, 0.0, 1.0)
    return float(exact.norm(point - starts - share[:, None] * steps).min())


def _inventory(objects: Sequence[SceneObject]) -> str:
    if not objects:
        return f"There is nothing within {REACH:.0f} m."
    counts = sorted(Counter(each.kind for each in objects).items(), key=lambda item: (-item[1], item[0]))
    parts = [_article(kind) if count == 1 else f"{count} {_plural(kind)}" for kind, count in counts]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    verb = "is" if counts[0][1] == 1 else "are"
    return f"There {verb} {listed} within {REACH:.0f} m."


def _kind(category: str | bytes) -> str:
    name = category.decode() if isinstance(category, bytes) else category
    known = next((word for start, word in _NAMES.items() if name.startswith(start)), None)
    return known or name.rsplit(".", 1)[-1].replace("_", " ")


def _plural(kind: str) -> str:
    return _PLURALS.get(kind, f"{kind}s")


def _article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def _side(value: float) -> str:
    return "left" if value > 0 else "right"
