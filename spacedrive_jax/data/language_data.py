"""Language about a keyframe beyond planning: OmniDrive's data, and arithmetic on random coordinates.

OmniDrive's are folders `vqa`, `conv`, `desc`, `keywords` (each with `train` and `val`) and `eval_cf`, one
file per token; any file may be absent. The arithmetic is the published `pseudo_coords`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from spacedrive_jax.data.prompts import format_number
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
