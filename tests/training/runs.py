"""Small runs for tests: records, a tiny config on them, and what a run left behind."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax import nnx

from spacedrive_jax.config import Config, from_json, load_config, to_json
from spacedrive_jax.data.records import open_records
from spacedrive_jax.training import checkpoints
from spacedrive_jax.training.fingerprints import base_fingerprint
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import abstract_state, init_train_state
from tests.conftest import ROOT
from tests.record_factory import encode_png, make_record, write_records

TINY = ROOT / "tests" / "tiny_config.py"


def make_records(folder: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)

    def record():
        depth = rng.uniform(3, 60, (45, 80)) * 256
        return make_record(rng, exact_depth=[encode_png(depth.astype(np.uint16))] * 6)

    return write_records(
        folder, {"train": [record() for _ in range(10)], "val": [record() for _ in range(3)]}
    )


def tiny(records: Path, run_dir: Path, **train_fields) -> Config:
    config = load_config(str(TINY))
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        data=dataclasses.replace(config.data, records=str(records)),
        train=dataclasses.replace(config.train, **train_fields),
    )


def save_untrained(config: Config) -> Path:
    """A run folder whose one checkpoint has not learnt anything: it answers, but nobody knows what."""
    config.directory.mkdir()
    (config.directory / "config.json").write_text(to_json(config))
    mesh = make_mesh(config.mesh)
    trainable, frozen = init_train_state(config, mesh)
    metadata = {
        "config": to_json(config),
        "base_fingerprint": base_fingerprint(config, frozen, mesh),
        "records_fingerprint": open_records(Path(config.data.records), "train").fingerprint,
    }
    manager = checkpoints.open_manager(config.directory, keep=1)
    checkpoints.save(manager, 1, trainable, {"step": np.int32(1)}, {"samples": 0}, metadata)
    with checkpoints.closing(manager):
        return config.directory


def trained_values(run_dir: Path) -> dict:
    config = from_json((run_dir / "config.json").read_text())
    _, trainable, _ = abstract_state(config, make_mesh(config.mesh))
    _, step = checkpoints.locate(run_dir)
    return nnx.to_pure_dict(checkpoints.restore_trainable(run_dir, step, trainable))


def losses_of(run_dir: Path) -> list[tuple[int, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]
