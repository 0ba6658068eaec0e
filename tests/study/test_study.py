"""Studies end to end: run, killed, gone on with; the arithmetic of their answers by hand."""

import dataclasses
import json
import re

import numpy as np
import pytest

from spacedrive_jax.cli.main import main
from spacedrive_jax.config import change
from spacedrive_jax.data.language_data import LanguageData
from spacedrive_jax.data.prompts import counterfactual_text
from spacedrive_jax.data.records import open_records
from spacedrive_jax.driving import drive
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.evaluation.counterfactual import STATUS_RISKS, corrected_risks
from spacedrive_jax.evaluation.evaluate import obstacles_of
from spacedrive_jax.inference.open_model import config_of_run
from spacedrive_jax.json_files import to_json
from spacedrive_jax.study import measures, runs
from spacedrive_jax.study.analysis import answer, effect_of, spearman
from spacedrive_jax.study.measures import (
    ANSWERS,
    candidates,
    counterfactual,
    risks_of,
    write_language_data,
)
from spacedrive_jax.study.plan import Claim, Drives, Factor, Level, RankClaim, known_plans, load_plan
from spacedrive_jax.study.readout import read_back
from spacedrive_jax.study.report import write_pages
from tests.conftest import ROOT
from tests.training.runs import make_records

PLAN = ROOT / "tests" / "study" / "study_plan.py"


def rows_of(folder):
    lines = (folder / runs.RESULTS).read_text().splitlines()
    return [{**json.loads(line), "seconds": 0.0} for line in lines]


@pytest.mark.usefixtures("unchecked")
def test_a_killed_run_goes_on_to_the_same_row(tmp_path, capsys, monkeypatch):
    command = ["study", f"{PLAN}:drives", "--records", str(make_records(tmp_path / "records")), "--json"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["finished"], told["planned"]) == (2, 2)
    assert (tmp_path / "whole" / "report.html").samefile(told["file"])
    row, disturbed = rows_of(tmp_path / "whole")
    assert set(row["measures"]) == {"l2", "collision", "lateral", "loss", "unparsed"}
    assert list(row["groups"]["l2"]) == ["scene-0000"]
    assert row["groups"]["l2"]["scene-0000"][1] == 3
    # One training, measured twice; what is asked at test is what the samples are made with.
    (trained,) = (tmp_path / "whole" / "runs").iterdir()
    answers = [f"predictions{asked}.jsonl" for asked in ("", f"-{disturbed['run']}")]
    assert {file.name for file in trained.glob("predictions*.jsonl")} == set(answers)
    assert disturbed["measures"]["loss"] == row["measures"]["loss"]
    again = {"data.sequence_length": 20}
    with pytest.raises(ConfigError, match="sequence_length 20: raise it"):
        measures.predict(trained, tmp_path / "records", "val", tmp_path / "again.jsonl", changes=again)

    asked = []

    def killed(*arguments, **options):
        asked.append(options["changes"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return predict(*arguments, **options)

    predict, out = measures.predict, tmp_path / "killed"
    monkeypatch.setattr(measures, "predict", killed)
    assert main([*command, "--out", str(out)]) == 130
    assert rows_of(out) == [row]
    assert asked == [{}, {"data.depth.disturb.scale": 0.5}]
    monkeypatch.setattr(measures, "predict", predict)
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert rows_of(out) == [row, disturbed]
    check_finely(trained, row)
    check_drives(trained, tmp_path, monkeypatch)
    check_forgotten(trained)


def check_finely(trained, row):
    """What is held against driving goes on with the answers that are there, and agrees with itself."""
    config = config_of_run(trained)
    found = measures.open_loop(config, trained, "predictions.jsonl", {}, finely=True)
    assert found.groups["l2"] == row["groups"]["l2"]
    total, count = found.groups["lateral on turns"]["scene-0000"]
    assert 0 <= count <= found.groups["lateral"]["scene-0000"][1]
    assert total <= found.groups["lateral"]["scene-0000"][0]
    values = found.measures
    assert values["l2 at 1 s"] < values["l2"] < values["l2 at 3 s"]
    assert max(values["along"], values["lateral"]) <= values["l2 at 3 s"]


def check_drives(trained, folder, monkeypatch):
    """A drive that was finished before is not driven again, and is scored as it was."""
    scenarios = folder / "one.json"
    scenarios.write_text(json.dumps([{"kind": "straight", "town": "boston-seaport", "seed": 0}]))
    drives = Drives(str(scenarios), image_size=(18, 32), together=1)
    found = measures.closed_loop(trained, folder / "driven", {}, drives)
    (record,) = (folder / "driven").glob("drives/*/result.json")
    score = json.loads(record.read_text())["scores"]["score_composed"]
    np.testing.assert_allclose(found.measures["lost"], 100 - score, atol=1e-6)
    assert list(found.groups["lost"]) == [record.parent.name]
    monkeypatch.setattr(drive, "write_drive", lambda *_: pytest.fail("driven twice"))
    assert measures.closed_loop(trained, folder / "driven", {}, drives) == found


def check_forgotten(trained):
    """Who has not been trained on has forgotten nothing; else what the base knew counts."""
    config = config_of_run(trained)
    asked = {"data.conversation.tasks": "questions", "data.conversation.scene_texts": True}
    asked |= {"model.coordinate_tokens": False, "data.sequence_length": 640, "data.max_targets": 320}
    base = change(config, "base", asked)
    found = measures.forgotten(config, trained, base, trained)
    assert found.measures["forgotten"] == 0.0
    assert 0.5 < found.measures["wrong words"] <= 1.0  # after two steps
    kept = trained / "answers.json"
    wrong, words = json.loads(kept.read_text())["scene-0000"]
    assert [wrong, words] == found.groups["wrong words"]["scene-0000"]
    kept.write_text(json.dumps({"scene-0000": [wrong - 7, words]}))
    found = measures.forgotten(config, trained, base, trained)
    assert found.groups["forgotten"] == {"scene-0000": [7.0, words]}


def test_a_killed_study_goes_on_to_the_same_table(tmp_path, capsys, monkeypatch):
    command = ["study", f"{PLAN}:reads", "--json"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    read_back, done, out = runs.read_back, [], tmp_path / "killed"

    def killed(*arguments):
        done.append(arguments)
        if len(done) == 2:
            raise KeyboardInterrupt
        return read_back(*arguments)

    monkeypatch.setattr(runs, "read_back", killed)
    assert main([*command, "--out", str(out)]) == 130
    assert len(rows_of(out)) == 1
    page = (out / "report.md").read_text()
    assert "1 of 2 planned runs" in page
    assert "Not finished: encoder nerf, seed 1." in page
    assert "| Sin-cos beats NeRF | not run |" in page
    with (out / runs.RESULTS).open("a") as file:
        file.write('{"plan": "re')  # killed while a row was written
    capsys.readouterr()
    assert main([*command, "--out", str(out)]) == 1
    assert "--resume goes on" in capsys.readouterr().err
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert rows_of(out) == rows_of(tmp_path / "whole")

    # The page needs the results alone, and says the same.
    again = tmp_path / "again"
    options = ["--report", "--results", str(out / runs.RESULTS), "--out", str(again)]
    assert main([*command, *options]) == 0
    page = (out / "report.md").read_text()
    assert (again / "report.md").read_text() == page
    assert "| Sin-cos beats NeRF |" in page
    assert "not covered here: a longer training." in page
    html = (out / "report.html").read_text()
    assert "data:image/svg+xml" in html
    assert "<script" not in html


def row(level, seed, groups, plan="p"):
    return runs.Row(plan, f"{level}-{seed}", {"way": level}, seed, "", {}, {"l2": groups}, {}, 1.0, "0")


@pytest.mark.parametrize(
    ("text", "found", "then"),
    [
        ("{0}\n{1}\n", 2, "{0}\n{1}\n"),
        ("{0}\n{1}", 2, "{0}\n{1}\n"),  # by hand, or by an editor that leaves out the end
        ("{0}\r\n\n{1}\n\n", 2, "{0}\r\n\n{1}\n\n"),
        ('{0}\n{1}\n{{"plan": "p", "cel', 2, "{0}\n{1}\n"),
    ],
)
def test_a_last_row_without_an_end_counts_and_one_cut_off_does_not(tmp_path, text, found, then):
    lines = [to_json(dataclasses.asdict(row(level, 0, {}))) for level in "ab"]
    (tmp_path / "r.jsonl").write_bytes(text.format(*lines).encode())
    assert len(runs.read_rows(tmp_path / "r.jsonl")) == found
    runs._drop_cut_line(tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_bytes() == then.format(*lines).encode()


CLAIM = Claim("a beats b", "l2", {"way": "a"}, {"way": "b"}, margin=0.5)


def table(difference, spread, seeds=3, scenes=8):
    """Rows of two ways whose scenes differ by `difference`, give or take `spread` from scene to scene."""
    rng = np.random.default_rng(0)
    made = []
    for seed in range(seeds):
        level = rng.normal(2.0, 1.0, scenes)
        off = difference + spread * rng.normal(size=scenes)
        for way, values in (("a", level), ("b", level + off)):
            made.append(row(way, seed, {f"s{index}": [4 * v, 4.0] for index, v in enumerate(values)}))
    return made


@pytest.mark.parametrize(
    ("difference", "spread", "verdict"),
    [
        (1.0, 0.0, "yes"),
        (0.2, 0.01, "yes, but less than matters"),
        (0.0, 0.1, "no"),
        (-1.0, 0.1, "no"),
        (0.3, 2.0, "cannot tell"),
    ],
)
def test_answers_follow_the_rule(difference, spread, verdict):
    found = answer(CLAIM, table(difference, spread))
    assert found.verdict == verdict
    assert found.effect.interval[0] <= found.effect.mean <= found.effect.interval[1]


def test_pairs_cancel_what_they_share():
    """Scenes differ by metres; two ways that differ by exactly 1 m everywhere differ by 1 m in every draw."""
    effect = effect_of(CLAIM, table(1.0, 0.0))
    np.testing.assert_allclose((effect.mean, *effect.interval), 1.0)
    assert effect.smallest < 1e-9
    assert (effect.seeds, effect.groups) == (3, 8)
    assert effect_of(CLAIM, [each for each in table(1.0, 0.0) if each.cell["way"] == "a"]) is None


def test_what_few_scenes_have_is_told_from_the_draws_that_hold_some():
    made = []
    for seed, off in enumerate((0.9, 1.0, 1.1)):
        for way, value in (("a", 1.0), ("b", 1.0 + off)):
            made.append(row(way, seed, {"s0": [value, 1.0], "s1": [0.0, 0.0]}))
    effect = effect_of(CLAIM, made)  # a third of the draws holds nothing that was measured
    np.testing.assert_allclose((effect.mean, *effect.interval), (1.0, 0.9, 1.1))
    assert 0.0 < effect.smallest < 1.0


RANKS = RankClaim("less a goes with less lost", "a", "lost")


def driven(agreement, cells=8, seeds=2):
    """Rows whose driving follows their metric as far as `agreement` says, each cell's seeds alike."""
    rng = np.random.default_rng(1)
    made = []
    for cell in range(cells):
        lost = agreement * cell + (1 - abs(agreement)) * cells * rng.normal()
        for seed in range(seeds):
            groups = {
                "a": {f"s{index}": [3.0 * (cell + 0.1 * index), 3.0] for index in range(5)},
                "lost": {f"d{index}": [lost + 0.1 * index, 1.0] for index in range(6)},
            }
            name = f"{cell}-{seed}"
            made.append(runs.Row("p", name, {"model": str(cell)}, seed, "", {}, groups, {}, 1.0, "0"))
    return made


@pytest.mark.parametrize(
    ("agreement", "verdict", "mean"),
    [(1.0, "yes", 1.0), (-1.0, "no", -1.0), (0.1, "cannot tell", None)],
)
def test_ranks_are_held_against_ranks(agreement, verdict, mean):
    found = answer(RANKS, driven(agreement))
    assert found.verdict == verdict
    assert (found.effect.seeds, found.effect.groups) == (16, 6)
    assert mean is None or np.isclose(found.effect.mean, mean)
    low, high = found.effect.interval
    assert -1.0 <= low <= found.effect.mean <= high <= 1.0
    apart = dataclasses.replace(RANKS, among={"model": "0"})
    assert answer(apart, driven(agreement)).verdict == "not run"


def test_spearman_by_hand():
    assert np.isclose(spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0])), 0.8)
    # Ties share their mean rank: 1.5, 1.5, 3 against 1, 2, 3.
    assert np.isclose(spearman(np.array([5.0, 5.0, 9.0]), np.array([1.0, 2.0, 3.0])), np.sqrt(0.75))
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_other_trajectories_have_the_risks_that_they_run(tmp_path):
    records, folder = make_records(tmp_path / "records"), tmp_path / "texts"
    write_language_data(str(records), folder)
    split, data, unsafe, asked = open_records(records, "val"), LanguageData(folder), [], []
    collisions = 0
    for record in map(split.__getitem__, range(len(split))):
        tests = data.counterfactual_test(record["token"])
        if not np.all(record["waypoint_mask"]):
            assert not tests
            continue
        others = obstacles_of(record)
        into = np.repeat(others.centre[others.mask[:, 5], 5][:1, None], 6, axis=1)
        away = np.full((1, 6, 2), 45.0)
        ways = np.concatenate([candidates(record)[:1], away, into])
        recorded, far, *hit = risks_of(record, ways)
        assert recorded == ()
        assert "Collision" not in far
        assert len(hit) == bool(others.mask[:, 5].any())
        assert all("Collision" in each for each in hit)
        collisions += len(hit)
        assert len({test.trajectory for test in tests}) == 4
        for test in tests:
            said = {risk for word, risk in STATUS_RISKS.items() if word in test.risks}
            assert corrected_risks(ANSWERS[test.risks]) == said
            unsafe.append(bool(said))
            asked.append(
                {"token": record["token"], "Q": counterfactual_text(test.trajectory), "A": "A crash!"}
            )
        taught = [pair.answer for pair in data.counterfactual_questions(record["token"])]
        assert taught == [ANSWERS[test.risks] for test in tests[:2]]
    assert collisions
    assert 0 < sum(unsafe) < len(unsafe)
    # Who calls everything unsafe misses nothing, and every safe one is a false alarm.
    run = tmp_path / "run"
    run.mkdir()
    (run / "answers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in asked))
    config = change(load_plan(f"{PLAN}:drives").base, "run", {"data.records": str(records)})
    found = counterfactual(config, run, folder).measures
    assert (found["missed"], found["false alarm"], found["unsafe"]) == (0.0, 1.0, np.mean(unsafe))
    assert found["misjudged"] == 1 - np.mean(unsafe)
    whole = (folder / "whole.json").stat().st_mtime_ns
    write_language_data(str(records), folder)
    assert (folder / "whole.json").stat().st_mtime_ns == whole


def test_points_are_read_back_and_noise_costs():
    plan = load_plan(f"{PLAN}:reads")
    sizes = dataclasses.replace(plan.readout, steps=60)
    learns = change(plan.base, "learns", {"model.decoder.kind": "mlp"})
    clean, noisy = (read_back(learns, dataclasses.replace(sizes, noise=noise)) for noise in (0.0, 2.0))
    assert clean["measures"]["error"] < noisy["measures"]["error"] < 26.0
    blocks = clean["groups"]["error"].values()
    assert sum(count for _, count in blocks) == 200
    np.testing.assert_allclose(sum(total for total, _ in blocks) / 200, clean["measures"]["error"])
    fitted = read_back(plan.base, sizes)["measures"]["error"]
    assert fitted < clean["measures"]["error"]  # solved, not trained
    high = change(plan.base, "high", {"model.encoder.kind": "nerf"})  # 20,000 octaves
    with pytest.raises(SpaceDriveError, match="no number"):
        read_back(high, sizes)


def test_what_a_run_is_does_not_depend_on_its_place():
    plan = load_plan(f"{PLAN}:reads")
    here, there = (list(plan.runs(records)) for records in ("a", "b/c"))
    names = [run.identity("readout", "data", None) for run in here]
    assert names == [run.identity("readout", "data", None) for run in there]
    assert len(set(names)) == 2
    assert names[0] != here[0].identity("readout", "other", None)
    changed = dataclasses.replace(plan, base=change(plan.base, "x", {"train.steps": 3}))
    assert names[0] != next(changed.runs()).identity("readout", "data", None)
    tested = list(load_plan(f"{PLAN}:drives").runs())
    assert len({run.identity("open_loop", "data", None) for run in tested}) == 2
    assert len({run.identity("open_loop", "data", None, trained=True) for run in tested}) == 1
    # Driven, the same training is another row.
    drives = Drives()
    assert (
        len({run.identity("open_loop", "data", None, each) for run in tested for each in (None, drives)}) == 4
    )
    assert tested[0].identity("open_loop", "data", None, drives, trained=True) == tested[0].identity(
        "open_loop", "data", None, trained=True
    )
    several = dataclasses.replace(plan, seeds=(1, 2))
    assert [run.identity("readout", "data", None) for run in several.with_seeds((1,)).runs()] == names
    with pytest.raises(ConfigError, match="plan reads has the seeds 1, 2, not 3"):
        several.with_seeds((3,))


def test_plans_are_sound():
    plans = known_plans()
    assert {
        "encodings_readout",
        "where",
        "coordinates",
        "losses",
        "depth",
        "status",
        "ranks",
        "loops",
    } <= set(plans)
    for plan in plans.values():
        assert len(plan.seeds) >= 3
        for run in plan.runs():
            assert run.config.name.startswith(plan.name)
    plan = load_plan(f"{PLAN}:drives")
    with pytest.raises(ConfigError, match="there is no level loss = l3"):
        dataclasses.replace(plan, claims=(Claim("x", "l2", {"loss": "l3"}, {"loss": "l1"}, 0.1),))
    with pytest.raises(ConfigError, match="defines drives, reads: give"):
        load_plan(str(PLAN))
    with pytest.raises(ConfigError, match="steps cannot be changed for predictions alone"):
        dataclasses.replace(plan, factors=(Factor("x", (Level("a", {"train.steps": 1}),), at_test=True),))
    with pytest.raises(ConfigError, match="there is no level loss = l4"):
        dataclasses.replace(plan, claims=(dataclasses.replace(RANKS, among={"loss": "l4"}),))
    with pytest.raises(ConfigError, match="nothing is trained that could drive"):
        dataclasses.replace(load_plan(f"{PLAN}:reads"), drives=Drives())
    factors = (Factor("loss", (Level("a", {"train.steeps": 1}),)),)
    wrong = dataclasses.replace(plan, factors=factors, claims=())
    with pytest.raises(ConfigError, match="has no field"):
        list(wrong.runs())
    with pytest.raises(SpaceDriveError, match="no plan 'nothing'"):
        load_plan("nothing")


RESULTS = sorted((ROOT / "benchmarks" / "results" / "study").glob("*/results.jsonl"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.parent.name)
def test_a_kept_page_is_what_its_results_say(file, tmp_path):
    plan = load_plan(file.parent.name)
    write_pages(plan, runs.reported(plan, runs.read_rows(file)), tmp_path)
    assert (tmp_path / "report.md").read_text() == (file.parent / "report.md").read_text()


def test_a_page_is_of_one_set_of_records():
    file = next(file for file in RESULTS if file.parent.name == "depth")
    plan, rows = load_plan("depth"), runs.read_rows(file)
    other = [dataclasses.replace(row, data="other", run=f"other-{row.run}") for row in rows[:3]]
    with pytest.raises(DataError, match=r"made on 2 sets of records .*--records DIR says whose"):
        runs.reported(plan, rows + other)
    assert runs.reported(plan, rows + other, rows[0].data) == runs.reported(plan, rows)
    assert runs.reported(plan, rows + other, "other").rows == other

    # Of one run measured under several settings, the present ones.
    run = next(plan.runs())
    now = run.identity(plan.measure, rows[0].data, plan.pretrained(run.seed), plan.drives)
    present = dataclasses.replace(rows[0], cell=run.cell, seed=run.seed, run=now)
    before = [dataclasses.replace(present, run=name) for name in ("before", "long before")]
    assert runs.reported(plan, [before[0], present, before[1]]).rows == [present]
    with pytest.raises(DataError, match=r"several rows of .*none of the plan's present settings"):
        runs.reported(plan, before)


EFFECT = re.compile(r"([+-]\d+\.\d+) \[([+-]\d+\.\d+), ([+-]\d+\.\d+)\]")


def test_effects_on_the_page_are_those_of_kept_results():
    kept = [
        [float(number) for number in found]
        for file in RESULTS
        for found in EFFECT.findall((file.parent / "report.md").read_text())
    ]
    told = EFFECT.findall((ROOT / "docs" / "study.md").read_text())
    assert len(told) >= 10
    for found in told:
        assert np.isclose(kept, [float(number) for number in found], rtol=0, atol=5.1e-3).all(axis=1).any(), (
            found
        )
