"""What is measured of a planner that a study trained: its plans, its driving, what it knows and foresees.

What it foresees is what would come of another trajectory, asked and answered from the records' own truth:
language data in OmniDrive's layout (`data.language_data`), so that training, the counterfactual test and its
scores are the product's own. Candidates are arcs at other speeds and curvatures than the recorded way; what
they risk is what the `corrected` protocol says of their boxes. Red lights are not in the records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from spacedrive_jax import exact
from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import Config, change, to_plain
from spacedrive_jax.constants import NUM_WAYPOINTS, WAYPOINT_STEP
from spacedrive_jax.data.loader import Samples, evaluation_batches
from spacedrive_jax.data.prompts import counterfactual_text, format_coordinates
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.driving.batch_policies import LocalPolicy
from spacedrive_jax.driving.drive import drive_all
from spacedrive_jax.driving.episode import DriveOptions
from spacedrive_jax.driving.model_policy import check_depth, warm_up_record
from spacedrive_jax.driving.results import read_drive
from spacedrive_jax.driving.scenarios import drive_set
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.collision import drivable_area, leaves_road, overlaps
from spacedrive_jax.evaluation.counterfactual import corrected_risks, read_items
from spacedrive_jax.evaluation.evaluate import evaluate, obstacles_of
from spacedrive_jax.evaluation.prediction_files import read_predictions
from spacedrive_jax.evaluation.protocols import PolygonRule, protocol_named
from spacedrive_jax.folders import output_lock
from spacedrive_jax.inference.open_model import name_checkpoint, open_trained_model
from spacedrive_jax.inference.open_planner import planner_of
from spacedrive_jax.inference.predict import answer_counterfactual, predict
from spacedrive_jax.io import write_bytes
from spacedrive_jax.json_files import read_json, read_json_lines, write_json
from spacedrive_jax.models.partitioning import activations_on
from spacedrive_jax.study.plan import Drives
from spacedrive_jax.training.sharding import place_batch

PROTOCOL = "omnidrive"
"""Under which open-loop runs are scored: the paper's."""
SPLIT = "val"
PREDICTED_TOGETHER = 32
"""Keyframes a step."""
ASKED_TOGETHER = 8
"""Keyframes whose questions are asked in a step."""
ASIDE = 1.0
"""Metres beside the straight line at 3 s from which on a keyframe counts as turning."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one run."""

    measures: Mapping[str, float | None]
    groups: Mapping[str, Mapping[str, list[float]]]
    """Metric to group (scene, drive) to sum and count."""
    curves: Mapping[str, list[list[float | None]]] = dataclasses.field(default_factory=dict)

    def beside(self, other: Measured) -> Measured:
        """Both together."""
        return Measured(
            {**self.measures, **other.measures},
            {**self.groups, **other.groups},
            {**self.curves, **other.curves},
        )


def open_loop(
    config: Config, folder: Path, answers: str, changes: Mapping[str, Any], *, finely: bool
) -> Measured:
    """Predicts and scores a split.

    Args:
        config: of the run.
        folder: of the run.
        answers: file in it that is written, or gone on with.
        changes: see `predict`.
        finely: measure every figure that is held against driving, not the usual three alone.
    """
    predictions = folder / answers
    if not predictions.exists():
        predict(
            folder,
            Path(config.data.records),
            SPLIT,
            predictions,
            batch_size=PREDICTED_TOGETHER,
            # Digits take more tokens than the published limit allows, and would be cut.
            max_new_tokens=None if config.model.coordinate_tokens else config.data.max_targets,
            resume=True,
            changes=changes,
        )
    records = open_records(config.data.records, SPLIT)
    # As published, answers without a trajectory would be left out; between cells that would favour the one
    # that answers less.
    protocol = dataclasses.replace(protocol_named(PROTOCOL), failures="counted")
    evaluation = evaluate(records, read_predictions(predictions, "forward-left"), [protocol])[PROTOCOL]
    scored = predictions.with_suffix(".json")
    write_json(
        scored.with_name(scored.name.replace("predictions", "evaluation")), evaluation.to_json(), indent=2
    )
    scores, horizons = evaluation.prediction, evaluation.prediction.horizons
    values = {name: np.asarray(getattr(horizons, name)).mean(axis=1) for name in ("l2", "collision")}
    off, turning = _off(predictions, records, scores.tokens)
    values["lateral"] = off[:, 1]
    if finely:
        values["l2 at 1 s"], values["l2 at 3 s"] = horizons.l2[:, 0], horizons.l2[:, 2]
        values["off the road"] = horizons.intersection.mean(axis=1)
        values["along"] = off[:, 0]
        values["lateral on turns"] = np.where(turning, off[:, 1], np.nan)
    return Measured(
        {name: mean_of(value) for name, value in values.items()}
        | {"unparsed": scores.failures / len(scores.situations)},
        {name: by_group(value, scores.scenes) for name, value in values.items()},
        {
            "L2 by horizon, m": [
                [s, float(m)] for s, m in zip((1, 2, 3), horizons.l2.mean(axis=0), strict=True)
            ]
        },
    )


def mean_of(values: Float[np.ndarray, " K"]) -> float | None:
    """Of what was measured; None where nothing was."""
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if len(known) else None


def _off(
    predictions: Path, records: Records, tokens: Sequence[str]
) -> tuple[Float[np.ndarray, "K 2"], np.ndarray]:
    """Mean distance along x and along y between planned and recorded waypoints, metres, of every keyframe,
    and whether the record turns; an answer that cannot be read counts as standing still.
    """
    planned = {line["token"]: line["waypoints"] for _, line in read_json_lines(predictions)}
    recorded = {
        record["token"]: record["waypoints"] for record in map(records.__getitem__, range(len(records)))
    }
    off = [
        np.mean(np.abs((np.asarray(planned[token]) if planned[token] else 0.0) - recorded[token]), axis=0)
        for token in tokens
    ]
    return np.array(off), np.array([abs(recorded[token][-1, 1]) > ASIDE for token in tokens])


def closed_loop(folder: Path, out: Path, changes: Mapping[str, Any], drives: Drives) -> Measured:
    """Drives with a trained run, going on with what an interrupted call left.

    Args:
        folder: of the run.
        out: folder of the drives.
        changes: fields of the run's `data` that are otherwise now than in training.
        drives: which, and how.
    """
    specs = drive_set(drives.scenarios)[: drives.first]
    options = DriveOptions(image_size=drives.image_size)
    metadata = {
        "scenarios": drives.scenarios,
        "drives": [spec.name for spec in specs],
        "checkpoint": name_checkpoint(folder),
        "changes": {name: to_plain(value) for name, value in changes.items()},
        "options": dataclasses.asdict(options),
        "batch_size": drives.together,
    }
    results = {spec.name: out / "drives" / spec.name / "result.json" for spec in specs}
    if not all(result.is_file() for result in results.values()):
        trained = open_trained_model(folder)
        config = change(trained.config, trained.config.name, dict(changes))
        check_depth(config, None)
        planner = planner_of(
            dataclasses.replace(trained, config=config), warm_up_record(), most=drives.together
        )
        with output_lock(out), contextlib.closing(LocalPolicy(planner)) as policy:
            drive_all(
                specs,
                out,
                options,
                metadata=metadata,
                policy=policy,
                workers=os.cpu_count() or 1,
                at_a_time=drives.together,
                resume=True,
            )
    driven = {name: read_drive(result) for name, result in results.items()}
    driven = {name: drive for name, drive in driven.items() if "no_place" not in drive}
    values = {
        "lost": np.array([100.0 - drive["scores"]["score_composed"] for drive in driven.values()]),
        "lost pdm": np.array([100.0 * (1.0 - drive["pdm"]["pdms"]) for drive in driven.values()]),
    }
    return Measured(
        {name: mean_of(value) for name, value in values.items()},
        {name: by_group(value, list(driven)) for name, value in values.items()},
    )


def forgotten(config: Config, folder: Path, pretrained: Config, base: Path) -> Measured:
    """How much worse a run answers the questions that its base was trained on than the base does.

    The answers of a split are read, not generated: `wrong words` is the share of their tokens that are not
    the likeliest one, `forgotten` how much more of them that are than before.

    Args:
        config: of the run.
        folder: of the run.
        pretrained: of the base.
        base: its folder, where what it answers is kept.
    """
    kept = base / "answers.json"
    if not kept.exists():
        write_json(kept, _wrong_words(base, pretrained, pretrained))
    before, after = read_json(kept), _wrong_words(folder, config, pretrained)
    more = {scene: [after[scene][0] - before[scene][0], after[scene][1]] for scene in after}
    groups = {"wrong words": after, "forgotten": more}
    return Measured(
        {
            name: sum(each[0] for each in group.values()) / sum(each[1] for each in group.values())
            for name, group in groups.items()
        },
        groups,
    )


def _wrong_words(folder: Path, config: Config, pretrained: Config) -> dict[str, list[float]]:
    """Scene to the answers' tokens that a run gets wrong and all of them, asked as the base was."""
    model = dataclasses.replace(config.model, coordinate_tokens=pretrained.model.coordinate_tokens)
    builder = SampleBuilder(pretrained.data, model)
    records = open_records(config.data.records, SPLIT)
    samples = Samples(records, builder, list(range(len(records))), builder.open_depth(records))
    trained = open_trained_model(folder)
    check = _checker(trained.graph, trained.mesh)
    wrong, words = [], []
    for batch, count in evaluation_batches(samples, ASKED_TOGETHER, data=config.data):
        found = jax.device_get(check(trained.trainable, trained.frozen, place_batch(batch, trained.mesh)))
        wrong += found[:count].tolist()
        words += batch.target_mask[:count].sum(axis=1).tolist()
    scenes = [records[row]["scene_name"] for row in range(len(records))]
    return {
        scene: [
            float(sum(each for each, name in zip(wrong, scenes, strict=True) if name == scene)),
            float(sum(each for each, name in zip(words, scenes, strict=True) if name == scene)),
        ]
        for scene in sorted(set(scenes))
    }


@functools.lru_cache(maxsize=2)
def _checker(
    graph: nnx.GraphDef, mesh: Mesh
) -> Callable[[nnx.State, nnx.State, DrivingBatch], Float[Array, " B"]]:
    """The program that counts an answer's wrong tokens."""

    @jax.jit
    def check(trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch) -> Float[Array, " B"]:
        with activations_on(mesh):
            model = nnx.merge(graph, trainable, frozen)
            hidden = model(batch).hidden
            predicting = jnp.take_along_axis(hidden, batch.target_indices[..., None], axis=1)
            said = jnp.argmax(model.vlm.decoder.logits(predicting), axis=-1)
            return jnp.sum((said != batch.target_ids) & batch.target_mask, axis=1).astype(jnp.float32)

    return check


def by_group(values: Float[np.ndarray, " K"], groups: Sequence[str]) -> Mapping[str, list[float]]:
    """Sum and count of what was measured in every group; sums to six digits behind the point."""
    found: dict[str, list[float]] = {}
    for value, name in zip(values.tolist(), groups, strict=True):
        entry = found.setdefault(name, [0.0, 0.0])
        if not np.isnan(value):
            entry[0], entry[1] = entry[0] + value, entry[1] + 1
    return {name: [round(total, 6), count] for name, (total, count) in sorted(found.items())}


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
    speed = max(float(exact.norm(waypoints[0])) / WAYPOINT_STEP, SLOWEST)
    seconds = WAYPOINT_STEP * np.arange(1, NUM_WAYPOINTS + 1)
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
