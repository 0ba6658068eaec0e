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


def read_items(predictions: Path, annotations: Path) -> CounterfactualItems:
    """Reads answers and annotations and pairs them by token.

    Args:
        predictions: token to `[{"Q": question, "C" or "A": answer}, …]`, of which the first counts.
        annotations: token to `[{"traj": "PT, [(…)…]", "status": […]}, …]`.
            Each is a folder with a file per token (JSON with or without .json, or .pkl), or one such file
            with an object of token to content.

    Raises:
        UserError: something cannot be read, or no keyframe has both.
    """
    answers, candidates = _read_by_token(predictions), _read_by_token(annotations)
    items = []
    for token in sorted(answers.keys() & candidates.keys()):
        question, answer = _question(answers[token], f"{predictions}, {token}")
        try:
            items.append(Item(token, question, answer, parse_candidates(candidates[token])))
        except ValueError as error:
            raise UserError(f"{annotations}, {token}: {error}") from None
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
    content = _load(path)
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


def _question(content: Any, where: str) -> tuple[str, str]:
    first = content[0] if isinstance(content, list) and content else None
    question = first.get("Q") if isinstance(first, dict) else None
    answer = (
        next((first[key] for key in ANSWER_KEYS if key in first), None) if isinstance(first, dict) else None
    )
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f'{where}: expected [{{"Q": question, "C" or "A": answer}}, …], all texts')
    return question, answer
