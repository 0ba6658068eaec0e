"""The verify command on small recorded cases, and on cases that were tampered with."""

import json
import shutil

import numpy as np
import pytest

from spacedrive_jax.cli import main
from spacedrive_jax.errors import SpaceDriveError
from tests.golden.verify.runner import verify_case
from tests.published_case import GOLDEN


@pytest.fixture
def copy(tmp_path):
    """Copies a recorded case, to tamper with."""

    def copy(name):
        return shutil.copytree(GOLDEN / name, tmp_path / "cases" / name)

    return copy


def change(file, **changes):
    """Rewrites an npz file with some arrays changed; None takes one out. Slashes are written `__`."""
    arrays = dict(np.load(file))
    for name, value in changes.items():
        name = name.replace("__", "/")
        arrays.pop(name, None) if value is None else arrays.update({name: value})
    np.savez(file, **arrays)


@pytest.mark.parametrize("case", ["geometry", "pe", "ego_memory"])
def test_case_passes(case):
    checks = verify_case(GOLDEN / case)
    assert len(checks) > 4
    assert [check for check in checks if not check.passed] == []


def test_a_changed_number_fails(copy, capsys):
    case = copy("geometry")
    outputs = np.load(case / "outputs.npz")
    name = next(name for name in outputs if name.endswith("coords3d"))
    change(case / "outputs.npz", **{name: outputs[name] + 0.01})
    assert main.main(["verify", str(case), "--json"]) == 1
    printed = capsys.readouterr()
    assert "out of tolerance" in printed.err
    facts = json.loads(printed.out.splitlines()[-1])
    assert facts["passed"] is False
    assert facts["worst"]["name"] == name


def test_an_error_that_is_not_finite_is_null_in_json(copy, capsys):
    case = copy("geometry")
    outputs = np.load(case / "outputs.npz")
    name = next(name for name in outputs if name.endswith("coords3d"))
    change(case / "outputs.npz", **{name: outputs[name] * np.nan})
    assert main.main(["verify", str(case), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["worst"]["abs"] is None


def test_unknown_kinds_and_folders_are_named(tmp_path, capsys):
    assert main.main(["verify", str(tmp_path)]) == 1
    assert "is not a case and holds none" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"kind": "spaghetti"}')
    assert main.main(["verify", str(tmp_path)]) == 1
    assert "'spaghetti' is not one of" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("[]")
    assert main.main(["verify", str(tmp_path)]) == 1
    assert "is no JSON object" in capsys.readouterr().err


def test_what_is_missing_is_named(copy):
    case = copy("spacedrive_train")
    change(case / "inputs.npz", f1__data__lidar2img=None)
    with pytest.raises(SpaceDriveError, match=r"inputs.npz lacks 'f1/data/lidar2img'"):
        verify_case(case)
    settings = json.loads((case / "config.json").read_text())
    del settings["vlm_config"]
    (case / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SpaceDriveError, match=r"config.json lacks 'vlm_config'"):
        verify_case(case)


@pytest.mark.parametrize("file", ["inputs.npz", "outputs.npz", "weights.safetensors"])
def test_a_damaged_file_is_named(copy, file):
    case = copy("pe")
    content = (case / file).read_bytes()
    middle = len(content) // 2
    for damaged in (content[:middle], b"", content[:middle] + bytes(64) + content[middle + 64 :]):
        if file.endswith("safetensors") and len(damaged) == len(content):
            continue  # carries no checksums
        (case / file).write_bytes(damaged)
        with pytest.raises(SpaceDriveError, match=file):
            verify_case(case)


def test_arrays_that_do_not_fit_the_settings_are_an_error_not_a_pass(copy):
    case = copy("spacedrive_train")
    pixels = np.load(case / "inputs.npz")["f1/pixel_values"]
    change(case / "inputs.npz", f1__pixel_values=pixels[..., :-3])
    with pytest.raises(SpaceDriveError):
        verify_case(case)


def test_all_cases_of_a_folder(copy, capsys):
    folder = copy("geometry").parent
    copy("ego_memory")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text('{"model_type": "llava"}')
    assert main.main(["verify", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [entry["case"] for entry in facts["cases"]] == ["ego_memory", "geometry"]
    assert facts["left_out"] == ["checkpoint"]
    assert facts["passed"]
    assert facts["tensors"] == sum(entry["tensors"] for entry in facts["cases"])

    (folder / "ego_memory" / "outputs.npz").write_bytes(b"")
    assert main.main(["verify", str(folder), "--json"]) == 1
    printed = capsys.readouterr()
    assert "1 cases failed: ego_memory" in printed.err
    first, second = json.loads(printed.out.splitlines()[-1])["cases"]
    assert not first["passed"]
    assert "outputs.npz" in first["error"]
    assert second["passed"]


def test_settings_are_chosen_by_name(capsys):
    assert main.main(["verify", str(GOLDEN / "geometry"), "--only", "base"]) == 1
    assert "kind geometry has no settings" in capsys.readouterr().err
    assert main.main(["verify", str(GOLDEN / "spacedrive_generate"), "--only", "bse"]) == 1
    assert "has no bse; --only takes default" in capsys.readouterr().err
    assert main.main(["verify", str(GOLDEN), "--only", "base"]) == 1
    assert "settings of one case" in capsys.readouterr().err
