"""Checks the open-loop protocols against the published scripts' numbers: `kind` metrics.

A case holds scenes with predictions and drivable rasters, and what the published code made of them: its
pieces per step, its sums per sample, what it printed, and how it reads answers. What is recorded is compared.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.data.ego_status import MINIMUM_MOTION, released_command
from spacedrive_jax.evaluation.counterfactual import Item, count_risks, parse_candidates
from spacedrive_jax.evaluation.metrics import StepScores
from spacedrive_jax.evaluation.prediction_files import parse_answer
from spacedrive_jax.evaluation.predictions import discretize, sort_predictions
from spacedrive_jax.evaluation.protocols import OMNIDRIVE, UNIAD, VAD, Protocol, StepRule
from spacedrive_jax.json_files import read_json
from tests.golden.verify.check import Check, compare
from tests.golden.verify.planning_scenes import STEPS, Case, Scene, read_case, sort_corners
from tests.golden.verify.planning_scripts import SUMS, ScriptSums, add_up

PROTOCOLS: Mapping[str, Protocol] = {"ours": OMNIDRIVE, "vad": VAD, "uniad": UNIAD}
"""The case's names of the protocols."""
DISTANCE = 1e-6
"""Metres; counts, cells and shares are compared to this too, which for them means equal."""


def verify_metrics(folder: Path) -> list[Check]:
    """Compares every recorded piece, sum, printed number and parsed text.

    Raises:
        DataError: a file of the case is missing.
    """
    case = read_case(folder)
    checks: list[Check] = []
    for name, protocol in PROTOCOLS.items():
        checks += _pieces(case, name, protocol)
        checks += _sums(case, name, protocol)
    checks += [*_texts(case), *_commands(case), *_counterfactual(case, folder)]
    return checks


def _pieces(case: Case, name: str, protocol: Protocol) -> Iterator[Check]:
    """Per scene and step; one check for each kind of piece, over all scenes that have it."""
    assert isinstance(protocol.steps, StepRule)
    pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for token in case.scored:
        wanted = {kind for kind in _PIECES if f"{name}/raw/{token}/{kind}" in case.outputs}
        scene = Scene(case, token, protocol.steps)
        for kind in sorted(wanted):
            expected = case.outputs[f"{name}/raw/{token}/{kind}"]
            actual = _PIECES[kind](scene)
            if kind == "agent_poly":
                expected = sort_corners(expected)
            pieces.setdefault(kind, []).append((actual, expected))
    for kind, pairs in sorted(pieces.items()):
        actual, expected = (
            np.concatenate([np.ravel(part) for part in side]) for side in zip(*pairs, strict=True)
        )
        tolerance = 1e-9 if kind == "pred_yaw" else 0.0
        yield compare(f"{name}/raw/{kind}", actual, expected, atol=tolerance, rtol=0.0)


_PIECES: Mapping[str, Callable[[Scene], np.ndarray]] = {
    "box_coll": lambda scene: scene.hits[0] & ~scene.hits[1],
    "gt_box_coll": lambda scene: scene.hits[1],
    "point_coll": Scene.points,
    "offroad_cells": Scene.off_road,
    "agent_seg_area": lambda scene: scene.agents.sum(axis=(1, 2), dtype=np.int64),
    "agent_seg_packbits": lambda scene: np.packbits(scene.agents),
    "ego_seg_area": lambda scene: scene.ego.sum(axis=(1, 2), dtype=np.int64),
    "ego_seg_packbits": lambda scene: np.packbits(scene.ego),
    "pred_yaw": Scene.yaw,
    "agent_poly": Scene.corners,
}


def _sums(case: Case, name: str, protocol: Protocol) -> Iterator[Check]:
    """What the script adds up for each sample alone, and prints for all of them."""
    whole = {
        index: case.steps(token, protocol)
        for index, token in enumerate(case.tokens)
        if token in case.scored and case.inputs[f"{token}/gt_planning_mask"].all()
    }
    alone = {index: add_up([(index, steps)], protocol) for index, steps in whole.items()}
    nothing = ScriptSums()
    rows = [alone.get(index, nothing) for index in range(len(case.tokens))]
    folder = f"{name}/per_sample_single_call"
    if f"{folder}/samples" in case.outputs:
        counts = np.array([row.samples for row in rows])
        yield compare(f"{folder}/samples", counts, case.outputs[f"{folder}/samples"], rtol=0.0)
    for position, metric in enumerate(SUMS):
        for column in range(3):
            key = f"{folder}/{metric}_{column + 1}s"
            if key in case.outputs:
                values = np.array([row.values[position, column] for row in rows])
                yield compare(key, values, case.outputs[key], atol=DISTANCE, rtol=0.0)
    recorded = case.settings.get(f"{name}/exceptions")
    if recorded is not None:
        short = [
            token for token in case.tokens if f"{token}/pred" in case.inputs and token not in case.scored
        ]
        raised = {case.tokens[index] for row in alone.values() for index in row.raised} | set(short)
        yield compare(f"{name}/exceptions", sorted(raised), sorted(recorded), rtol=0.0)
    for threads in (1, 4):
        printed = _printed(whole, len(case.tokens), protocol, threads)
        yield from _printed_checks(
            f"{name}/aggregate_threads{threads}",
            printed,
            case.settings.get(f"{name}/aggregate_threads{threads}"),
        )
        if threads == 1:
            main = case.settings.get("main_run", {}).get(name)
            yield from _printed_checks(f"main_run/{name}", printed, main)


def _printed(
    whole: Mapping[int, StepScores], count: int, protocol: Protocol, threads: int
) -> dict[str, float]:
    """What the script prints when its threads run one after another."""
    share = count // threads
    sums = ScriptSums()
    for thread in range(threads):
        last = count if thread == threads - 1 else (thread + 1) * share
        part = [(index, steps) for index, steps in whole.items() if thread * share <= index < last]
        add_up(part, protocol, sums)
    return sums.printed()


def _printed_checks(
    name: str, printed: Mapping[str, float], recorded: Mapping[str, float] | None
) -> Iterator[Check]:
    if recorded is not None:
        keys = sorted(recorded)
        ours = [printed.get(key, np.nan) for key in keys]
        yield compare(name, ours, [recorded[key] for key in keys], atol=DISTANCE, rtol=0.0)


def _texts(case: Case) -> Iterator[Check]:
    texts = case.settings.get("text_parsing", [])
    if texts:
        ours = [parse_answer(entry["text"]) for entry in texts]
        # A failure of the published script drops the sample, like a text without a trajectory.
        theirs = [np.array(e["coords"]) if isinstance(e["coords"], list) else None for e in texts]
        yield compare("text_parsing", _flat(ours), _flat(theirs), rtol=0.0)
    for entry in case.settings.get("discrete", []):
        points = np.array(entry["inp"], np.float64)
        padded = np.concatenate([points, np.zeros((STEPS, 2))])[:STEPS]
        floored = discretize(sort_predictions(Path(), [("x", "", padded)]), entry["res"]).waypoints["x"]
        yield compare(f"discrete {entry['res']}", floored[: len(points)], entry["out"], rtol=0.0)


def _flat(trajectories: list[np.ndarray | None]) -> np.ndarray:
    """Trajectories as one row of numbers: how many waypoints (-1 for none), then the waypoints."""
    parts = [
        np.array([-1.0]) if points is None else np.concatenate([[len(points)], points.ravel()])
        for points in trajectories
    ]
    return np.concatenate(parts)


def decided_by_rounding(endpoint: Float[np.ndarray, "3"]) -> bool:
    """Whether an endpoint lies within 1e-9 (metres or degrees) of a bound of `released_command`.

    What was recorded for such an endpoint is the rounding of the machine that recorded it, not the rule:
    comparisons leave it out.
    """
    degrees = abs(float(np.degrees(exact.arctan2(endpoint[1], endpoint[0]))))
    near_bound = any(abs(degrees - bound) < 1e-9 for bound in (0.4, 2.0, 10.0, 20.0))
    return abs(float(exact.norm(endpoint)) - MINIMUM_MOTION) < 1e-9 or near_bound


def _commands(case: Case) -> Iterator[Check]:
    if "command/command" in case.outputs:
        ends = case.inputs["command/gt_planning"][:, -1]
        # Left out: what only the recording machine's rounding decided.
        kept = np.array([not decided_by_rounding(end) for end in ends], bool)
        ours = [released_command(end) for end in ends[kept]]
        yield compare("command/command", ours, case.outputs["command/command"][kept], rtol=0.0)


def _counterfactual(case: Case, folder: Path) -> Iterator[Check]:
    lines = case.settings.get("counterfactual_stdout")
    path = folder / "counterfactual_items.json"
    if lines is None or not path.is_file():
        return
    items = [
        Item(entry["id"], entry["pred"][0]["Q"], entry["pred"][0]["C"], parse_candidates(entry["annos"]))
        for entry in read_json(path)
        if entry["pred"]
    ]
    counts, unmatched = count_risks(items, "published")
    titles = {
        "collision": "Collision",
        "red_light": "Red Light",
        "drivable_area": "Out of Drivable Area",
        "safe": "Safe",
    }
    numbers = [float(len(items) - len(unmatched))]
    for risk in titles:
        numbers += dataclasses.astuple(counts[risk])
    for ratio in ("accuracy", "precision", "recall"):
        for risk in titles:
            value = counts[risk].to_json()[ratio]
            numbers.append(0.0 if value is None else float(value))
    printed = [
        float(value) for line in lines for value in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", line)
    ]
    yield compare("counterfactual", numbers, printed, atol=1e-12, rtol=0.0)
