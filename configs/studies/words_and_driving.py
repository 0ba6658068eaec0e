"""What planners say and how they drive: plans 4, 9 and 10 of the study, and 1 on a frozen base."""

import dataclasses

from spacedrive_jax.config import change
from spacedrive_jax.data.depth_sources import DepthDisturbance
from spacedrive_jax.study.plan import Claim, Drives, Factor, Level, Plan, RankClaim

from .planning import (
    FAULTS,
    MINUTES,
    MINUTES_AT_TEST,
    PLUS,
    SEEDS,
    SMALL,
    STATUS_FIELDS,
    WHERE,
    claim,
)

LANGUAGE = {
    "data.conversation.tasks": "questions",
    "data.conversation.scene_texts": True,
    "model.visual_positions": "none",
    "model.coordinate_tokens": False,
    "data.max_targets": 320,
    "data.sequence_length": 640,
    "train.language_weight": 1.0,
    "train.steps": 300,
    "train.checkpoint_every": 300,
}
"""A base that learns to see and speak from the records' own truth, without encodings and without planning."""
RANK_NAMES = ("1", "16", "128")
PRETRAINED = change(SMALL, "study_pretrained", {"model.use_lora": True, "train.learning_rate": 3e-3})
"""Adapters on a frozen base, at the rank of the preset."""
PRETRAINING = {"model.use_lora": False, "train.learning_rate": 1.5e-3, **LANGUAGE}
RANKS = Plan(
    name="ranks",
    title="Rank of the adapters (table D), accuracy and forgetting",
    base=PRETRAINED,
    pretraining=PRETRAINING,
    factors=(
        Factor(
            "rank",
            (
                *(Level(name, {"model.lora.rank": int(name)}) for name in RANK_NAMES),
                Level("all weights", {"model.use_lora": False, "train.learning_rate": 1.5e-3}),
            ),
        ),
    ),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=MINUTES_AT_TEST,
    claims=(
        claim("Rank 16 beats rank 1", {"rank": "16"}, {"rank": "1"}),
        claim("Rank 128 beats rank 16", {"rank": "128"}, {"rank": "16"}),
        claim("All weights beat rank 16", {"rank": "all weights"}, {"rank": "16"}),
        *(
            Claim(text, "forgotten", {"rank": better}, {"rank": worse}, 0.02, "")
            for better, worse, text in (
                ("1", "16", "Rank 16 forgets more words than rank 1"),
                ("16", "128", "Rank 128 forgets more words than rank 16"),
                ("16", "all weights", "All weights forget more words than rank 16"),
            )
        ),
    ),
    missing=("SmolLM2-135M as a third base",),
)
WHERE_PRETRAINED = dataclasses.replace(
    WHERE,
    name="where_pretrained",
    title="Where the encodings go, on a frozen base that knows words and not where things are",
    base=PRETRAINED,
    pretraining=PRETRAINING,
)

ROUTE = {
    **STATUS_FIELDS,
    "model.target_points_in_status": True,
    "data.command": "route",
    "data.target_points": True,
    "data.max_coordinates": 8,
    "data.sequence_length": 192,
}


def _steps(count: int) -> dict[str, int]:
    return {"train.steps": count, "train.checkpoint_every": count}


MODELS = (
    Level("nothing"),
    Level("status", STATUS_FIELDS),
    Level("status, command", PLUS),
    Level("status, route", ROUTE),
    Level("nothing, 100 steps", _steps(100)),
    Level("no depth", {"model.visual_positions": "none"}),
    Level("one token", {"model.decoder.whole_trajectory": True}),
    Level("l2 loss", {"train.position_loss": "l2"}),
    Level("noisy depth", {"data.depth.disturb": DepthDisturbance(noise=0.3, holes=0.1)}),
    Level("huber loss", {"train.position_loss": "huber"}),
    Level("status, route, 100 steps", {**ROUTE, **_steps(100)}),
    Level("status, command, 100 steps", {**PLUS, **_steps(100)}),
    Level("status, command, 500 steps", {**PLUS, **_steps(500)}),
    Level("status, route, 500 steps", {**ROUTE, **_steps(500)}),
)
"""Told nothing and trained for 200 steps where their names say no other."""
AT_TEST: dict[str, dict[str, object]] = {
    "status zero": {"data.ego_fault": "zero"},
    "status late": {"data.ego_fault": "late"},
    "depth 30 % too far": {"data.depth.disturb": FAULTS["30 % too far"]},
    "depth all holes": {"data.depth.disturb": FAULTS["nothing but holes"]},
}
TESTED = {"status, command": ("status zero", "status late"), "nothing": tuple(AT_TEST)[2:]}
TOLD = ("nothing", "status", "status, command", "status, route", "no depth")
POINTS = 5.0
"""Points of the driving score that matter."""


def _driver(model: str, at_test: str = "as trained") -> dict[str, str]:
    return {"model": model, "at test": at_test}


def _compared(text: str, better: dict[str, str], worse: dict[str, str]) -> tuple[Claim, Claim]:
    """The same claim open loop and closed loop."""
    return (
        claim(f"{text}, open loop", better, worse),
        Claim(f"{text}, closed loop", "lost", better, worse, POINTS, "points"),
    )


CLOSED_LOOP = Plan(
    name="closed_loop",
    title="What planners are told and how they drive",
    base=SMALL,
    drives=Drives(),
    factors=(
        Factor(
            "at test",
            (Level("as trained"), *(Level(name, changes) for name, changes in AT_TEST.items())),
            at_test=True,
        ),
        # Behind it, so that every model is driven as it was trained before any is driven otherwise.
        Factor("model", tuple(level for level in MODELS if level.name in TOLD)),
    ),
    skipped=tuple(
        _driver(name, fault) for name in TOLD for fault in AT_TEST if fault not in TESTED.get(name, ())
    ),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=2.0,
    claims=(
        *_compared("SpaceDrive+ beats SpaceDrive", _driver("status, command"), _driver("nothing")),
        *_compared("A command beats none", _driver("status, command"), _driver("status")),
        *_compared("The route beats a command", _driver("status, route"), _driver("status, command")),
        *_compared("Exact depth beats none", _driver("nothing"), _driver("no depth")),
        *(
            each
            for fault, said in (("status zero", "zero"), ("status late", "late"))
            for each in _compared(
                f"Ego status that is {said} at test costs SpaceDrive+",
                _driver("status, command"),
                _driver("status, command", fault),
            )
        ),
        *(
            each
            for fault in ("depth 30 % too far", "depth all holes")
            for each in _compared(
                f"{fault.capitalize()} at test costs SpaceDrive",
                _driver("nothing"),
                _driver("nothing", fault),
            )
        ),
    ),
    missing=("the released command, which nobody knows in the closed loop",),
)
LOOPS = Plan(
    name="loops",
    title="Open-loop figures against the driving score",
    base=SMALL,
    # A town's: models tell more here than drives.
    drives=Drives(first=7),
    factors=(Factor("model", MODELS),),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=1.5,
    claims=tuple(
        RankClaim(f"Who has less {said} drives better", metric, "lost")
        for metric, said in (
            ("l2", "L2 (average of 1 to 3 s)"),
            ("l2 at 1 s", "L2 at 1 s"),
            ("l2 at 3 s", "L2 at 3 s"),
            ("collision", "collision"),
            ("off the road", "intersection with the road's edge"),
            ("along", "error along the way"),
            ("lateral", "error to the side"),
            ("lateral on turns", "error to the side on turns"),
        )
    ),
)

FUTURES = {
    "data.conversation.tasks": "counterfactual",
    "data.max_coordinates": 12,
    "data.max_targets": 64,
    "data.sequence_length": 288,
    "train.language_weight": 1.0,
    **_steps(400),
}
FUTURES_IN_DIGITS = {"model.coordinate_tokens": False, "data.sequence_length": 400}
COUNTERFACTUAL = Plan(
    name="counterfactual",
    title="What would come of another trajectory",
    base=change(SMALL, "study_counterfactual", FUTURES),
    measure="counterfactual",
    factors=(
        Factor(
            "encodings",
            (
                Level("both", {"model.position_input": True}),
                # As published: a question's coordinates are tokens that all look alike.
                Level("both, no position input"),
                Level("none", {"model.visual_positions": "none", **FUTURES_IN_DIGITS}),
            ),
        ),
    ),
    seeds=SEEDS,
    minutes=1.5,
    minutes_at_test=0.5,
    claims=tuple(
        Claim(text, metric, {"encodings": "both"}, {"encodings": worse}, 0.05, "")
        for text, metric, worse in (
            ("Encodings help to tell what is unsafe", "misjudged", "none"),
            ("Encodings help to tell what is unsafe: safety recall", "missed", "none"),
            ("Encodings help to tell what is unsafe: false alarms", "false alarm", "none"),
            ("Position input helps to tell what is unsafe", "misjudged", "both, no position input"),
        )
    ),
    missing=("red lights, which records do not hold", "trained beside planning"),
)

PLANS = (RANKS, WHERE_PRETRAINED, COUNTERFACTUAL, CLOSED_LOOP, LOOPS)
