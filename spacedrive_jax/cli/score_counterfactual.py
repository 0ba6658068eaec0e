"""`python -m spacedrive_jax score-counterfactual`: risks named in answers against the true ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from spacedrive_jax.console import Command


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
            print(f"{rule} rule\n{_format(rules[rule])}")
        listed = {
            "unmatched": list(unmatched),
            "unanswered": list(read.unanswered),
            "unannotated": list(read.unannotated),
        }
        for name, tokens in listed.items():
            print(f"{name}: {len(tokens)}")
        return {"samples": len(read.items) - len(unmatched), "rules": rules, **listed}


def _format(scores: Mapping[str, Mapping[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = [f"{'':16}{'accuracy':>10}{'precision':>10}{'recall':>10}   TP  FP  FN  TN"]
    for name, score in scores.items():
        ratios = "".join(f"{number(score[ratio]):>10}" for ratio in ("accuracy", "precision", "recall"))
        counts = (score[f"{truth}_{kind}"] for truth, kind in _COUNTS)
        lines.append(f"{name:16}{ratios} " + "".join(f"{count:>4}" for count in counts))
    return "\n".join(lines)


_COUNTS = (("true", "positive"), ("false", "positive"), ("false", "negative"), ("true", "negative"))
