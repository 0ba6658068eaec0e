"""The day of somebody with weights of their own, with a kill and mistakes, and nothing removed by hand."""

import json

import pytest

from spacedrive_jax import open_model
from tests.day import Day


@pytest.mark.slow
def test_a_day_with_weights_of_ones_own(tmp_path, capsys):
    day = Day(tmp_path, capsys)
    trained = day.train()
    assert (trained["step"], trained["finished"], trained["start"]) == (day.steps, True, trained["start"])
    assert trained["start"] >= 4
    lines = [json.loads(line) for line in (day.run_dir / "metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line["validation/l2"] for line in lines if "validation/l2" in line}
    assert min(validated.values()) == trained["best"]["value"] == validated[trained["best"]["step"]]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert day.predict()["samples"] == 3
    scores = day.look()
    assert scores["samples"] > 0
    exported = open_model(day.export())
    assert exported.config.decoder.hidden_size == 32
