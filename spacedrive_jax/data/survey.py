"""What the keyframes of a run need, without decoding a picture: room for tokens, images, depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import tensorflow_datasets as tfds

from spacedrive_jax.console import progress
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.depth_cache import DepthCache
from spacedrive_jax.data.depth_sources import NETWORKS
from spacedrive_jax.data.ego_status import insert_ego_tokens
from spacedrive_jax.data.loader import MixedSamples, Samples, evenly_spaced
from spacedrive_jax.data.records import TEXT_FEATURES
from spacedrive_jax.data.schema import Record, record_features
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.family import IGNORE

LOOKED_AT = 256
"""Keyframes whose tokens are counted before a run starts, evenly spaced; `survey` counts all."""
VALIDATED_LOOKED_AT = 128
"""Keyframes of a validation that are looked at before a run starts."""
NOT_SAID = ("drivable", "camera_", "lidar_to_ego", "images", "exact_depth", "lidar")
"""Features that no conversation depends on."""
PICTURES = ("images", "exact_depth", "lidar")


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found; a token names an example."""

    keyframes: int
    sequence_length: int
    """The longest conversation, tokens."""
    max_targets: int
    max_coordinates: int
    longest: str
    """The keyframe that needs most of what is short, else the longest."""
    without_image: tuple[str, ...] = ()
    """Keyframes that lack a camera's image."""
    without_depth: tuple[str, ...] = ()
    """Keyframes with a camera that has depth from none of the run's sources."""


def survey(samples: Samples | MixedSamples) -> Survey:
    """Looks at every keyframe of a run.

    Args:
        samples: of the run, with answers.
    """
    counter = _Counter(pictures=True)
    parts = samples.parts if isinstance(samples, MixedSamples) else [samples]
    for part in parts:
        rows = progress(part.indices, desc=f"look at {part.records.directory}", unit="keyframe")
        counter.count(part, rows)
    return counter.result()


def check_lengths(samples: Samples | MixedSamples) -> None:
    """Refuses a config whose fixed shapes are too small for its conversations.

    Looks at up to `LOOKED_AT` keyframes of each folder; `survey` at all.

    Args:
        samples: of the run, with answers.

    Raises:
        ConfigError: naming every field that is too small, and what it must be.
    """
    counter = _Counter(pictures=False)
    parts = samples.parts if isinstance(samples, MixedSamples) else [samples]
    for part in parts:
        counter.count(part, [part.indices[index] for index in evenly_spaced(len(part), LOOKED_AT)])
    found = counter.result()
    flags = too_small(parts[0].builder, found)
    if flags:
        raise ConfigError(
            f"keyframe {found.longest}: its conversation does not fit; set {' '.join(flags)} or more. (Of "
            f"{found.keyframes} keyframes that were looked at; --dry-run looks at all)"
        )


def check_validated(parts: Sequence[Samples]) -> None:
    """Refuses keyframes that a validation would fail at: too long, without an image or without depth.

    Looks at up to `VALIDATED_LOOKED_AT` of them.

    Args:
        parts: of the folders, with answers.

    Raises:
        ConfigError: naming what is short or lacks.
    """
    counter = _Counter(pictures=True)
    rows = [(part, row) for part in parts for row in part.indices]
    for index in evenly_spaced(len(rows), VALIDATED_LOOKED_AT):
        part, row = rows[index]
        counter.count(part, [row])
    problems = problems_of(parts[0].builder, counter.result())
    if problems:
        raise ConfigError(f"of split val, which is validated: {'; '.join(problems)}")


def problems_of(builder: SampleBuilder, found: Survey) -> list[str]:
    """What of the keyframes would stop a run, with the way out; empty where nothing would."""
    problems = []
    flags = too_small(builder, found)
    if flags:
        problems.append(f"keyframe {found.longest} does not fit the config's shapes: set {' '.join(flags)}")
    if found.without_image:
        problems.append(
            f"{len(found.without_image)} keyframes lack an image ({found.without_image[0]} is one): convert "
            "with --missing-images render, or skip"
        )
    if found.without_depth:
        sources = ", ".join(builder.data.depth.sources)
        problems.append(
            f"{len(found.without_depth)} keyframes have a camera without depth from {sources} "
            f"({found.without_depth[0]} is one): set data.depth.sources to what the records have"
        )
    return problems


def too_small(builder: SampleBuilder, found: Survey) -> list[str]:
    """The flags that would make room for what was found; empty where there is room."""
    needed = {
        name: (getattr(builder.data, name), getattr(found, name))
        for name in ("sequence_length", "max_targets", "max_coordinates")
    }
    return [
        f"--data.{name.replace('_', '-')} {need} (it is {held})"
        for name, (held, need) in needed.items()
        if need > held
    ]


class _Counter:
    """Keeps the largest of what it sees."""

    def __init__(self, *, pictures: bool) -> None:
        self._pictures = pictures
        features = record_features()
        names = [
            name for name in features if not name.startswith(NOT_SAID) or (pictures and name in PICTURES)
        ]
        self._features = tfds.features.FeaturesDict({name: features[name] for name in names})
        self._sizes: dict[tuple[str, ...], tuple[int, int]] = {}
        self._most = {"sequence_length": 0, "max_targets": 0, "max_coordinates": 0}
        self._keyframes, self._longest = 0, ""
        self._lacking: dict[str, list[str]] = {"image": [], "depth": []}

    def count(self, samples: Samples, rows: Iterable[int]) -> None:
        """Looks at some rows of one folder."""
        builder, records = samples.builder, samples.records
        needs_depth, cache = builder.model.visual_positions != "none", samples.depth
        for row in rows:
            record = _with_texts(records.source.decode(row, self._features))
            token = record["token"]
            self._keyframes += 1
            if self._say(builder, record) or not self._longest:
                self._longest = token
            if not self._pictures:
                continue
            if not all(record["images"]):
                self._lacking["image"].append(token)
            if needs_depth and not _has_depth(record, builder, cache):
                self._lacking["depth"].append(token)

    def result(self) -> Survey:
        """What was seen."""
        return Survey(
            keyframes=self._keyframes,
            longest=self._longest,
            without_image=tuple(self._lacking["image"]),
            without_depth=tuple(self._lacking["depth"]),
            **self._most,
        )

    def _say(self, builder: SampleBuilder, record: Record) -> bool:
        """Counts a conversation's tokens; whether it needs more of something than any before."""
        talk = builder.conversation(record)
        key = tuple(turn.content for turn in talk.turns)
        if key not in self._sizes:  # most keyframes of a planning run are told the same words
            chat, _ = insert_ego_tokens(builder.tokenizer, builder.chat(talk), builder.model.ego_status)
            self._sizes[key] = len(chat.token_ids), sum(label != IGNORE for label in chat.labels)
        length, targets = self._sizes[key]
        needs = {
            "sequence_length": length,
            "max_targets": targets,
            "max_coordinates": len(talk.coordinates),
        }
        more = any(needs[name] > self._most[name] for name in needs)
        self._most = {name: max(needs[name], most) for name, most in self._most.items()}
        return more


def _with_texts(record: Record) -> Record:
    texts = [name for name in TEXT_FEATURES if name in record]
    return record | {name: record[name].decode(errors="replace") for name in texts}


def _has_depth(record: Record, builder: SampleBuilder, cache: DepthCache | None) -> bool:
    """Whether every camera has depth from one of the run's sources, by what is there, not by its values."""

    def has(camera: int) -> bool:
        sources = builder.data.depth.sources
        in_cache = cache is not None and record["token"] in cache and bool(record["images"][camera])
        return (
            ("exact" in sources and bool(record["exact_depth"][camera]))
            or ("lidar" in sources and bool(record["lidar"]))
            or (in_cache and any(source in (*NETWORKS, "fused") for source in sources))
        )

    return all(has(camera) for camera in range(len(CAMERAS)))
