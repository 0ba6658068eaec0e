"""The notebook runs, on a tiny run and its records, with what a notebook has: the public names."""

import json
import re

import numpy as np
import pytest

from spacedrive_jax.training.train import train
from tests.conftest import ROOT
from tests.training.runs import make_records, tiny

NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
CODE = ["".join(cell["source"]) for cell in CELLS]


def test_it_comes_without_outputs_and_says_what_it_reads():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    text = "".join("".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "markdown")
    read = re.findall(r'environ\.get\("(\w+)"', "\n".join(CODE))
    assert set(read) == set(re.findall(r"^\| `(SPACEDRIVE_\w+)`", text, re.M))


def test_it_uses_public_names_alone():
    modules = re.findall(r"^(?:from|import) ([\w.]+)", "\n".join(CODE), re.M)
    assert set(modules) == {"os", "spacedrive_jax"}


STEPS = 140
"""After which the tiny model writes answers that can be read."""


@pytest.mark.slow
def test_it_plans_and_draws(tmp_path, monkeypatch, capsys):
    records, run_dir = make_records(tmp_path / "records"), tmp_path / "run"
    train(tiny(records, run_dir, steps=STEPS, learning_rate=5e-3, checkpoint_every=STEPS, log_every=STEPS))
    monkeypatch.setenv("SPACEDRIVE_CHECKPOINT", str(run_dir))
    monkeypatch.setenv("SPACEDRIVE_RECORDS", str(records))
    names = {}
    for code in CODE:
        exec(compile(code, "quickstart.ipynb", "exec"), names)
    plan = names["plan"]
    assert plan.status == "ok"
    printed = capsys.readouterr().out
    assert plan.text in printed
    assert plan.question in printed
    assert f"{plan.waypoints[-1, 0]:6.2f} m ahead" in printed
    above = next(axes for axes in names["figure"].axes if axes.get_xlabel() == "left (m)")
    drawn = [np.asarray(line.get_xydata()) for line in above.lines]
    ahead = [line[-6:, 1] for line in drawn if len(line) >= 6]
    for waypoints in (plan.waypoints, names["record"]["waypoints"]):
        assert any(np.allclose(line, waypoints[:, 0]) for line in ahead)
