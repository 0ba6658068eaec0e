import json
import shutil

import pytest

from tests.golden.verify.prompts import verify_prompts


def test_text_side_equals_published(golden):
    checks = verify_prompts(golden / "prompts")
    assert len(checks) > 190
    assert [check.name for check in checks if not check.passed] == []


@pytest.mark.parametrize(
    ("section", "key", "check"),
    [("convert_coords", "train", "convert_coords/0/train/text"), ("chat", "decoded", "chat/plan/text")],
)
def test_a_changed_case_fails(golden, tmp_path, section, key, check):
    case = tmp_path / "case"
    shutil.copytree(golden / "prompts", case)
    settings = json.loads((case / "config.json").read_text())
    entry = settings[section][0]
    if key == "train":
        entry[key]["text"] += "."
    else:
        entry[key] += "."
    (case / "config.json").write_text(json.dumps(settings))
    assert [each.name for each in verify_prompts(case) if not each.passed] == [check]
