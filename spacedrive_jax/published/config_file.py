"""The published configs (mmcv: Python files of assignments), read as data: nothing in them is run."""

from __future__ import annotations

import ast
import dataclasses
import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.console import UserError

LOADER = "LoadAnnoatationVQA"
"""The loader that makes the conversations, spelled as published."""
OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclasses.dataclass(frozen=True)
class PublishedConfig:
    """What a published config says of the model and its conversations."""

    model: Mapping[str, Any]
    """The model's constructor arguments."""
    loader: Mapping[str, Any]
    """Those of the training loader; empty where the config has none."""


def read_published_config(path: Path) -> PublishedConfig:
    """Reads a published config.

    Args:
        path: an mmcv config (.py), or JSON: the constructor's arguments, alone or under `model`.

    Raises:
        UserError: the file cannot be read or does not say how the model is built.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the published config {path}: {error}") from error
    if path.suffix == ".py":
        return parse_published_config(text, str(path))
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object of constructor arguments, not {type(content).__name__}")
    return PublishedConfig(content.get("model", content), _loader(content))


def parse_published_config(text: str, origin: str) -> PublishedConfig:
    """Reads the text of an mmcv config: literals, names assigned before, `dict(...)` and plain arithmetic.

    Other assignments are passed over, unless `model` needs them.

    Args:
        text: the config, as a file or as mmcv writes it into a checkpoint's `meta`.
        origin: what to call it in messages.

    Raises:
        UserError: it is not Python, or does not assign a `model` that can be read without running it.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{origin} is not a Python config: {error}") from error
    names: dict[str, Any] = {}
    unread: dict[str, _NotLiteralError] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.Assign):
            continue
        for target in statement.targets:
            if isinstance(target, ast.Name):
                try:
                    names[target.id] = _value(statement.value, names)
                except _NotLiteralError as error:
                    unread[target.id] = error
    if not isinstance(names.get("model"), dict):
        reason = f" ({unread['model']})" if "model" in unread else ", also where a `_base_` file does"
        raise UserError(f"{origin} does not assign `model = dict(...)` in values that can be read{reason}")
    return PublishedConfig(names["model"], _loader(names))


def _loader(names: Mapping[str, Any]) -> Mapping[str, Any]:
    steps = names.get("train_pipeline")
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, dict) and step.get("type") == LOADER:
            return step
    return {}


class _NotLiteralError(ValueError):
    """An expression that would have to be run."""


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of literals."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        values = [_value(each, names) for each in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_value(key, names) for key in node.keys if key is not None]
        return dict(zip(keys, (_value(each, names) for each in node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _value(node.operand, names)
        if isinstance(operand, int | float):
            return -operand
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left, names), _value(node.right, names)
        both = (left, right)
        numbers = all(isinstance(each, int | float) for each in both)
        joined = isinstance(node.op, ast.Add) and isinstance(left, str | list) and type(left) is type(right)
        if (numbers and not (isinstance(node.op, ast.Div | ast.FloorDiv) and right == 0)) or joined:
            return OPERATORS[type(node.op)](left, right)
    is_dict = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"
    if is_dict and isinstance(node, ast.Call) and not node.args and all(each.arg for each in node.keywords):
        return {str(each.arg): _value(each.value, names) for each in node.keywords}
    raise _NotLiteralError(f"line {node.lineno}: {ast.unparse(node)[:60]!r}")
