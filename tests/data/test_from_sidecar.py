"""Both command lines from a depth network's checkpoint to predictions, by way of the sidecar alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import data_prep.cli
from spacedrive_jax.cli.main import main
from spacedrive_jax.data.depth_cache import read_provenance, write_provenance
from tests.conftest import ROOT
from tests.models.depth.sweeps import walls_around
from tests.record_factory import make_record, write_records

TINY = str(ROOT / "tests" / "tiny_config.py")
SOURCES = {"network": ["unidepth"], "fused": ["fused", "unidepth"]}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Records with the sidecar of a network whose weights are gone again."""
    rng = np.random.default_rng(0)
    sweeps = [walls_around(12.0), walls_around(25.0), b"", walls_around(8.0), walls_around(16.0), b""]
    made = [make_record(rng, lidar=sweep) for sweep in sweeps]
    folder = write_records(tmp_path_factory.mktemp("world") / "records", {"train": made[:4], "val": made[4:]})
    weights = tmp_path_factory.mktemp("network") / "weights"
    shutil.copytree(ROOT / "tests" / "golden" / "unidepth_tiny", weights)
    add_depth = ["add-depth", "--records", str(folder), "--model", str(weights), "--run", TINY]
    assert data_prep.cli.main(add_depth) == 0
    shutil.rmtree(weights)
    return folder


def train(records: Path, run_dir: Path, *sources: str) -> int:
    command = ["train", TINY, "--run-dir", str(run_dir), "--data.records", str(records), "--train.steps", "2"]
    return main([*command, "--data.depth.sources", *sources])


def first_loss(run_dir: Path) -> float:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_training_prediction_and_report_need_no_depth_network(records, tmp_path):
    losses = {}
    for name, sources in SOURCES.items():
        assert train(records, tmp_path / name, *sources) == 0
        losses[name] = first_loss(tmp_path / name)
        predictions = tmp_path / f"{name}.jsonl"
        predict = ["predict", "--checkpoint", str(tmp_path / name), "--records", str(records)]
        assert main([*predict, "--split", "val", "--out", str(predictions)]) == 0
        assert len(predictions.read_text().splitlines()) == 2
        assert main(["report", str(tmp_path / name), "--records", str(records)]) == 0
        assert "what the run saw" in (tmp_path / name / "report.html").read_text()
    assert losses["network"] != losses["fused"]  # the same seed and samples, another depth


@pytest.mark.usefixtures("unchecked")
def test_a_source_that_a_keyframe_lacks_is_named(records, tmp_path, capfd):
    assert train(records, tmp_path / "run", "fused") == 1
    assert "has no depth for CAM_FRONT from fused" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "has no finished depth of unidepth: run `python -m data_prep add-depth"),
        ("unfinished", "has no finished depth of unidepth"),
        ("other records", "was made from other records"),
        ("other grid", "--image-size 84x84 --channel-order rgb --grid 3x3 --pooling min"),
    ],
)
def test_an_unfit_sidecar_is_refused_before_a_run_begins(records, tmp_path, capfd, damage, message):
    copy, extra = tmp_path / "records", []
    shutil.copytree(records, copy)
    (sidecar,) = (copy / "depth").iterdir()
    if damage == "absent":
        shutil.rmtree(sidecar)
    elif damage == "unfinished":
        (sidecar / "provenance.json").unlink()
    elif damage == "other records":
        provenance = read_provenance(sidecar)
        write_provenance(sidecar, provenance | {"records_fingerprint": "0" * 64})
    else:
        extra = ["--data.image-size", "84", "84", "--data.sequence-length", "200"]
    assert train(copy, tmp_path / "run", "unidepth", *extra) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
