"""Counterfactual answers: does one name the risks of the trajectory that is asked about?

A keyframe has candidate trajectories, each with its true risks, and a question about one of them. The
published script (OmniDrive, SpaceDrive) finds risks in the answer by keyword; `RULES` has that rule and a
corrected one. Answers and annotations are one file per keyframe, or one JSON object for all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.prediction_files import PICKLE_SUFFIXES, read_pickled
from spacedrive_jax.json_files import read_json, read_json_lines

RISKS = ("collision", "red_light", "drivable_area")
STATUS_RISKS: Mapping[str, str] = MappingProxyType(
    {
        "Collision": "collision",
        "Run the red light": "red_light",
        "Out of the drivable area": "drivable_area",
    }
)
"""The annotations' words for the risks."""

_NEGATION = re.compile(r"\b(no|not|never|without|avoid\w*|free of|neither|nor|cannot|safe from)\b|n't\b")
_CLAUSE = re.compile(r"[.;,!?\n]|\bbut\b|\bhowever\b|\band\b")
_SIGNS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "collision": re.compile(r"\b(collision|collisions|collide\w*|colliding|crash\w*)\b"),
        "red_light": re.compile(
            r"\b(run\w*|ran|jump\w*|ignor\w*|violat\w*|through|cross\w*)\b.*\bred (traffic )?light\b"
        ),
        "drivable_area": re.compile(
            r"\b(out|outside|off|leav\w*|left|beyond|exit\w*|depart\w*)\b.*\bdriv(e)?able area\b"
        ),
    }
)


def published_risks(answer: str) -> frozenset[str]:
    """Risks by the published rule: case-sensitive fragments anywhere.

    So `collision` in lower case is none, `reduce` runs a red light, and `no Collision` is one.
    """
    fragments = {"collision": "Collision", "red_light": "red", "drivable_area": "drivable area"}
    return frozenset(risk for risk, fragment in fragments.items() if fragment in answer)


def corrected_risks(answer: str) -> frozenset[str]:
    """Risks said to happen: whole words in any case, clause by clause, but not where a clause denies them."""
    clauses = [clause for clause in _CLAUSE.split(answer.lower()) if not _NEGATION.search(clause)]
    return frozenset(risk for risk, sign in _SIGNS.items() if any(sign.search(clause) for clause in clauses))


RULES: Mapping[str, Callable[[str], frozenset[str]]] = MappingProxyType(
    {"published": published_risks, "corrected": corrected_risks}
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A trajectory a question may be about."""

    trajectory: str
    """Its text, `PT, [(+1.20, …), …]`."""
    risks: frozenset[str]
    """Those of `RISKS` it runs; none means safe."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One answered question."""

    token: str
    question: str
    """Names one of the candidates by its numbers."""
    answer: str
    candidates: Sequence[Candidate]
    """The keyframe's trajectories."""

    def subject(self) -> Candidate | None:
        """The first candidate whose numbers the question contains, as published; None where none is."""
        # Between `PT, [` and `]`.
        return next((each for each in self.candidates if each.trajectory[5:-1] in self.question), None)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Right and wrong answers about one risk."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    def to_json(self) -> dict[str, float | int | None]:
        """The counts, and accuracy, precision and recall from 0 to 1 (None where nothing counts)."""
        right = self.true_positive + self.true_negative
        return {
            **dataclasses.asdict(self),
            "accuracy": _ratio(right, right + self.false_positive + self.false_negative),
            "precision": _ratio(self.true_positive, self.true_positive + self.false_positive),
            "recall": _ratio(self.true_positive, self.true_positive + self.false_negative),
        }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def count_risks(items: Iterable[Item], rule: str) -> tuple[dict[str, Counts], tuple[str, ...]]:
    """Counts right and wrong answers per risk and for `safe` (no risk at all).

    Args:
        items: answered questions.
        rule: a key of `RULES`.

    Returns:
        The counts, and the tokens of questions that name none of their candidates (not counted, as
        published).
    """
    find = RULES[rule]
    pairs: list[tuple[frozenset[str], frozenset[str]]] = []
    unmatched = []
    for item in items:
        subject = item.subject()
        if subject is None:
            unmatched.append(item.token)
        else:
            pairs.append((find(item.answer), subject.risks))
    counts = {risk: _count([(risk in said, risk in true) for said, true in pairs]) for risk in RISKS}
    counts["safe"] = _count([(not said, not true) for said, true in pairs])
    return counts, tuple(unmatched)


def _count(pairs: Sequence[tuple[bool, bool]]) -> Counts:
    """Counts pairs of (said, true)."""
    kinds = ((True, True), (True, False), (False, True), (False, False))
    return Counts(*(pairs.count(kind) for kind in kinds))


def parse_candidates(content: Any) -> list[Candidate]:
    """Candidates from `[{"traj": "PT, [(…)…]", "status": ["Collision", …]}, …]`.

    Raises:
        ValueError: the content is not such a list (the message says what is wrong).
    """
    if not isinstance(content, list):
        raise ValueError(f"expected a list of candidate trajectories, found {type(content).__name__}")
    candidates = []
    for index, entry in enumerate(content):
        trajectory = entry.get("traj") if isinstance(entry, dict) else None
        statuses = entry.get("status") if isinstance(entry, dict) else None
        if not isinstance(trajectory, str) or not isinstance(statuses, list):
            raise ValueError(f'candidate {index} needs "traj", a text, and "status", a list')
        if not trajectory[5:-1].strip():
            raise ValueError(f"candidate {index}: traj {trajectory!r} has no point, so any question names it")
        unknown = [status for status in statuses if not isinstance(status, str) or status not in STATUS_RISKS]
        if unknown:
            raise ValueError(
                f"candidate {index} has status {unknown[0]!r}, not one of {', '.join(STATUS_RISKS)}"
            )
        candidates.append(Candidate(trajectory, frozenset(STATUS_RISKS[status] for status in statuses)))
    return candidates


ANSWER_KEYS = ("C", "A")
"""The published script reads "C", which the published model does not write (fidelity Q42); it writes "A"."""


@dataclasses.dataclass(frozen=True)
class CounterfactualItems:
    """Answered questions and what is missing to them."""

    items: tuple[Item, ...]
    """Questions with an answer and annotations."""
    unanswered: tuple[str, ...]
    """Annotated keyframes without an answer."""
    unannotated: tuple[str, ...]
    """Answered keyframes without annotations."""


def read_items(predictions: Path, annotations: Path, *, every_question: bool = False) -> CounterfactualItems:
    """Reads answers and annotations and pairs them by token.

    Args:
        predictions: token to `[{"Q": question, "C" or "A": answer}, …]`, or JSON Lines of
            `{"token", "Q", "A"}`.
        annotations: token to `[{"traj": "PT, [(…)…]", "status": […]}, …]`.
            Each is a folder with a file per token (JSON with or without .json, or .pkl), or one such file
            with an object of token to content.
        every_question: take all questions about a keyframe; the published script takes the first.

    Raises:
        DataError: something cannot be read, or no keyframe has both.
    """
    answers, candidates = _read_by_token(predictions), _read_by_token(annotations)
    items = []
    for token in sorted(answers.keys() & candidates.keys()):
        pairs = _pairs(answers[token], f"{predictions}, {token}")
        try:
            subjects = parse_candidates(candidates[token])
        except ValueError as error:
            raise DataError(f"{annotations}, {token}: {error}") from None
        chosen = pairs if every_question else pairs[:1]
        items += [Item(token, question, answer, subjects) for question, answer in chosen]
    if not items:
        raise DataError(f"{predictions} and {annotations} have no keyframe in common")
    return CounterfactualItems(
        tuple(items),
        unanswered=tuple(sorted(candidates.keys() - answers.keys())),
        unannotated=tuple(sorted(answers.keys() - candidates.keys())),
    )


def _read_by_token(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise DataError(f"{path} holds no file")
        content = {file.stem: _load(file) for file in files}
        if len(content) < len(files):
            raise DataError(f"{path}: a token has more than one file")
        return content
    content = _read_lines(path) if path.suffix == ".jsonl" else _load(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of token to content, found {type(content).__name__}")
    return content


def _load(path: Path) -> Any:
    if path.suffix in PICKLE_SUFFIXES:
        return read_pickled(path)
    try:
        return read_json(path)
    except DataError as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None


def _read_lines(path: Path) -> dict[str, list[Any]]:
    """Token to the lines about it, in their order."""
    content: dict[str, list[Any]] = {}
    for where, line in read_json_lines(path):
        token = line.get("token") if isinstance(line, dict) else None
        if not isinstance(token, str):
            raise DataError(f'{where} expected {{"token", "Q", "A"}}, found {str(line)[:60]}')
        content.setdefault(token, []).append(line)
    return content


def _pairs(content: Any, where: str) -> list[tuple[str, str]]:
    """Questions and answers about a keyframe; at least one."""
    if not isinstance(content, list) or not content:
        raise DataError(f'{where}: expected [{{"Q": question, "C" or "A": answer}}, …]')
    return [_pair(each, where) for each in content]


def _pair(content: Any, where: str) -> tuple[str, str]:
    known = content if isinstance(content, dict) else {}
    question = known.get("Q")
    answer = next((known[key] for key in ANSWER_KEYS if key in known), None)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(f'{where}: expected [{{"Q": question, "C" or "A": answer}}, …], all texts')
    return question, answer
