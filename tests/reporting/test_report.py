from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from spacedrive_jax.cli.evaluate import Evaluate
from spacedrive_jax.cli.report import Report
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.reporting.build import write_report
from spacedrive_jax.reporting.cases import SplitErrors, choose_cases, image_origin
from tests.record_factory import encode_jpeg, encode_png, make_record, write_records

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags close, and collects addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            attributes = dict(attrs)
            assert attributes["alt"]
            self.images.append(attributes["src"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def says(self, text: str) -> bool:
        return text in re.sub(r"\s+", " ", "".join(self.text))


def read_page(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run on five keyframes with depth: good, middling and bad predictions."""
    rng = np.random.default_rng(3)
    depth = encode_png(np.full((45, 80), 10 * 256, np.uint16))
    val = [
        make_record(rng, token=f"token-{index}", exact_depth=[depth] * 6, scene_name=f"scene-<{index}>")
        for index in range(5)
    ]
    records = write_records(tmp_path / "records", {"val": val})
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    with (run / "predictions.jsonl").open("w") as lines:
        for index, record in enumerate(val):
            waypoints = (record["waypoints"] + 0.5 * index).tolist()
            entry = {
                "token": record["token"],
                "waypoints": waypoints,
                "text": f"answer <{index}>",
                "status": "ok",
            }
            lines.write(json.dumps(entry) + "\n")
    with (run / "metrics.jsonl").open("w") as lines:
        for step in range(1, 80):
            logged = {
                "step": step,
                "loss": 5 / step,
                "loss_position": 2 / step,
                "odd_number": step,
                "note": "x",
            }
            lines.write(json.dumps(logged) + "\n")
    (run / "config.json").write_text(json.dumps({"model": {"width": 64}, "name": "<first>"}))
    facts = {"records": str(records), "split": "val", "versions": {"jax": "0.10.2"}}
    (run / "run.json").write_text(json.dumps(facts))
    Evaluate(run / "predictions.jsonl", records, out=run / "evaluation.json").run()
    return run


def test_whole_report(run_dir: Path) -> None:
    result = Report((run_dir,)).run()
    assert result == {"file": str(run_dir / "report.html"), "notices": []}
    page = read_page(run_dir)
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert page.says(f"{evaluation['l2']['avg']:.2f}")
    for text in (
        "Open-loop scores",
        "this run",
        "constant velocity",
        "Scored 5 of 5 keyframes",
        "No mean trajectory baseline",
        "all 6 photographed",
        "all 30 photographed",
        "exact depth images",
        "model.width",
        "run.json: versions.jax",
        evaluation["records"]["fingerprint"],
        "scene-<0>",
        "answer <4>",
    ):
        assert page.says(text), text
    # Best, median and worst, in this order.
    shown = re.findall(r"keyframe (token-\d)", re.sub(r"\s+", " ", "".join(page.text)))
    assert shown == ["token-0", "token-2", "token-4", "token-3"]  # the worst of the other scene last


def test_page_stands_alone(run_dir: Path) -> None:
    Report((run_dir,)).run()
    text = (run_dir / "report.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    # The horizon, four cases of three pictures and a depth scale, two curves: the losses and the odd number.
    assert len(page.images) == 1 + 4 * 4 + 2
    for source in page.images:
        kind, data = source.split(";base64,")
        content = base64.b64decode(data, validate=True)
        if kind in ("data:image/png", "data:image/jpeg"):
            assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is not None
        else:
            assert kind == "data:image/svg+xml"
            assert b"</svg>" in content


def test_same_run_same_page(run_dir: Path) -> None:
    Report((run_dir,)).run()
    first = (run_dir / "report.html").read_bytes()
    Report((run_dir,)).run()
    assert (run_dir / "report.html").read_bytes() == first


def test_missing_parts_are_named(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "config.json", "evaluation.json", "predictions.jsonl"):
        (run_dir / name).unlink()
    (run_dir / "run.json").write_text(json.dumps({"records": "gone"}))
    notices = " ".join(Report((run_dir,)).run()["notices"])
    page = read_page(run_dir)
    for text in (
        "config.json is absent",
        "metrics.jsonl is absent",
        "No evaluation file",
        "The records folder gone named in run.json is not here",
        "There is no prediction file predictions.jsonl",
    ):
        assert text in notices
        assert page.says(text)
    assert page.images == []
    assert page.says("There is no evaluation to show.")


def test_records_without_predictions_pixels_or_map(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    bare = make_record(
        rng,
        token="bare",
        images=[b""] * 6,
        drivable_source="none",
        drivable_fine=b"",
        waypoint_mask=np.zeros(6, bool),
        past_mask=np.zeros(2, bool),
    )
    records = write_records(tmp_path / "records", {"val": [bare]})
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"records": str(records)}))
    Report((run,)).run()
    page = read_page(run)
    for text in ("First keyframe", "no pixels", "neither depth images nor a LiDAR sweep", "all 6 absent"):
        assert page.says(text), text
    assert len(page.images) == 1


def test_rendered_images_are_said_to_be_rendered(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    flags = np.array([True] * 4 + [False] * 2)
    records = write_records(
        tmp_path / "records", {"val": [make_record(rng, token="a", image_rendered=flags)]}
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    notices = Report((run,), records=records, highlight=("a",)).run()["notices"]
    assert any("2 photographed, 4 rendered of 6" in notice for notice in notices)
    assert read_page(run).says("camera images: 2 photographed, 4 rendered of 6")


def test_files_of_other_datasets_are_not_called_photographs() -> None:
    origin = image_origin(make_record(np.random.default_rng(0), images=[b"jpeg"] * 5 + [b""]))
    assert origin.describe({"source": {"version": "v1.0-mini"}}) == "5 photographed, 1 absent of 6"
    assert (
        origin.describe({"source": {"version": "v1.0-town"}})
        == "5 from the files of v1.0-town, 1 absent of 6"
    )
    assert (origin + origin).absent == 2


def test_lidar_colors_the_views(tmp_path: Path) -> None:
    from spacedrive_jax.reporting.cameras import camera_strip, depth_source

    rng = np.random.default_rng(1)
    sweep = np.zeros((50, 5), np.float32)
    sweep[:, 0], sweep[:, 1], sweep[:, 2] = 12.0, np.linspace(-3, 3, 50), 1.0
    record = make_record(rng, lidar=sweep.tobytes())
    assert depth_source(record) == "lidar"
    without = camera_strip({**record, "lidar": b""})
    assert camera_strip(record).shape[0] == 2 * without.shape[0]


def test_the_depth_that_a_run_saw_is_laid_over_the_views() -> None:
    from spacedrive_jax.data.depth_cache import CachedDepth
    from spacedrive_jax.data.depth_sources import DepthConfig, record_patch_depth
    from spacedrive_jax.data.lidar import UNALIGNED, Alignment
    from spacedrive_jax.reporting.cameras import TILE_SIZE, camera_strip, depth_source

    grey = encode_jpeg(np.full((45, 80, 3), 128, np.uint8))
    record = make_record(np.random.default_rng(1), images=[grey] * 6)
    plain = camera_strip(record)
    depth = np.tile(np.array([[2.0, 60.0]], np.float32), (6, 1, 1))
    alignments = (Alignment(30.0, 0.0, 99), *[UNALIGNED] * 5)
    cached = CachedDepth("unidepth", "min", depth, alignments, full=())
    seen = record_patch_depth(record, (1, 2), DepthConfig(sources=("fused", "unidepth")), cached)
    assert depth_source(record, seen) == "run"
    strip = camera_strip(record, seen)
    assert strip.shape[0] == 2 * plain.shape[0]
    width, height = TILE_SIZE
    front_left, front = (
        strip[plain.shape[0] // 2 :][height // 2, start : start + width].astype(int)
        for start in (3, width + 9)
    )
    # Near is yellow, far is violet; the front camera's alignment moves all of its near half to the far end.
    assert front_left[width // 4, 1] > front_left[3 * width // 4, 1] + 60
    assert np.abs(front[width // 4] - front[3 * width // 4]).max() < 8


def test_scores_of_other_records_are_flagged(run_dir: Path, tmp_path: Path) -> None:
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    evaluation["records"]["fingerprint"] = "another"
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    notices = Report((run_dir,)).run()["notices"]
    assert any("computed on other records (fingerprint another)" in notice for notice in notices)


@pytest.mark.parametrize(
    ("trained_on", "noted"), [("{records}", 1), ("/gone:0.75,{records}:0.25", 0), ("/gone:1,/lost:1", 1)]
)
def test_a_run_trained_on_other_records_is_flagged(run_dir: Path, trained_on: str, noted: int) -> None:
    provenance = json.loads((run_dir / "run.json").read_text())
    records = Path(provenance["records"]).resolve()
    of_several = {"records": trained_on.format(records=records), "records_fingerprint": "of all"}
    (run_dir / "run.json").write_text(json.dumps(provenance | of_several))
    notices = Report((run_dir,), records=records).run()["notices"]
    assert sum("was trained on other records (fingerprint of all)" in each for each in notices) == noted


def test_scores_of_another_split_are_flagged(run_dir: Path) -> None:
    notices = Report((run_dir,), split="all").run()["notices"]
    assert notices == ["The omnidrive scores are of split val, the keyframes shown are of split all."]


def test_resumed_and_cut_off_logs(run_dir: Path) -> None:
    from spacedrive_jax.reporting.run_files import read_run

    (run_dir / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo'
    )
    files = read_run(run_dir)
    assert [step["loss"] for step in files.steps] == [3, 1.5]
    assert any("last line of metrics.jsonl is cut off" in text for text in files.missing)
    (run_dir / "metrics.jsonl").write_text('{"step": 1\n{"step": 2, "loss": 2}\n')
    with pytest.raises(SpaceDriveError, match=r"metrics\.jsonl, line 1: is not JSON"):
        read_run(run_dir)


def test_errors_name_what_to_mend(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SpaceDriveError, match="no run directory"):
        Report((tmp_path / "nowhere",)).run()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SpaceDriveError, match="does not look like a run"):
        Report((empty,)).run()
    with pytest.raises(SpaceDriveError, match="--highlight unknown"):
        Report((run_dir,), highlight=("unknown",)).run()
    with pytest.raises(SpaceDriveError, match="is not a finished records folder"):
        Report((run_dir,), records=empty).run()
    (run_dir / "config.json").write_text("{")
    with pytest.raises(SpaceDriveError, match=r"config\.json is not JSON"):
        Report((run_dir,)).run()
    assert not list(run_dir.glob("*.partial"))
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    "place",
    [("samples",), ("baselines", "constant_velocity", "samples"), ("l2", "avg"), ("coverage", "share")],
)
def test_numbers_of_an_evaluation_file_are_numbers(run_dir: Path, place: tuple[str, ...]) -> None:
    file = next(path for path in run_dir.glob("*.json") if "coverage" in path.read_text())
    value = json.loads(file.read_text())
    *outer, name = place
    inner = value
    for part in outer:
        inner = inner[part]
    inner[name] = "<script>alert(1)</script>"
    file.write_text(json.dumps(value))
    with pytest.raises(SpaceDriveError, match=r"is not what evaluate wrote \(Expected .* - at `\$\."):
        write_report(run_dir)


def test_a_browser_may_neither_run_nor_fetch_anything(run_dir: Path) -> None:
    page = write_report(run_dir).file.read_text()
    assert "Content-Security-Policy\" content=\"default-src 'none'; img-src data:" in page
    assert "script-src" not in page


def test_a_case_shows_the_question_and_explains_the_tokens(run_dir: Path) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    config |= {"data": {"command": "navigation", "target_points": False}, "model": {"ego_status": "both"}}
    (run_dir / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        line["text"] = "Here is the planning trajectory [<POS_INDICATOR><POS_EMBEDDING>]."
    (run_dir / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Report((run_dir,)).run()
    page = read_page(run_dir)
    assert page.says("question [6 images] You are driving in ")
    assert page.says("Please provide the planning trajectory for the ego car")
    assert page.says("<POS_INDICATOR> announces a coordinate: the decoder reads it, in metres")
    assert page.says("0.1 m grid, mean L2 up to the horizon")


def test_unparsed_answers_are_called_so(run_dir: Path) -> None:
    lines = (run_dir / "predictions.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"token": "token-0", "waypoints": [], "text": "no", "status": "unparsed"})
    (run_dir / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    records = json.loads((run_dir / "run.json").read_text())["records"]
    Evaluate(run_dir / "predictions.jsonl", Path(records), out=run_dir / "evaluation.json").run()
    Report((run_dir,), highlight=("token-0",)).run()
    page = read_page(run_dir)
    assert page.says("1 unparsed (the answer holds no trajectory)")
    assert page.says("unparsed: the answer holds no trajectory")
    assert page.says("Unparsed answers1 of 5")


def test_the_interval_stands_beside_the_average(run_dir: Path) -> None:
    Report((run_dir,)).run()
    low, high = json.loads((run_dir / "evaluation.json").read_text())["confidence"]["l2"]["avg"]
    page = read_page(run_dir)
    assert page.says(f"95 %: {low:.2f} to {high:.2f}")


def test_the_first_case_moves() -> None:
    errors = {"prediction": np.array([[0.0], [0.5], [0.2]])}
    origin = image_origin(make_record(np.random.default_rng(0)))
    measured = SplitErrors(errors, ("still", "far", "near"), ("a", "a", "a"), (0.0, 9.0, 5.0), {}, origin)
    assert choose_cases(measured, ())[0] == ("Best that moves", "near")


@pytest.fixture
def second_run(run_dir: Path) -> Path:
    """Another run on the same records: nearer to what was driven, no last answer, another learning rate."""
    second = run_dir.parent / "second"
    shutil.copytree(run_dir, second)
    lines = [json.loads(line) for line in (second / "predictions.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line["waypoints"] = (np.array(line["waypoints"]) - 0.4 * index).tolist()
    (second / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    (second / "config.json").write_text(json.dumps({"model": {"width": 128}, "name": "<second>"}))
    return second


def test_runs_are_compared_keyframe_by_keyframe(run_dir: Path, second_run: Path) -> None:
    facts = Report((run_dir, second_run), workers=1).run()
    assert facts == {"file": str(run_dir / "compare.html"), "notices": []}
    page = Page((run_dir / "compare.html").read_text())
    # Over keyframes 0 to 3 the errors are sqrt(2) * 0.5 i and sqrt(2) * 0.1 i.
    assert page.says(f"{-0.4 * 1.5 * 2**0.5:.2f}")
    assert page.says("Against first, keyframe by keyframe")
    for text in ("model.width", "64", "128"):
        assert page.says(text), text
    assert not page.says("model.depth")
    assert len(page.images) == 3  # loss, position loss, the odd number


def test_runs_that_cannot_be_scored_still_show_their_curves(run_dir: Path, second_run: Path) -> None:
    (second_run / "predictions.jsonl").unlink()
    notices = Report((run_dir, second_run), workers=1).run()["notices"]
    assert notices == ["second has no predictions (predictions.jsonl) and is not scored."]
    (run_dir / "predictions.jsonl").unlink()
    assert any(
        "has no predictions: `predict" in text for text in Report((run_dir, second_run)).run()["notices"]
    )
    page = Page((run_dir / "compare.html").read_text())
    assert page.says("No scores: ")
    assert len(page.images) == 3


def test_comparing_refuses_what_makes_no_sense(run_dir: Path, second_run: Path) -> None:
    with pytest.raises(ConfigError, match="a run is given twice"):
        Report((run_dir, run_dir)).run()
    with pytest.raises(ConfigError, match="go with one run"):
        Report((run_dir, second_run), highlight=("token-0",)).run()
    with pytest.raises(ConfigError, match="name the folder of a run"):
        Report(()).run()


def test_a_run_folder_is_scored_on_what_it_was_predicted_on(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "evaluation.json").unlink()
    facts = Evaluate(run_dir=run_dir).run()
    assert facts["file"] == str(run_dir / "predictions.omnidrive.json")
    assert (facts["samples"], facts["records"]["split"]) == (5, "val")
    assert Report((run_dir,)).run()["notices"] == []
    with pytest.raises(ConfigError, match="name a run folder, or give --predictions"):
        Evaluate(predictions=run_dir / "predictions.jsonl").run()
    (run_dir / "predictions.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no predictions\.jsonl: predict first"):
        Evaluate(run_dir=run_dir).run()


def test_a_model_that_says_no_trajectory_is_told_so(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    unparsed = [
        {"token": line["token"], "waypoints": [], "text": "no", "status": "unparsed"} for line in lines
    ]
    (run_dir / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unparsed))
    with pytest.raises(DataError, match=r"5 of them unparsed: their answers hold no trajectory\)$"):
        Evaluate(run_dir=run_dir).run()


def test_scores_of_other_predictions_are_flagged(run_dir: Path) -> None:
    lines = (run_dir / "predictions.jsonl").read_text().splitlines()
    (run_dir / "predictions.jsonl").write_text("\n".join(lines[:-1]))
    notices = Report((run_dir,)).run()["notices"]
    assert len(notices) == 1
    assert notices[0].startswith("The omnidrive scores are of other predictions than")


def test_the_page_says_what_flags_changed_and_what_a_metric_lacked(run_dir: Path) -> None:
    flags = {"axes": "forward-right", "discrete_coords": 0.5, "pedestrians": True, "protocol": "corrected"}
    Evaluate(run_dir=run_dir, out=run_dir / "evaluation.json", **flags).run()
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    for metric in ("collision", "intersection"):
        evaluation[metric] = dict.fromkeys(("1s", "2s", "3s", "avg"))
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    Report((run_dir,)).run()
    page = read_page(run_dir)
    for said in ("People count as obstacles too.", "read as forward-right.", "floored to a grid of 0.5 m."):
        assert page.says(said)
    tiles = re.findall(r"<dt>(Coll|Off)[^<]*</dt><dd>([^<]*)</dd>", (run_dir / "report.html").read_text())
    assert tiles == [("Coll", "no annotations"), ("Off", "no map")]


def test_what_others_left_in_a_run_does_not_hide_it(run_dir: Path) -> None:
    for name in ("._evaluation.json", ".DS_Store"):
        (run_dir / name).write_bytes(b"\0\5\x16\7\xff")
    (run_dir / "settings.json").write_text('{ // of an editor\n "a": 1 }')
    assert [each[:28] for each in Report((run_dir,)).run()["notices"]] == ["settings.json is not read: n"]
    Evaluate(run_dir=run_dir).run()
    (run_dir / "predictions.omnidrive.json").write_text("{")
    with pytest.raises(SpaceDriveError, match=r"omnidrive\.json is not JSON"):
        Report((run_dir,)).run()


def test_predictions_in_other_axes_are_shown_as_they_were_scored(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    turned = [each | {"waypoints": [[-y, x] for x, y in each["waypoints"]]} for each in lines]
    before = Report((run_dir,)).run() and read_page(run_dir)
    (run_dir / "predictions.jsonl").write_text("\n".join(map(json.dumps, turned)))
    Evaluate(run_dir=run_dir, out=run_dir / "evaluation.json", axes="right-forward").run()
    assert Report((run_dir,)).run()["notices"] == []
    assert read_page(run_dir).images == before.images
