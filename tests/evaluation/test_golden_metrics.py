"""Scores against the published scripts' own, sample by sample (64 scenes, three protocols)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.cli.verify import Verify
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.evaluation.metrics import horizon_scores
from spacedrive_jax.evaluation.protocols import VAD
from tests.golden.verify.check import Check
from tests.golden.verify.metrics import PROTOCOLS, verify_metrics
from tests.golden.verify.planning_scenes import read_case


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "metrics"


@pytest.fixture(scope="module")
def checks(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in verify_metrics(folder)}


def test_everything_recorded_is_reproduced(checks: dict[str, Check]) -> None:
    assert [name for name, check in checks.items() if not check.passed] == []
    for protocol in PROTOCOLS:
        for name in (
            "raw/box_coll",
            "raw/gt_box_coll",
            "raw/offroad_cells",
            "raw/agent_seg_area",
            "raw/ego_seg_area",
            "raw/pred_yaw",
            "per_sample_single_call/samples",
            "per_sample_single_call/l2_3s",
            "per_sample_single_call/plan_obj_box_col_3s",
            "per_sample_single_call/plan_boundary_3s",
            "exceptions",
            "aggregate_threads1",
            "aggregate_threads4",
        ):
            assert f"{protocol}/{name}" in checks
    for name in (
        "ours/raw/agent_seg_packbits",
        "main_run/ours",
        "main_run/uniad",
        "text_parsing",
        "discrete 0.5",
        "counterfactual",
    ):
        assert name in checks


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("ours/per_sample_single_call/l2_3s", "ours/per_sample_single_call/l2_3s"),
        ("vad/raw/box_coll", "vad/raw/tok001/box_coll"),
        ("uniad/raw/offroad_cells", "uniad/raw/tok060/offroad_cells"),
    ],
)
def test_a_changed_number_is_found(folder: Path, tmp_path: Path, name: str, entry: str) -> None:
    case = tmp_path / "case"
    shutil.copytree(folder, case)
    outputs = dict(np.load(case / "outputs.npz"))
    outputs[entry] = outputs[entry].copy()
    outputs[entry][1] += 1e-3 if outputs[entry].dtype == np.float64 else 1
    np.savez(case / "outputs.npz", **outputs)
    with pytest.raises(SpaceDriveError, match=f"1 tensors out of tolerance, first {name}"):
        Verify(case).run()


def test_incomplete_case(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(SpaceDriveError, match=r"cannot read .*inputs\.npz"):
        Verify(tmp_path).run()


def test_clean_vad(folder: Path) -> None:
    """The published VAD script loses terms to two bugs; its per-step pieces do not."""
    case = read_case(folder)
    for token in case.scored:
        scores = horizon_scores(case.steps(token, VAD), VAD)
        hits = case.outputs[f"vad/raw/{token}/box_coll"]
        off_road = case.outputs[f"vad/raw/{token}/offroad_cells"] > 0
        for column, steps in enumerate((2, 4, 6)):
            assert scores.collision[0, column] == pytest.approx(hits[:steps].mean())
            boundary = 0.0 if off_road[0] else off_road[1 : steps + 1].mean()
            assert scores.intersection[0, column] == pytest.approx(boundary)


def test_case_is_of_the_pinned_opencv(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["opencv"].startswith("4.10")
