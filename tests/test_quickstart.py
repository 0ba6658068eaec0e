"""The notebook runs, on what ships beside it, with what a notebook has: the public names."""

import json
import re

import numpy as np

from tests.conftest import ROOT

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


def test_it_plans_and_draws_what_ships_beside_it(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "examples")
    for name in ("SPACEDRIVE_CHECKPOINT", "SPACEDRIVE_RECORDS", "SPACEDRIVE_SPLIT"):
        monkeypatch.delenv(name, raising=False)
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
