"""Which keyframes a report shows, and what it says about each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.data.conversation import question_coordinates, question_turn
from spacedrive_jax.data.prompts import CommandSource
from spacedrive_jax.data.records import Records
from spacedrive_jax.data.records_folder import read_provenance
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.tokenizer import COORDINATE, INDICATOR, POSITION
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.evaluation.predictions import Predictions, constant_velocity, standing_still
from spacedrive_jax.reporting.birds_eye import birds_eye_view
from spacedrive_jax.reporting.cameras import camera_strip, depth_source, front_overlay
from spacedrive_jax.reporting.figures import to_jpeg
from spacedrive_jax.reporting.run_files import RunDepth

# Where camera images come from, in words: photographed, rendered, or absent.


PHOTOGRAPHED_VERSIONS = frozenset({"v1.0-trainval", "v1.0-test", "v1.0-mini"})
"""The official nuScenes versions: their image files are photographs. Of others only the origin is known."""


@dataclasses.dataclass(frozen=True)
class ImageOrigin:
    """How many camera images are of which kind."""

    original: int = 0
    """Taken from the dataset's own image files."""
    rendered: int = 0
    """Drawn when the records were made, because the dataset had no file."""
    absent: int = 0
    """Cameras without pixels."""

    def __add__(self, other: ImageOrigin) -> ImageOrigin:
        return ImageOrigin(
            self.original + other.original, self.rendered + other.rendered, self.absent + other.absent
        )

    def describe(self, provenance: dict[str, Any]) -> str:
        """In words, for example `4 photographed, 2 rendered of 6`.

        Args:
            provenance: of the records folder; its dataset version says whether files are photographs.
        """
        version = provenance.get("source", {}).get("version", "an unnamed dataset")
        kind = "photographed" if version in PHOTOGRAPHED_VERSIONS else f"from the files of {version}"
        counts = ((self.original, kind), (self.rendered, "rendered"), (self.absent, "absent"))
        parts = [(count, word) for count, word in counts if count]
        total = self.original + self.rendered + self.absent
        if len(parts) == 1:
            return f"all {total} {parts[0][1]}"
        return ", ".join(f"{count} {word}" for count, word in parts) + f" of {total}"


def image_origin(record: Record) -> ImageOrigin:
    """Counts the record's camera images by kind."""
    present = np.array([bool(image) for image in record["images"]])
    rendered = np.asarray(record["image_rendered"], bool)
    return ImageOrigin(
        int((present & ~rendered).sum()), int((present & rendered).sum()), int((~present).sum())
    )


MOVING_M = 2.0
"""A vehicle that is farther than this from its place after 3 s moves."""
IMAGE_MARK = "<image>\n"
TOKEN_MEANINGS: Mapping[str, str] = {
    INDICATOR: f"{INDICATOR} announces a coordinate: the decoder reads it, in metres, from the hidden state "
    "behind it.",
    POSITION: f"{POSITION} is where a coordinate's encoding stands.",
}
"""What the two tokens that the project adds to the tokenizer mean."""
DEPTH_TEXTS: Mapping[str, str] = {
    "run": "Depth: what the run saw on its grid of visual tokens; each camera's source is written on it.",
    "exact": "Depth: exact depth images of the records.",
    "lidar": "Depth: LiDAR points of the keyframe's sweep over the darkened views.",
    "none": "No depth is shown: the record has neither depth images nor a LiDAR sweep.",
}


@dataclasses.dataclass(frozen=True)
class SplitErrors:
    """Waypoint errors over a split, and where its pictures come from."""

    errors: Mapping[str, Float[np.ndarray, "S T"]]
    """Planner name to distances in metres, rows in the order of its keyframes; `prediction` only has rows for
    `tokens`."""
    tokens: tuple[str, ...]
    """Keyframes with a whole future and a usable prediction, in record order."""
    scenes: tuple[str, ...]
    """The scene of each of `tokens`."""
    driven: tuple[float, ...]
    """How far each of `tokens` is from where it stood 3 s before, metres."""
    index_of: Mapping[str, int]
    """Token to its index in the split, for all keyframes."""
    images: ImageOrigin
    """Where its camera images come from."""


def measure_split(
    records: Records,
    predictions: Predictions | None,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> SplitErrors:
    """Reads a split once: errors of the prediction and two baselines on the keyframes the prediction covers.

    Without predictions the baselines cover every keyframe with a whole future.
    """
    rows: dict[str, list[np.ndarray]] = {"prediction": [], "constant_velocity": [], "standing_still": []}
    tokens: list[str] = []
    scenes: list[str] = []
    driven: list[float] = []
    index_of: dict[str, int] = {}
    images = ImageOrigin()
    for index in track(range(len(records))):
        record = records[index]
        index_of[record["token"]] = index
        images += image_origin(record)
        waypoints = predictions.waypoints.get(record["token"]) if predictions else None
        if not np.all(record["waypoint_mask"]) or (predictions is not None and waypoints is None):
            continue
        tokens.append(record["token"])
        scenes.append(record["scene_name"])
        driven.append(float(exact.norm(record["waypoints"][-1])))
        plans = {"constant_velocity": constant_velocity(record), "standing_still": standing_still()}
        if waypoints is not None:
            plans["prediction"] = waypoints
        for name, answer in plans.items():
            rows[name].append(exact.norm(answer - record["waypoints"]))
    errors = {name: np.stack(values) for name, values in rows.items() if values}
    return SplitErrors(errors, tuple(tokens), tuple(scenes), tuple(driven), index_of, images)


@dataclasses.dataclass(frozen=True)
class Case:
    """One keyframe on the page."""

    title: str
    """Why it is shown."""
    details: Mapping[str, str]
    """Short name to short value."""
    birds_eye: str
    """PNG data address."""
    front: str | None
    """JPEG data address of the front view with paths, None without pixels."""
    strip: str | None
    """JPEG data address of the six views with depth, None without pixels."""
    images: str
    """Where the camera images come from, in words."""
    depth: str
    """Where the depth comes from, in words."""
    has_depth: bool
    """Whether depth is shown in the strip."""
    question: str
    """What the model was asked, "" where the run does not say."""
    answer: str
    """The model's answer, "" where there is none."""
    words: str
    """What the new tokens in question and answer mean, "" where there are none."""


def choose_cases(measured: SplitErrors, highlights: Sequence[str]) -> list[tuple[str, str]]:
    """(title, token) of the best moving, median and worst keyframes by waypoint error, then the highlights.

    The three worst are shown, of different scenes where there are as many: neighbours fail alike.

    Raises:
        ConfigError: a highlighted token is not in the split.
    """
    chosen: list[tuple[str, str]] = []
    if "prediction" in measured.errors:
        order = np.argsort(measured.errors["prediction"].mean(axis=1), kind="stable")
        worst: dict[str, int] = {}
        for place in order[::-1]:
            worst.setdefault(measured.scenes[place], int(place))
        # A vehicle at rest is the easiest to foresee, and a page that opens with one says little.
        moving = next((place for place in order if measured.driven[place] > MOVING_M), None)
        best = ("Best", order[0]) if moving is None else ("Best that moves", moving)
        places = [best, ("Median", order[len(order) // 2])]
        places += zip(("Worst", "Second worst scene", "Third worst scene"), worst.values(), strict=False)
        chosen = [(title, measured.tokens[place]) for title, place in places]
    for token in highlights:
        if token not in measured.index_of:
            raise ConfigError(f"--highlight {token}: no such keyframe in the split")
        chosen.append(("Highlighted", token))
    if not chosen and measured.index_of:
        chosen = [("First keyframe", next(iter(measured.index_of)))]
    titles: dict[str, str] = {}
    for title, token in chosen:
        titles.setdefault(token, title)  # a keyframe is shown once, under its first title
    return [(title, token) for token, title in titles.items()]


def question_of(record: Record, config: Mapping[str, Any] | None) -> str:
    """What a run asks about a keyframe, the images in one word; "" where its config does not say.

    Args:
        record: the keyframe.
        config: the run's `config.json`, if there is one.
    """
    data = (config or {}).get("data") or {}
    command: Any = data.get("command")
    if command not in get_args(CommandSource) or "target_points" not in data:
        return ""
    in_words = ((config or {}).get("model") or {}).get("ego_status") == "language"
    thinks = (data.get("conversation") or {}).get("tasks") == "think_before_planning"
    targets = bool(data["target_points"])
    return asked(record, command, ego_in_words=in_words, target_points=targets, reasons=thinks)


def asked(
    record: Record,
    command: CommandSource,
    *,
    ego_in_words: bool,
    target_points: bool,
    reasons: bool = False,
) -> str:
    """The question about a keyframe with its coordinates in metres, the images in one word.

    Args: see `data.conversation.question_turn`.
    """
    text = question_turn(
        record, command, ego_in_words=ego_in_words, target_points=target_points, reasons=reasons
    ).content
    for x, y in question_coordinates(record, target_points=target_points).tolist():
        text = text.replace(COORDINATE, f"{INDICATOR}({x:.2f}, {y:.2f})", 1)
    images = text.count(IMAGE_MARK)
    return f"[{images} images] " + text.replace(IMAGE_MARK, "").strip()


def explained(text: str) -> str:
    """What the project's tokens that a text holds mean, in a line."""
    return " ".join(meaning for token, meaning in TOKEN_MEANINGS.items() if token in text)


def make_case(
    title: str,
    token: str,
    records: Records,
    measured: SplitErrors,
    predictions: Predictions | None,
    config: Mapping[str, Any] | None = None,
    run_depth: RunDepth | None = None,
) -> Case:
    """Draws one keyframe; `config` is the run's `config.json`, for the question, `run_depth` what it saw."""
    record = records[measured.index_of[token]]
    waypoints = predictions.waypoints.get(token) if predictions else None
    seen = run_depth(record) if run_depth is not None else None
    front, strip = front_overlay(record, waypoints), camera_strip(record, seen)
    details = {"keyframe": token, "scene": f"{record['scene_name']}, frame {int(record['frame_index'])}"}
    details["location"] = record["location"] or "-"
    if waypoints is not None and np.all(record["waypoint_mask"]):
        error = exact.norm(waypoints - record["waypoints"])
        details["error"] = f"{error.mean():.2f} m mean, {error[-1]:.2f} m at 3 s"
    elif waypoints is None:
        details["error"] = _why_no_plan(token, predictions)
    else:
        details["error"] = "not scored: the recorded future is incomplete"
    question = question_of(record, config)
    answer = predictions.text.get(token, "") if predictions else ""
    return Case(
        title=title,
        details=details,
        birds_eye=birds_eye_view(record, waypoints),
        front=None if front is None else to_jpeg(front),
        strip=None if strip is None else to_jpeg(strip),
        images=image_origin(record).describe(read_provenance(records.directory)),
        depth=DEPTH_TEXTS[depth_source(record, seen)],
        has_depth=depth_source(record, seen) != "none",
        question=question,
        answer=answer,
        words=explained(question + answer),
    )


def _why_no_plan(token: str, predictions: Predictions | None) -> str:
    if predictions is None:
        return "no predictions"
    if token in predictions.unparsed:
        return "unparsed: the answer holds no trajectory"
    return "no usable prediction"
