"""Commands that score: `evaluate` predictions, `score-bench2drive` and `score-counterfactual` results."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import WORKERS, Bound, Bounds
from spacedrive_jax.console import Command, progress
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.io import inside, is_bucket, with_a_name
from spacedrive_jax.json_files import write_json

if TYPE_CHECKING:
    from spacedrive_jax.evaluation.bench2drive import RouteResult
    from spacedrive_jax.evaluation.prediction_files import AxesName
    from spacedrive_jax.evaluation.predictions import Predictions

METRICS = {"l2": "L2 (m)", "collision": "collision (%)", "intersection": "off road (%)"}
COLUMNS = ("1s", "2s", "3s", "avg")


@dataclasses.dataclass(frozen=True)
class Evaluate(Command):
    """Score predicted trajectories on recorded drives (open loop) and compare them with simple baselines.

    Writes the numbers as JSON, beside the predictions unless --out says otherwise, and prints a table. Of a
    run folder (evaluate RUN_DIR) the newest predictions are scored on what they were made on.

    Example: python -m spacedrive_jax evaluate --predictions runs/demo/predictions.jsonl
    --records data/records --split val --protocol omnidrive
    """

    predictions: Path | None = None
    """JSON Lines file written by `predict`, a folder of the published code's (one file per token), or a
    .json or .pkl dictionary of token to waypoints; the run's by default."""
    records: Path | None = None
    """Records folder written by `python -m data_prep`; those that the run was predicted on by default."""
    split: Literal["train", "val", "all"] | None = None
    """Which keyframes to score on; those that the run was predicted on by default, else val."""
    protocol: Literal["omnidrive", "vad", "uniad", "corrected"] = "omnidrive"
    """How steps are scored and combined; omnidrive is the paper's main table."""
    pedestrians: tyro.conf.FlagCreatePairsOff[bool] = False
    """Count people as obstacles too (corrected protocol only)."""
    compare: Path | None = None
    """Another prediction file or folder, compared keyframe by keyframe."""
    axes: Literal["forward-left", "forward-right", "right-forward"] = "forward-left"
    """What the two numbers of a waypoint mean; right-forward is the lidar frame of UniAD and VAD."""
    compare_axes: Literal["forward-left", "forward-right", "right-forward"] | None = None
    """What they mean in the file of --compare; the same as --axes by default."""
    discrete_coords: float | None = None
    """Floor predicted coordinates to a grid of this pitch in metres, as the published script can."""
    workers: int = 0
    """Processes that share the keyframes of a large split; 0 takes all cores."""
    out: Path | None = None
    """Where to write the JSON; <predictions stem>.<protocol>.json beside the predictions by default, if that
    folder can be written to."""
    run_dir: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")] = None
    """Folder of a run that `predict` has written to, instead of --predictions and --records."""

    BUCKETS: ClassVar[tuple[str, ...]] = ("predictions", "records", "compare", "out", "run_dir")
    WRITES: ClassVar[tuple[str, ...]] = ("out",)
    BOUNDS: ClassVar[Bounds] = {"discrete_coords": Bound(0.001, 100), "workers": WORKERS}

    def run(self) -> Mapping[str, Any]:
        """Scores the file, writes the JSON and prints the table.

        Raises:
            ConfigError: the predictions, records or split cannot be read, or nothing can be scored.
        """
        # Here, not above: the record reader takes a second to import, which --help need not wait for.
        if self.run_dir is not None:
            return self._of_run(self.run_dir).run()
        if self.predictions is None or self.records is None:
            raise ConfigError("name a run folder, or give --predictions FILE and --records DIR")
        from spacedrive_jax.data.records import open_records
        from spacedrive_jax.evaluation.evaluate import describe_source, evaluate
        from spacedrive_jax.evaluation.prediction_files import predictions_sha256
        from spacedrive_jax.evaluation.protocols import protocol_named

        beside = with_a_name(self.predictions)
        out = self.out or beside.with_name(f"{beside.stem}.{self.protocol}.json")
        if self.out is not None and not is_bucket(out) and not out.parent.is_dir():
            raise ConfigError(f"--out {out}: the folder {out.parent} does not exist")
        writable = is_bucket(out) or os.access(out.parent, os.W_OK)
        if self.out is not None and not writable:
            raise ConfigError(f"--out {out}: the folder {out.parent} cannot be written to")
        protocol = protocol_named(self.protocol, pedestrians=self.pedestrians)
        if self.compare_axes is not None and self.compare is None:
            raise ConfigError(
                f"--compare-axes {self.compare_axes}: says something of --compare, which is absent"
            )
        predictions = self._read(self.predictions, self.axes)
        compare_axes = self.compare_axes or self.axes
        compare = None if self.compare is None else self._read(self.compare, compare_axes)
        records = open_records(self.records, self.split or "val")
        evaluation = evaluate(
            records,
            predictions,
            [protocol],
            compare=compare,
            workers=self.workers or os.cpu_count() or 1,
            track=lambda keyframes: progress(
                keyframes, total=len(records), desc=f"evaluate ({self.protocol})", unit="keyframe"
            ),
        )[self.protocol]
        outcome = {
            **evaluation.to_json(),
            "predictions": str(self.predictions),
            "predictions_sha256": predictions_sha256(self.predictions),
            "axes": self.axes,
            "compare_axes": None if compare is None else compare_axes,
            "discrete_coords": self.discrete_coords,
            "records": describe_source(records),
            "file": str(out) if writable else None,
        }
        outcome["notes"] = [*self._options_notes(), *outcome["notes"]]
        if writable:
            write_json(out, outcome, indent=2)
        print(format_table(outcome))
        print(f"written to {out}" if writable else f"not written: {out.parent} is read-only, give --out FILE")
        return outcome

    def _of_run(self, run_dir: Path) -> Evaluate:
        """The same with what the run's newest predictions are and were made on, where no flag says it.

        Raises:
            DataError: the folder is no run, or nothing was predicted there.
        """
        from spacedrive_jax.reporting.run_files import read_run

        files = read_run(run_dir)
        predictions = self.predictions or files.predictions
        if not predictions.exists():
            raise DataError(
                f"{run_dir} has no {predictions.name}: predict first (python -m spacedrive_jax predict "
                f"--checkpoint {run_dir} --records {files.predicted.get('records', 'RECORDS')})"
            )
        named = files.predicted.get("records")
        if self.records is None and not named:
            raise DataError(f"{run_dir / 'run.json'} names no records: give --records DIR")
        split: Any = self.split or files.predicted.get("split")
        if split not in (None, "train", "val", "all"):
            raise DataError(f"{run_dir / 'run.json'}: split {split!r} is none of train, val, all")
        return dataclasses.replace(
            self,
            run_dir=None,
            predictions=predictions,
            records=self.records or files.resolve(str(named)),
            split=split,
        )

    def _options_notes(self) -> list[str]:
        """What the flags change of what the protocol's name says, for whoever sees the file or the page."""
        notes = []
        if self.pedestrians:
            notes.append("People count as obstacles too.")
        if self.axes != "forward-left":
            notes.append(f"Waypoints were read as {self.axes}.")
        if self.discrete_coords is not None:
            notes.append(f"Predicted coordinates were floored to a grid of {self.discrete_coords:g} m.")
        return notes

    def _read(self, path: Path, axes: AxesName) -> Predictions:
        from spacedrive_jax.evaluation.prediction_files import read_predictions
        from spacedrive_jax.evaluation.predictions import discretize

        predictions = read_predictions(path, axes)
        if self.discrete_coords is None:
            return predictions
        return discretize(predictions, self.discrete_coords)


def format_table(outcome: Mapping[str, Any]) -> str:
    """The scores against the baselines as text, with what was and was not counted below."""
    rows = {"prediction": outcome}
    comparison = outcome["comparison"]
    if comparison is not None:
        common = {"samples": comparison["samples"]}
        rows["both: here"] = common | comparison["here"]
        rows["both: there"] = common | comparison["there"]
        rows["here - there"] = common | comparison["difference"]
    rows |= outcome["baselines"]
    width = max(map(len, rows))
    group = 7 * len(COLUMNS)
    lines = [
        f"{outcome['protocol']} protocol, split {outcome['records']['split']} of "
        f"{outcome['records']['directory']}",
        "",
        " " * (width + 8) + "".join(f"  {title:^{group}}" for title in METRICS.values()),
        f"{'':{width}} {'samples':>7}"
        + ("  " + "".join(f"{column:>7}" for column in COLUMNS)) * len(METRICS),
    ]
    for name, scores in rows.items():
        cells = ("  " + "".join(_cell(scores[metric][column]) for column in COLUMNS) for metric in METRICS)
        lines.append(f"{name:{width}} {scores['samples']:>7}" + "".join(cells))
    lines += ["", _interval_line("average", outcome["confidence"])]
    if comparison is not None:
        lines.append(_interval_line("difference", comparison["confidence"]))
    coverage = outcome["coverage"]
    lines += [
        f"coverage: {coverage['counted']} of {coverage['eligible']} keyframes with a whole future "
        f"({100 * coverage['share']:.1f} %); the split has {coverage['records']}",
    ]
    lines += [
        f"  {name.replace('_', ' ')}: {item['count']}"
        for name, item in coverage.items()
        if isinstance(item, dict) and item["count"]
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in outcome["notes"])])


def _interval_line(what: str, confidence: Mapping[str, Any] | None) -> str:
    if confidence is None:
        return f"{what}: no interval, all keyframes are of one scene"
    parts = [
        f"{title} {interval[0]:.2f} to {interval[1]:.2f}"
        for metric, title in METRICS.items()
        if (interval := confidence[metric]["avg"]) is not None
    ]
    percent, scenes = 100 * confidence["level"], confidence["scenes"]
    return f"{what}, {percent:.0f} % interval over {scenes} scenes: {', '.join(parts)}"


def _cell(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:>7.2f}"


@dataclasses.dataclass(frozen=True)
class ScoreBench2Drive(Command):
    """Score a closed-loop Bench2Drive run from the evaluator's result JSON (or the shards of one run).

    Driving score and success rate are over all routes of the set: a route without a result counts as zero.

    Example: python -m spacedrive_jax score-bench2drive eval/merged.json --routes bench2drive220.xml
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RESULTS")]
    """Result files; several are taken as shards of one run."""
    routes: Path | None = None
    """Route set: the benchmark's .xml, a .json list or a text file of route numbers; 220 routes if absent."""
    metric_info: Path | None = None
    """Folder with <save name>/metric_info.json for each route: adds the comfort score."""
    junctions: Path | None = None
    """JSON object of route number to the completion (0..1) behind its first junction: adds traffic signs."""

    def run(self) -> Mapping[str, Any]:
        """Scores the run and prints the figures.

        Raises:
            ConfigError: a file cannot be read, or names routes twice or none of the set.
        """
        from spacedrive_jax.evaluation.bench2drive import (
            ability_rates,
            read_junctions,
            read_results,
            read_route_set,
            score_routes,
        )

        if not self.results:
            raise ConfigError("name at least one result file")
        results = read_results(self.results)
        route_set = None if self.routes is None else read_route_set(self.routes)
        scores = score_routes(results, route_set)
        counted = [result for result in results if result.route not in scores.foreign_routes]
        junctions = None if self.junctions is None else read_junctions(self.junctions)
        abilities = ability_rates(counted, junctions)
        smooth, without_motion = (
            (None, []) if self.metric_info is None else _comfort(counted, self.metric_info)
        )
        outcome = {
            **dataclasses.asdict(scores),
            "comfort": smooth,
            "without_motion": without_motion,
            "abilities": abilities,
            "route_file": None if self.routes is None else str(self.routes),
            "results": [str(path) for path in self.results],
        }
        print(_format_bench2drive(outcome))
        return outcome


def _comfort(results: Sequence[RouteResult], folder: Path) -> tuple[float | None, list[str]]:
    """Mean comfort in percent over the routes that have a log, and the routes that have none."""
    from spacedrive_jax.evaluation.bench2drive import comfort, read_motion

    if not folder.is_dir():
        raise ConfigError(f"--metric-info {folder}: no such folder")
    values, absent = [], []
    for result in results:
        path = inside(folder, result.save_name, f"route {result.route}: save_name") / "metric_info.json"
        if not path.is_file():
            absent.append(result.route)
            continue
        try:
            values.append(comfort(read_motion(path)))
        except SpaceDriveError as error:
            raise DataError(f"route {result.route}: {error}") from None
    if not values:
        raise DataError(f"--metric-info {folder}: holds no <save name>/metric_info.json of a scored route")
    return 100 * sum(values) / len(values), absent


def _format_bench2drive(outcome: Mapping[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    lines = [
        f"driving score  {number(outcome['driving_score'])}",
        f"success rate   {number(outcome['success_rate'])} %",
        f"efficiency     {number(outcome['efficiency'])} %",
        f"comfort        {number(outcome['comfort'])} %",
        "abilities      "
        + ", ".join(
            f"{name.replace('_0_0_3', ' (0.0.3)').replace('_', ' ')} {number(rate)}"
            for name, rate in outcome["abilities"].items()
        ),
        f"routes         {outcome['routes']} of {outcome['route_set']}, "
        f"{outcome['missing']} missing count as zero",
    ]
    lines += [f"  {status}: {count}" for status, count in outcome["statuses"].items()]
    for name, what in (
        ("missing_routes", "without a result"),
        ("foreign_routes", "not in the set and not counted"),
        ("without_speed", "left out of the efficiency: no usable speed check"),
        ("without_motion", "left out of the comfort: no metric_info.json"),
        ("inconsistent", "note: stored score does not follow from the infractions"),
    ):
        if outcome[name]:
            lines.append(f"{what}: {', '.join(outcome[name])}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ScoreCounterfactual(Command):
    """Score answers to "what if you drove this trajectory" by the risks they name.

    Prints accuracy, precision and recall for collision, red light, drivable area and safe, under the
    published keyword rule and under a corrected one.

    Example: python -m spacedrive_jax score-counterfactual --predictions answers/ --annotations eval_cf/
    """

    predictions: Path
    """What `predict --task counterfactual` wrote; or a folder with a JSON file per token, or one JSON object:
    [{"Q": question, "C" or "A": answer}]."""
    annotations: Path
    """Folder with a JSON or .pkl file per token, or one object: [{"traj": …, "status": […]}]."""

    every_question: tyro.conf.FlagCreatePairsOff[bool] = False
    """Score all questions about a keyframe; the published script scores the first."""

    def run(self) -> Mapping[str, Any]:
        """Scores the answers and prints the tables.

        Raises:
            DataError: a file cannot be read, or no keyframe has an answer and annotations.
        """
        from spacedrive_jax.evaluation.counterfactual import RULES, count_risks, read_items

        read = read_items(self.predictions, self.annotations, every_question=self.every_question)
        rules: dict[str, Any] = {}
        for rule in RULES:
            counts, unmatched = count_risks(read.items, rule)
            rules[rule] = {name: count.to_json() for name, count in counts.items()}
            print(f"{rule} rule\n{_format_counterfactual(rules[rule])}")
        listed = {
            "unmatched": list(unmatched),
            "unanswered": list(read.unanswered),
            "unannotated": list(read.unannotated),
        }
        for name, tokens in listed.items():
            print(f"{name}: {len(tokens)}")
        return {"samples": len(read.items) - len(unmatched), "rules": rules, **listed}


def _format_counterfactual(scores: Mapping[str, Mapping[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = [f"{'':16}{'accuracy':>10}{'precision':>10}{'recall':>10}   TP  FP  FN  TN"]
    for name, score in scores.items():
        ratios = "".join(f"{number(score[ratio]):>10}" for ratio in ("accuracy", "precision", "recall"))
        counts = (score[f"{truth}_{kind}"] for truth, kind in _COUNTS)
        lines.append(f"{name:16}{ratios} " + "".join(f"{count:>4}" for count in counts))
    return "\n".join(lines)


_COUNTS = (("true", "positive"), ("false", "positive"), ("false", "negative"), ("true", "negative"))
