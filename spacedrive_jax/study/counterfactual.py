"""What would come of another trajectory, asked and answered from the records' own truth.

Language data in OmniDrive's layout (`data.language_data`), so that training, the counterfactual test and its
scores are the product's own. Candidates are arcs at other speeds and curvatures than the recorded way; what
they risk is what the `corrected` protocol says of their boxes. Red lights are not in the records.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.config import Config
from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.data.prompts import counterfactual_text, format_coordinates
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.collision import drivable_area, leaves_road, overlaps
from spacedrive_jax.evaluation.counterfactual import corrected_risks, read_items
from spacedrive_jax.evaluation.evaluate import obstacles_of
from spacedrive_jax.evaluation.protocols import PolygonRule, protocol_named
from spacedrive_jax.inference.questions import answer_counterfactual
from spacedrive_jax.io import write_bytes
from spacedrive_jax.json_files import write_json
from spacedrive_jax.study.measures import SPLIT, Measured, by_group, mean_of

STEP_S = 0.5
SLOWEST = 3.0
"""Metres a second that a candidate drives at least, before its factor."""
SPEEDS = (0.6, 1.0, 1.5)
"""Factors of the recorded speed."""
CURVATURES = (0.0, 0.03, -0.03, 0.1, -0.1)
"""1/m; left is positive."""
ASKED = 4
"""Candidates that a keyframe's test has; its training has `TAUGHT` of them."""
TAUGHT = 2
ANSWERS = {
    (): "Nothing, it is safe.",
    ("Collision",): "A collision.",
    ("Out of the drivable area",): "It leads out of the drivable area.",
    ("Collision", "Out of the drivable area"): "A collision. It leads out of the drivable area.",
}
"""By the annotations' words for risks."""


def risks_of(record: Record, waypoints: Float[np.ndarray, "M 6 2"]) -> list[tuple[str, ...]]:
    """What following each plan would come to, in the annotations' words.

    Args:
        record: a keyframe with a map and annotated futures.
        waypoints: those of M plans, metres, ego frame.

    Raises:
        DataError: the record has no map.
    """
    rule = protocol_named("corrected").steps
    assert isinstance(rule, PolygonRule)
    area = drivable_area(record)
    if area is None:
        raise DataError(f"record {record['token']} has no map: nobody can say what leaves its road")
    hits = overlaps(waypoints, obstacles_of(record, pedestrians=True), rule)
    off = leaves_road(waypoints, area, rule)[:, 1:]
    return [
        (
            *(("Collision",) if hits[place].any() else ()),
            *(("Out of the drivable area",) if off[place].any() else ()),
        )
        for place in range(len(waypoints))
    ]


def candidates(record: Record) -> Float[np.ndarray, "M 6 2"]:
    """Trajectories to ask about: the recorded one, and arcs at several speeds and curvatures."""
    waypoints = np.asarray(record["waypoints"], np.float64)
    speed = max(float(exact.norm(waypoints[0])) / STEP_S, SLOWEST)
    seconds = STEP_S * np.arange(1, NUM_WAYPOINTS + 1)
    arcs = []
    for factor in SPEEDS:
        along = factor * speed * seconds
        for curvature in CURVATURES:
            if curvature == 0.0:
                arcs.append(np.stack([along, np.zeros_like(along)], axis=1))
                continue
            cos, sin = exact.cos_sin(curvature * along)
            arcs.append(np.stack([sin, 1.0 - cos], axis=1) / curvature)
    return np.stack([waypoints, *arcs])


def write_language_data(records: str, folder: Path) -> None:
    """Writes the pairs that `train` is trained on and the test of every keyframe, in OmniDrive's layout.

    Nothing is done where that was done to the end before.

    Args:
        records: folder of the records.
        folder: of the language data.
    """
    whole = folder / "whole.json"
    if whole.exists():
        return
    written = 0
    for split in ("train", SPLIT):
        part = open_records(records, split)
        for record in map(part.__getitem__, range(len(part))):
            if np.all(record["waypoint_mask"]):
                _write(record, folder, split)
                written += 1
    write_json(whole, {"keyframes": written})


def _write(record: Record, folder: Path, split: str) -> None:
    """A keyframe's files: candidates drawn from its token, safe and unsafe ones by turns as far as there are
    both.
    """
    trajectories, token = candidates(record), record["token"]
    risks = risks_of(record, trajectories)
    digest = hashlib.sha256(f"counterfactual {token}".encode()).digest()
    order = np.random.default_rng(np.frombuffer(digest, np.uint32)).permutation(len(risks)).tolist()
    kinds = [[place for place in order if bool(risks[place]) == unsafe] for unsafe in (True, False)]
    by_turns = [place for both in zip(*kinds, strict=False) for place in both]
    chosen = [*by_turns, *(place for place in order if place not in by_turns)][:ASKED]
    texts = [f"PT, [{format_coordinates(trajectories[place])}]" for place in chosen]
    taught = [
        {"question": counterfactual_text(text), "answer": ANSWERS[risks[place]]}
        for text, place in list(zip(texts, chosen, strict=True))[:TAUGHT]
    ]
    # OmniDrive's first two pairs, on what matters and what to do, are not asked here.
    write_json(folder / "vqa" / split / f"{token}.json", [{"question": "", "answer": ""}] * 2 + taught)
    items = [{"traj": text, "status": list(risks[place])} for text, place in zip(texts, chosen, strict=True)]
    write_bytes(folder / "eval_cf" / f"{token}.pkl", pickle.dumps(items))
    write_json(folder / "annotations" / f"{token}.json", items)


def counterfactual(config: Config, folder: Path, language_data: Path) -> Measured:
    """Asks a trained run about every candidate of a split, and scores its answers by the corrected rule.

    Metrics, all by scene: `missed`, the share of unsafe trajectories that are called safe (1 less the safety
    recall), `false alarm`, of safe ones that are not, and `misjudged`, of all.

    Args:
        config: of the run.
        folder: of the run.
        language_data: as `write_language_data` wrote it.
    """
    answers = folder / "answers.jsonl"
    if not answers.exists():
        records = Path(config.data.records)
        answer_counterfactual(
            folder, records, SPLIT, language_data, answers, batch_size=32, max_new_tokens=24, resume=True
        )
    split = open_records(config.data.records, SPLIT)
    scene_of = {record["token"]: record["scene_name"] for record in map(split.__getitem__, range(len(split)))}
    wrong, unsafe, scenes = [], [], []
    for item in read_items(answers, language_data / "annotations", every_question=True).items:
        subject = item.subject()
        if subject is None:
            raise DataError(f"{answers} asks about none of the trajectories of {item.token}")
        wrong.append(bool(corrected_risks(item.answer)) != bool(subject.risks))
        unsafe.append(bool(subject.risks))
        scenes.append(scene_of[item.token])
    misjudged, dangerous = np.array(wrong, np.float64), np.array(unsafe)
    values = {
        "misjudged": misjudged,
        "missed": np.where(dangerous, misjudged, np.nan),
        "false alarm": np.where(dangerous, np.nan, misjudged),
    }
    return Measured(
        {name: mean_of(value) for name, value in values.items()} | {"unsafe": float(np.mean(dangerous))},
        {name: by_group(value, scenes) for name, value in values.items()},
    )
