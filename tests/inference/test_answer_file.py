"""Files of answers: whole or not there, and the same bytes after an interruption."""

from __future__ import annotations

import dataclasses
import json

import pytest

from spacedrive_jax.cli.main import main
from spacedrive_jax.data.tokenizer import DEMO_TOKENIZER
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.inference import predict as predict_module
from spacedrive_jax.inference.answers import answer_file
from spacedrive_jax.inference.open_model import name_inputs
from tests.training.runs import make_records, save_untrained, tiny

METADATA = {"checkpoint": "run/checkpoints/1", "asking": {"frame": (1, 2)}}


def write(out, numbers, *, fail_after=None, resume=False, overwrite=False, metadata=METADATA):
    """Writes numbers in batches of two; answers how many were there already."""
    with answer_file(out, metadata, batch_size=2, resume=resume, overwrite=overwrite) as file:
        for start in range(file.done, len(numbers), 2):
            if start == fail_after:
                raise KeyboardInterrupt
            file.write([{"n": number} for number in numbers[start : start + 2]], 64 + start)
        return file.done


def contents(out):
    return [json.loads(line)["n"] for line in out.read_text().splitlines()]


def test_appears_when_whole(tmp_path):
    out = tmp_path / "new" / "answers.jsonl"
    assert write(out, [1, 2, 3]) == 0
    assert contents(out) == [1, 2, 3]
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(SpaceDriveError, match="exists: give another --out, or --overwrite"):
        write(out, [4])
    assert contents(out) == [1, 2, 3]
    write(out, [4], overwrite=True)
    assert contents(out) == [4]


def test_a_batch_without_answers_is_no_line(tmp_path):
    out = tmp_path / "answers.jsonl"
    with answer_file(out, METADATA, batch_size=2, resume=False, overwrite=False) as file:
        for lines in ([], [{"n": 1}, {"n": 2}], []):
            file.write(lines, 64)
    assert out.read_text() == '{"n": 1}\n{"n": 2}\n'


def test_an_interrupted_file_is_gone_on_with(tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(out, [1, 2, 3, 4, 5], fail_after=4)
    assert not out.exists()
    with pytest.raises(SpaceDriveError, match="--resume goes on, --overwrite starts anew"):
        write(out, [1, 2, 3, 4, 5])
    with pytest.raises(SpaceDriveError, match=r"asking\.frame"):
        write(out, [1, 2, 3, 4, 5], resume=True, metadata=METADATA | {"asking": {"frame": (1, 3)}})
    assert write(out, [1, 2, 3, 4, 5], resume=True) == 4
    assert contents(out) == [1, 2, 3, 4, 5]
    assert list(tmp_path.iterdir()) == [out]


def test_another_models_config_is_named_field_by_field(tmp_path):
    def of(rank):
        config = json.dumps({"model": {"lora": {"rank": rank}, "weights": None}}, indent=2)
        return {"checkpoint": {"path": "run", "trainable_fingerprint": str(rank), "config": config}}

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.jsonl", [1, 2, 3, 4, 5], fail_after=4, metadata=of(16))
    with pytest.raises(
        SpaceDriveError, match=r"checkpoint\.config\.model\.lora\.rank: 16 -> 8; .* 16 -> 8\. Say"
    ):
        write(tmp_path / "a.jsonl", [1, 2, 3, 4, 5], resume=True, metadata=of(8))
    assert write(tmp_path / "a.jsonl", [1, 2, 3, 4, 5], resume=True, metadata=of(16)) == 4


@pytest.mark.parametrize(("fingerprint", "goes_on"), [("f", True), ("g", False), (None, False)])
def test_a_run_that_moved_is_gone_on_with(tmp_path, fingerprint, goes_on):
    out = tmp_path / "answers.jsonl"
    then, now = ({"checkpoint": {"path": path, "trainable_fingerprint": "f"}} for path in ("/a", "/moved"))
    now["checkpoint"]["trainable_fingerprint"] = fingerprint
    with pytest.raises(KeyboardInterrupt):
        write(out, [1, 2, 3], fail_after=2, metadata=then)
    if goes_on:
        assert write(out, [1, 2, 3], resume=True, metadata=now) == 2
    else:
        with pytest.raises(SpaceDriveError, match="was begun otherwise"):
            write(out, [1, 2, 3], resume=True, metadata=now)


def test_what_fails_before_its_first_answer_leaves_nothing(tmp_path):
    out, other = tmp_path / "answers.jsonl", METADATA | {"checkpoint": "other"}
    with pytest.raises(KeyboardInterrupt):
        write(out, [1, 2], fail_after=0)
    assert list(tmp_path.iterdir()) == []
    # Nor is anything in the way of what was killed there.
    (tmp_path / ".answers.jsonl.partial").write_text("")
    (tmp_path / ".answers.jsonl.partial.json").write_text("{}")
    assert write(out, [1, 2], metadata=other) == 0
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(SpaceDriveError, match="is finished: nothing is left to --resume"):
        write(out, [1, 2], resume=True)


def test_half_a_batch_is_made_again(tmp_path):
    out, partial = tmp_path / "answers.jsonl", tmp_path / ".answers.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        write(out, [1, 2, 3, 4], fail_after=2)
    with partial.open("a") as file:
        file.write('{"n": 7}\n{"n": ')
    with answer_file(out, METADATA, batch_size=2, resume=True, overwrite=False) as again:
        assert (again.done, again.length) == (2, 64)
    assert contents(out) == [1, 2]


def test_resume_starts_where_nothing_is(tmp_path):
    assert write(tmp_path / "answers.jsonl", [1, 2], resume=True) == 0
    assert contents(tmp_path / "answers.jsonl") == [1, 2]


def test_a_resumed_prediction_has_the_same_bytes(tmp_path, monkeypatch, capsys):
    records = make_records(tmp_path / "records")
    run = save_untrained(tiny(records, tmp_path / "run"))
    command = ["predict", "--checkpoint", run, "--records", records, "--split", "val", "--batch-size", "1"]
    command = [str(each) for each in command]
    assert main([*command, "--out", str(tmp_path / "whole.jsonl")]) == 0

    answered, line = [], predict_module.prediction_line

    def interrupted(*arguments):
        answered.append(arguments)
        if len(answered) == 3:
            raise KeyboardInterrupt
        return line(*arguments)

    monkeypatch.setattr(predict_module, "prediction_line", interrupted)
    out = tmp_path / "resumed.jsonl"
    assert main([*command, "--out", str(out)]) == 130
    monkeypatch.setattr(predict_module, "prediction_line", line)
    capsys.readouterr()
    assert main([*command, "--out", str(out), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 1
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    tokens = [json.loads(each)["token"] for each in lines]
    chosen = [str(tmp_path / "chosen.jsonl"), "--token", tokens[2], tokens[0]]
    assert main([*command, "--out", *chosen]) == 0
    assert (tmp_path / "chosen.jsonl").read_text().splitlines() == [lines[2], lines[0]]
    assert main([*command, "--limit", "2"]) == 0
    assert (run / "predictions.part.jsonl").read_text().splitlines() == lines[:2]
    assert main([*command, "--limit", "1"]) == 0  # a look at something else takes the place of the one before
    assert (run / "predictions.part.jsonl").read_text().splitlines() == lines[:1]
    assert main([*command, "--out", str(tmp_path / "whole.jsonl"), "--limit", "1"]) == 1
    assert "would hold the keyframes of --token or --limit alone" in capsys.readouterr().err
    assert (tmp_path / "whole.jsonl").read_text().splitlines() == lines
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "none.jsonl"), "--token", tokens[0], "nobody"]) == 1
    assert "has no keyframe 'nobody' in split" in capsys.readouterr().err
    assert main([*command, "--token", tokens[0], "--limit", "1"]) == 1


def test_answers_with_another_tokenizer_are_not_gone_on_with(tmp_path):
    records = make_records(tmp_path / "records")
    file = tmp_path / "tokenizer.json"
    file.write_bytes(DEMO_TOKENIZER.read_bytes())
    config = tiny(records, tmp_path / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(file)))
    before = name_inputs(config, None)
    file.write_bytes(DEMO_TOKENIZER.read_bytes() + b"\n")
    out = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(out, [1, 2, 3, 4, 5], fail_after=4, metadata=METADATA | {"inputs": before})
    now = METADATA | {"inputs": name_inputs(config, None)}
    with pytest.raises(SpaceDriveError, match=r"begun otherwise .*inputs\.tokenizer"):
        write(out, [1], resume=True, metadata=now)
