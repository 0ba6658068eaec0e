"""Makes examples/demo anew: a trained demo, small enough to ship, and a handful of keyframes to look at.

    python -m examples.build_demo demo/run demo/records --drives demo/drives/demo --note "As of make demo."

model/        the run as one folder of safetensors (`export-weights --to safetensors --dtype float16`), its
              card with what it scores in a run of drives and how it was trained
records/      keyframes of the validation split, without their LiDAR sweeps
answers.json  what the model answers to them, which tests/test_shipped_demo.py holds it to
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from spacedrive_jax import Planner, open_records
from spacedrive_jax.data.records import Records
from spacedrive_jax.data.records_folder import (
    PROVENANCE,
    RecordSerializer,
    content_fingerprint,
    read_provenance,
    shard_file,
    write_dataset_info,
    write_shard,
)
from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.drive import METADATA, read_summary
from spacedrive_jax.inference.open_model import export_trained_folder
from spacedrive_jax.json_files import read_json, write_json

HERE = Path(__file__).resolve().parent / "demo"
MOST_BYTES = 5_000_000
"""The whole folder."""


def chosen(records: Records) -> list[Record]:
    """Of every scene the middle keyframe with a whole future, and of all the one that turns most."""
    scenes: dict[str, list[Record]] = {}
    for index in range(len(records)):
        record = records[index]
        if np.all(record["waypoint_mask"]):
            scenes.setdefault(record["scene_name"], []).append(record)
    middle = [whole[len(whole) // 2] for whole in scenes.values()]
    turning = max(
        (each for whole in scenes.values() for each in whole), key=lambda one: abs(one["waypoints"][-1, 1])
    )
    found = {record["token"]: record for record in [*middle, turning]}
    return [record | {"lidar": b""} for record in found.values()]


def write_records(folder: Path, kept: list[Record], source: Records) -> None:
    """Writes keyframes as a records folder of one shard, its provenance naming the folder they are from."""
    folder.mkdir(parents=True)
    serialize = RecordSerializer()
    shard = write_shard(folder / shard_file("val", 0, 1), (serialize(record) for record in kept))
    described = f"{len(kept)} keyframes of the synthetic world, without LiDAR"
    write_dataset_info(folder, {"train": [], "val": [shard]}, described)
    before = read_provenance(source.directory)
    facts = {
        "source": before["source"],
        "options": before.get("options"),
        "chosen_from": source.fingerprint,
        "without": ["lidar"],
        "licence": "Apache-2.0: drawn by this project's own renderer",
        "records": len(kept),
        "splits": {"train": 0, "val": len(kept)},
        "shards": {
            shard.file: {
                "keyframes": shard.records,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "ends_sha256": shard.ends_sha256,
            }
        },
        "fingerprint": content_fingerprint([(shard.file, shard.sha256)]),
    }
    write_json(folder / PROVENANCE, facts, indent=1, sort_keys=True)


def driving_section(drives: Path | None, note: str) -> str:
    """What the card says of driving and of training; "" where nothing is known of either."""
    lines = [] if drives is None and not note else ["## Driving and training"]
    if drives is not None:
        summary, run = read_summary(drives), read_json(drives / METADATA)
        low, high = summary["driving_score_interval"]
        lines += [
            f"Driving score {summary['driving_score']:.1f} [{low:.1f}, {high:.1f}] of 100 over "
            f"{summary['drives']} drives (`drive --scenarios {run['scenarios']}`, towns that no training "
            f"record shows), {summary['success_rate']:.0f} % without an infraction.",
            "",
        ]
    return "\n".join([*lines, *([note, ""] if note else []), ""]) if lines else ""


def main() -> None:
    """Builds the folder, and refuses one that is too large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of a trained demo")
    parser.add_argument("records", type=Path, help="records that it was trained on, with a split val to show")
    parser.add_argument("--drives", type=Path, help="run of drives with it, as `drive --out` writes it")
    parser.add_argument("--note", default="", help="how it was trained, for its card")
    given = parser.parse_args()
    new = HERE.with_name("demo.new")
    shutil.rmtree(new, ignore_errors=True)
    source = open_records(given.records, "val")
    write_records(new / "records", chosen(source), source)
    export_trained_folder(given.run, new / "model", dtype="float16")
    card = new / "model" / "README.md"
    before, how = card.read_text().split("## How to load it")
    card.write_text(f"{before}{driving_section(given.drives, given.note)}## How to load it{how}")
    planner = Planner.load(new / "model")
    answers = {}
    for record in planner.records(new / "records"):
        plan = planner.plan(record)
        print(f"{record['scene_name']} {record['token']}: {plan.status}, {plan.error:.2f} m off")
        answers[record["token"]] = {
            "status": plan.status,
            "text": plan.text,
            "waypoints": plan.waypoints.tolist(),
            "error": plan.error,
        }
    (new / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{new} has {size:,} bytes, more than the {MOST_BYTES:,} that it may have")
    shutil.rmtree(HERE, ignore_errors=True)
    new.rename(HERE)
    print(f"{HERE}: {len(answers)} keyframes, {size:,} bytes")


if __name__ == "__main__":
    main()
