"""The verify command on small recorded cases, and on a case that was tampered with."""

import json
import shutil

import numpy as np
import pytest

from spacedrive_jax import cli
from spacedrive_jax.verify.command import find_verifier
from tests.published_case import GOLDEN


@pytest.mark.parametrize("case", ["geometry", "pe", "ego_memory"])
def test_case_passes(case):
    checks = find_verifier(GOLDEN / case)(GOLDEN / case)
    assert len(checks) > 4
    assert [check for check in checks if not check.passed] == []


def test_a_changed_number_fails(tmp_path, capsys):
    shutil.copytree(GOLDEN / "geometry", tmp_path / "case")
    outputs = dict(np.load(tmp_path / "case" / "outputs.npz"))
    name = next(name for name in outputs if name.endswith("coords3d"))
    outputs[name] = outputs[name] + 0.01
    np.savez(tmp_path / "case" / "outputs.npz", **outputs)
    assert cli.main(["verify", str(tmp_path / "case"), "--json"]) == 1
    printed = capsys.readouterr()
    assert "out of tolerance" in printed.err
    facts = json.loads(printed.out.splitlines()[-1])
    assert facts["passed"] is False
    assert facts["worst"]["name"] == name


def test_unknown_kinds_and_folders_are_named(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "is not a case" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"kind": "spaghetti"}')
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "'spaghetti' is not one of" in capsys.readouterr().err
