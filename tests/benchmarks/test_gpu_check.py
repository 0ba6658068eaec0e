"""The GPU's one script at its tiny size, on the CPU: what it writes, and what it makes of parts that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Outcome, Part

ROOT = Path(__file__).resolve().parents[2]


def check(out, *arguments):
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh", out, "--size", "tiny", *arguments],
        env={**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_attention_alone(tmp_path):
    done = check(tmp_path, "--parts", "attention")
    assert done.returncode == 0, done.stdout
    facts = json.loads((tmp_path / "gpu_check.json").read_text())
    (part,) = facts["parts"]
    assert [row["attention"] for row in part["rows"]] == ["decoder", "vision, whole image"]
    # Two roundings to bfloat16 apart; on the CPU both are the plain kernel.
    assert all(row["plain error"] < 0.01 for row in part["rows"])
    assert done.stdout.rstrip().endswith((tmp_path / "gpu_check.md").read_text().rstrip())


@pytest.mark.slow
def test_every_part_that_needs_no_torch(tmp_path):
    parts = ("train_7b", "planning", "train_7b_int8", "train_3b", "depth", "tests")
    done = check(tmp_path, "--parts", *parts)
    assert done.returncode == 0, done.stdout
    facts = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = {part["part"]: part["rows"] for part in facts["parts"]}
    assert [row["tokens/s"] > 0 for part in parts if "train" in part for row in rows[part]] == [True] * 3
    assert [row["way"] for row in rows["planning"]] == ["one pass", "one pass", "token by token"]
    assert rows["depth"][0]["images/s"] > 0
    assert rows["tests"][0]["tests"] == rows["tests"][0]["skipped"] > 0


def test_a_part_that_fails_or_hangs_leaves_its_rows(tmp_path, monkeypatch):
    (tmp_path / "rows.py").write_text(
        "import sys, time\n"
        "print('ROW {\"figure\": 1.5}', flush=True)\n"
        "if 'hang' in sys.argv: time.sleep(60)\n"
        "sys.exit('no such kernel')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    failed = gpu_check.run(Part("a", "A", ("rows",), 60), "tiny", 60, log)
    assert (failed.state, failed.rows) == ("exit 1", [{"figure": 1.5}])
    assert "no such kernel" in log.read_text()
    hung = gpu_check.run(Part("b", "B", ("rows", "hang"), 60), "tiny", 2, log)
    assert (hung.state, hung.rows) == ("stopped after 2 s", [{"figure": 1.5}])


def test_the_ratio_is_of_the_same_batch():
    ours = [{"way": "one pass", "batch": 1, "ms": 50.0}, {"way": "token by token", "batch": 1, "ms": 300.0}]
    theirs = [{"way": "transformers", "batch": batch, "ms": 1000.0} for batch in (1, 8)]
    outcomes = [
        Outcome("planning", "", "done", 1, ours),
        Outcome("planning_transformers", "", "done", 1, theirs),
    ]
    assert gpu_check.ratios(outcomes) == [{"batch": 1, "transformers over one pass": 20.0}]


def test_what_no_time_is_left_for_is_named(tmp_path):
    done = check(tmp_path, "--parts", "attention", "depth", "--seconds", "0")
    assert done.returncode == 1
    assert done.stdout.count("not run: no time left") >= 2
