"""Reading counterfactual answers and their annotations: one file per keyframe, or one JSON object for all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.console import UserError
from spacedrive_jax.evaluation.counterfactual.risks import Item, parse_candidates
from spacedrive_jax.evaluation.trajectory_files import PICKLE_SUFFIXES, read_pickled

ANSWER_KEYS = ("C", "A")
"""The published script reads "C", which the published model does not write; it writes "A"."""


@dataclasses.dataclass(frozen=True)
class CounterfactualItems:
    """Answered questions and what is missing to them.

    Attributes:
        items: questions with an answer and annotations.
        unanswered: annotated keyframes without an answer.
        unannotated: answered keyframes without annotations.
    """

    items: tuple[Item, ...]
    unanswered: tuple[str, ...]
    unannotated: tuple[str, ...]


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
        UserError: something cannot be read, or no keyframe has both.
    """
    answers, candidates = _read_by_token(predictions), _read_by_token(annotations)
    items = []
    for token in sorted(answers.keys() & candidates.keys()):
        pairs = _pairs(answers[token], f"{predictions}, {token}")
        try:
            subjects = parse_candidates(candidates[token])
        except ValueError as error:
            raise UserError(f"{annotations}, {token}: {error}") from None
        chosen = pairs if every_question else pairs[:1]
        items += [Item(token, question, answer, subjects) for question, answer in chosen]
    if not items:
        raise UserError(f"{predictions} and {annotations} have no keyframe in common")
    return CounterfactualItems(
        tuple(items),
        unanswered=tuple(sorted(candidates.keys() - answers.keys())),
        unannotated=tuple(sorted(answers.keys() - candidates.keys())),
    )


def _read_by_token(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise UserError(f"{path} holds no file")
        content = {file.stem: _load(file) for file in files}
        if len(content) < len(files):
            raise UserError(f"{path}: a token has more than one file")
        return content
    content = _read_lines(path) if path.suffix == ".jsonl" else _load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of token to content, found {type(content).__name__}")
    return content


def _load(path: Path) -> Any:
    if path.suffix in PICKLE_SUFFIXES:
        return read_pickled(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def _read_lines(path: Path) -> dict[str, list[Any]]:
    """Token to the lines about it, in their order."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON Lines ({error})") from None
    content: dict[str, list[Any]] = {}
    for number, line in enumerate(lines, start=1):
        token = line.get("token") if isinstance(line, dict) else None
        if not isinstance(token, str):
            raise UserError(f'{path}, line {number}: expected {{"token", "Q", "A"}}, found {str(line)[:60]}')
        content.setdefault(token, []).append(line)
    return content


def _pairs(content: Any, where: str) -> list[tuple[str, str]]:
    """Questions and answers about a keyframe; at least one."""
    if not isinstance(content, list) or not content:
        raise UserError(f'{where}: expected [{{"Q": question, "C" or "A": answer}}, …]')
    return [_pair(each, where) for each in content]


def _pair(content: Any, where: str) -> tuple[str, str]:
    known = content if isinstance(content, dict) else {}
    question = known.get("Q")
    answer = next((known[key] for key in ANSWER_KEYS if key in known), None)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f'{where}: expected [{{"Q": question, "C" or "A": answer}}, …], all texts')
    return question, answer
