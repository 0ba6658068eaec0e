"""`python -m spacedrive_jax score-bench2drive` and `score-counterfactual`: what result files score."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.io import inside

if TYPE_CHECKING:
    from spacedrive_jax.evaluation.bench2drive_results import RouteResult


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
        from spacedrive_jax.evaluation.bench2drive_abilities import ability_rates, read_junctions
        from spacedrive_jax.evaluation.bench2drive_results import read_results, read_route_set, score_routes

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
    from spacedrive_jax.evaluation.bench2drive_abilities import comfort, read_motion

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
