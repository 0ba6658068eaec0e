"""What the planner gains: plans 1, 2, 4 to 8 and 10 of the study, on a small model."""

import dataclasses

from spacedrive_jax.config import change, load_config
from spacedrive_jax.data.depth_sources import DepthDisturbance
from spacedrive_jax.data.images import CameraFault
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig, QwenVLConfig
from spacedrive_jax.study.plan import Claim, Drives, Factor, Level, Plan, RankClaim

DEMO = load_config("demo_published")
SMALL = change(
    DEMO,
    "study_small",
    {
        "model.vlm": QwenVLConfig(
            decoder=dataclasses.replace(
                DEMO.model.vlm.decoder,
                hidden_size=64,
                intermediate_size=192,
                num_layers=2,
                num_heads=2,
                num_kv_heads=1,
            ),
            vision=QwenVisionConfig(
                hidden_size=32,
                intermediate_size=96,
                depth=2,
                num_heads=2,
                full_attention_blocks=(1,),
                window_size=56,
                out_hidden_size=64,
            ),
            image_token_id=5,
            vision_start_token_id=3,
            vision_end_token_id=4,
        ),
        "model.compute.init": "fan_in",
        "model.decoder.output_scale": 10.0,
        "model.encoder.base": 100.0,
        "model.encoder.frequency_scaling": 0.3,
        "model.encoder.alpha": 1.0,
        "model.ego_units": False,
        "model.route_in_status": False,
        "model.path_points": 0,
        "model.ego_status": "none",
        "data.image_size": (56, 84),
        "data.command": "none",
        "data.route_targets": False,
        "data.max_coordinates": 6,
        "data.max_targets": 32,
        "data.sequence_length": 144,
        "data.drop_without_future": True,
        "data.cache_in_memory": True,
        "train.steps": 200,
        "train.batch_size": 8,
        "train.learning_rate": 1.5e-3,
        "train.vlm_lr_mult": 1.0,
        "train.head_lr_mult": 1.0,
        "train.warmup_steps": 20,
        "train.weight_decay": 1e-2,
        "train.clip_norm": 10.0,
        "train.beta2": 0.95,
        "train.position_loss": "l1",
        "train.language_weight": 0.05,
        "train.validate_every": 0,
        "train.checkpoint_every": 200,
        "train.log_every": 20,
        "train.trackers": ("jsonl",),
    },
)
"""SpaceDrive without ego status or command, as in the paper's ablations, at the smallest size that learns:
what `demo_drive` has for that (benchmarks/results/driving_demo.md), at half its width."""
SEEDS = (1, 2, 3)
MARGIN = 0.1
"""Metres of average L2 that matter: about what separates the rows of the paper's tables 3 and 4."""


MINUTES, MINUTES_AT_TEST = 0.8, 0.1


def _claim(text: str, better: dict[str, str], worse: dict[str, str], metric: str = "l2") -> Claim:
    return Claim(text, metric, better, worse, MARGIN if metric == "l2" else MARGIN / 2)


DIGITS = {"model.coordinate_tokens": False, "data.max_targets": 96, "data.sequence_length": 208}
STATUS_FIELDS = {"model.ego_status": "both", "model.ego_units": True}
PLUS = {**STATUS_FIELDS, "data.command": "navigation"}
WITHOUT, WITH = {"ego status": "without"}, {"ego status": "with"}

WHERE = Plan(
    name="where",
    title="Where the encodings go (table 3)",
    base=SMALL,
    factors=(
        Factor(
            "encodings",
            (
                Level("both"),
                Level("text", {"model.visual_positions": "none"}),
                Level("vision", DIGITS),
                Level("none", {"model.visual_positions": "none", **DIGITS}),
            ),
        ),
        Factor("ego status", (Level("without"), Level("with", PLUS))),
    ),
    # Left out for the time they take.
    skipped=tuple({"encodings": level, "ego status": "with"} for level in ("vision", "text")),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=MINUTES_AT_TEST,
    claims=(
        *(
            _claim(text, {"encodings": better, **WITHOUT}, {"encodings": worse, **WITHOUT})
            for better, worse, text in (
                ("both", "none", "Without ego status encodings help the planner"),
                ("both", "vision", "Encodings on both sides beat encodings on visual tokens alone"),
                ("both", "text", "Encodings on both sides beat coordinate tokens alone"),
                ("vision", "none", "Encodings on visual tokens beat none"),
            )
        ),
        _claim(
            "With ego status encodings still help the planner",
            {"encodings": "both", **WITH},
            {"encodings": "none", **WITH},
        ),
    ),
)

GRID = {
    "model.decoder.output_scale": 1.0,
    "model.decoder.kind": "grid_cosine",
    "train.position_loss": "cosine",
}
COORDINATES = Plan(
    name="coordinates",
    title="Coordinates regressed, written, searched or all at once (table 4)",
    base=SMALL,
    factors=(
        Factor(
            "coordinates",
            (
                Level("regressed"),
                Level("one token", {"model.decoder.whole_trajectory": True}),
                Level("grid", GRID),
                Level("digits", DIGITS),
            ),
        ),
    ),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=MINUTES_AT_TEST,
    claims=tuple(
        _claim(f"Regression beats {name}", {"coordinates": "regressed"}, {"coordinates": level})
        for level, name in (
            ("digits", "digits"),
            ("grid", "search on a grid"),
            ("one token", "one token for the whole trajectory"),
        )
    ),
)

LOSSES = Plan(
    name="losses",
    title="The position loss (table F)",
    base=SMALL,
    factors=(
        Factor(
            "loss",
            (
                Level("huber", {"train.position_loss": "huber"}),
                Level("l1"),
                Level("l2", {"train.position_loss": "l2"}),
                Level("cosine", GRID),
            ),
        ),
    ),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=MINUTES_AT_TEST,
    claims=tuple(
        _claim(f"Huber beats {level}", {"loss": "huber"}, {"loss": level}) for level in ("l1", "l2", "cosine")
    ),
)

SOUND = {"data.depth.disturb": DepthDisturbance()}
FAULTS = {
    "30 % too far": DepthDisturbance(scale=1.3),
    "3 m too far": DepthDisturbance(shift=3.0),
    "noise of 30 %": DepthDisturbance(noise=0.3),
    "blur of a token": DepthDisturbance(blur=1.0),
    "30 % holes": DepthDisturbance(holes=0.3),
    "front camera off": DepthDisturbance(holes=1.0, cameras=("CAM_FRONT",)),
    "nothing but holes": DepthDisturbance(holes=1.0),
}
HELPED = ("noise of 30 %", "30 % holes", "30 % too far")
DEPTH = Plan(
    name="depth",
    title="Depth that is wrong (the paper's first limitation)",
    base=SMALL,
    factors=(
        Factor(
            "trained on",
            (
                Level("exact"),
                Level("noisy", {"data.depth.disturb": DepthDisturbance(noise=0.3, holes=0.1)}),
                Level("none", {"model.visual_positions": "none"}),
            ),
        ),
        Factor(
            "tested on",
            (
                Level("exact", SOUND),
                *(Level(name, {"data.depth.disturb": fault}) for name, fault in FAULTS.items()),
                Level("lidar", {"data.depth.sources": ("lidar",), **SOUND}),
            ),
            at_test=True,
        ),
    ),
    skipped=(
        *({"trained on": "none", "tested on": name} for name in (*FAULTS, "lidar")),
        *({"trained on": "noisy", "tested on": name} for name in (*FAULTS, "lidar") if name not in HELPED),
    ),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=MINUTES_AT_TEST,
    claims=(
        _claim(
            "Exact depth beats none",
            {"trained on": "exact", "tested on": "exact"},
            {"trained on": "none", "tested on": "exact"},
        ),
        *(
            _claim(
                f"Depth with {name} costs a planner trained on exact depth"
                if name != "lidar"
                else "A densified sweep costs a planner trained on exact depth",
                {"trained on": "exact", "tested on": "exact"},
                {"trained on": "exact", "tested on": name},
            )
            for name in (*FAULTS, "lidar")
        ),
        _claim(
            "Noise in training costs who has exact depth",
            {"trained on": "exact", "tested on": "exact"},
            {"trained on": "noisy", "tested on": "exact"},
        ),
        *(
            _claim(
                f"Noise in training helps against {name}",
                {"trained on": "noisy", "tested on": name},
                {"trained on": "exact", "tested on": name},
            )
            for name in HELPED
        ),
    ),
    missing=("what a fusion with LiDAR wins back: it needs a depth network to fuse", "closed loop"),
)


def _told(ego_status: str, command: str, at_test: str = "as trained") -> dict[str, str]:
    return {"ego status": ego_status, "command": command, "at test": at_test}


PAST = _told("both", "navigation")
STATUS = Plan(
    name="status",
    title="Ego status and commands",
    base=SMALL,
    factors=(
        Factor("ego status", (Level("none"), Level("both", STATUS_FIELDS))),
        Factor(
            "command",
            (
                Level("none"),
                Level("navigation", {"data.command": "navigation"}),
                Level("released", {"data.command": "released"}),
            ),
        ),
        Factor(
            "at test",
            (
                Level("as trained"),
                Level("zero", {"data.ego_fault": "zero"}),
                Level("late", {"data.ego_fault": "late"}),
            ),
            at_test=True,
        ),
    ),
    skipped=(
        *(
            {"command": command, "at test": fault}
            for command in ("none", "released")
            for fault in ("zero", "late")
        ),
        {"ego status": "none", "command": "navigation"},
        {"ego status": "none", "command": "released"},
    ),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=MINUTES_AT_TEST,
    claims=(
        _claim(
            "SpaceDrive+ beats SpaceDrive open loop (table 1)", _told("both", "none"), _told("none", "none")
        ),
        *(
            _claim(
                f"The released command, which sees the future, beats the leak-free one{where}",
                _told("both", "released"),
                PAST,
                metric,
            )
            for metric, where in (("l2", ""), ("lateral", ", to the side"))
        ),
        *(
            _claim(f"Ego status that is {fault} at test costs SpaceDrive+", PAST, _told(*told))
            for fault, told in (
                ("zero", ("both", "navigation", "zero")),
                ("late", ("both", "navigation", "late")),
            )
        ),
        _claim(
            "SpaceDrive+ that lost its ego status is worse than SpaceDrive",
            _told("none", "none"),
            _told("both", "navigation", "zero"),
        ),
    ),
    missing=("closed loop: does better L2 drive worse", "ego status that stands still from some moment on"),
)

CAMERAS_AT_TEST = {
    "half the light": CameraFault(dark=0.5),
    "a tenth of the light": CameraFault(dark=0.9),
    "half fog": CameraFault(fog=0.5),
    "front camera dead": CameraFault(dead=("CAM_FRONT",)),
    "calibration off by 1 degree and 10 cm": CameraFault(yaw=1.0, forward=0.1),
    "calibration off by 10 degrees and 1 m": CameraFault(yaw=10.0, forward=1.0),
}
CONDITIONS = Plan(
    name="conditions",
    title="Bad conditions for the cameras (the paper's second limitation)",
    base=SMALL,
    factors=(
        Factor(
            "cameras",
            (
                Level("sound"),
                *(Level(name, {"data.cameras": fault}) for name, fault in CAMERAS_AT_TEST.items()),
            ),
            at_test=True,
        ),
    ),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=MINUTES_AT_TEST,
    claims=tuple(
        _claim(f"{name.capitalize()} costs the planner", {"cameras": "sound"}, {"cameras": name})
        for name in CAMERAS_AT_TEST
    ),
    missing=("rain, glare and dirt", "trained under bad conditions", "closed loop"),
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
        _claim("Rank 16 beats rank 1", {"rank": "16"}, {"rank": "1"}),
        _claim("Rank 128 beats rank 16", {"rank": "128"}, {"rank": "16"}),
        _claim("All weights beat rank 16", {"rank": "all weights"}, {"rank": "16"}),
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
    "model.route_in_status": True,
    "data.command": "route",
    "data.route_targets": True,
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
    Level("nothing, 50 steps", _steps(50)),
    Level("status, command, 50 steps", {**PLUS, **_steps(50)}),
    Level("status, route, 50 steps", {**ROUTE, **_steps(50)}),
    Level("status, command, 500 steps", {**PLUS, **_steps(500)}),
    Level("status, route, 500 steps", {**ROUTE, **_steps(500)}),
    Level("no depth", {"model.visual_positions": "none"}),
    Level("noisy depth", {"data.depth.disturb": DepthDisturbance(noise=0.3, holes=0.1)}),
    Level("one token", {"model.decoder.whole_trajectory": True}),
    Level("l2 loss", {"train.position_loss": "l2"}),
)
"""Told nothing and trained for 200 steps where their names say no other."""
AS_TRAINED = {"at test": "as trained"}
AT_TEST: dict[str, dict[str, object]] = {
    "status zero": {"data.ego_fault": "zero"},
    "status late": {"data.ego_fault": "late"},
    "depth 30 % too far": {"data.depth.disturb": FAULTS["30 % too far"]},
    "depth all holes": {"data.depth.disturb": FAULTS["nothing but holes"]},
}
TESTED = {
    "status, command": tuple(AT_TEST),
    "nothing": ("depth 30 % too far", "depth all holes"),
}
POINTS = 5.0
"""Points of the driving score that matter."""


def _driver(model: str, at_test: str = "as trained") -> dict[str, str]:
    return {"model": model, "at test": at_test}


def _compared(text: str, better: dict[str, str], worse: dict[str, str]) -> tuple[Claim, Claim]:
    """The same claim open loop and closed loop."""
    return (
        _claim(f"{text}, open loop", better, worse),
        Claim(f"{text}, closed loop", "lost", better, worse, POINTS, "points"),
    )


LOOPS = Plan(
    name="loops",
    title="Open loop against closed loop",
    base=SMALL,
    drives=Drives(),
    factors=(
        Factor(
            "at test",
            (Level("as trained"), *(Level(name, changes) for name, changes in AT_TEST.items())),
            at_test=True,
        ),
        # Behind it, so that every model is driven as it was trained before any is driven otherwise.
        Factor("model", MODELS),
    ),
    skipped=tuple(
        _driver(level.name, name)
        for level in MODELS
        for name in AT_TEST
        if name not in TESTED.get(level.name, ())
    ),
    seeds=SEEDS,
    minutes=MINUTES,
    minutes_at_test=2.0,
    claims=(
        *(
            RankClaim(f"Who has less {said} drives better", metric, "lost", AS_TRAINED)
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
        *_compared("SpaceDrive+ beats SpaceDrive", _driver("status, command"), _driver("nothing")),
        *_compared("The route beats a command", _driver("status, route"), _driver("status, command")),
        *_compared(
            "500 steps beat 50, told the route",
            _driver("status, route, 500 steps"),
            _driver("status, route, 50 steps"),
        ),
        *(
            claim
            for name, said in (("status zero", "zero"), ("status late", "late"))
            for claim in _compared(
                f"Ego status that is {said} at test costs SpaceDrive+",
                _driver("status, command"),
                _driver("status, command", name),
            )
        ),
        *_compared("Exact depth beats none", _driver("nothing"), _driver("no depth")),
        *(
            claim
            for model, who in (("nothing", "SpaceDrive"), ("status, command", "SpaceDrive+"))
            for name in ("depth 30 % too far", "depth all holes")
            for claim in _compared(
                f"{name.capitalize()} at test costs {who}", _driver(model), _driver(model, name)
            )
        ),
        *_compared("Noise in training costs who has exact depth", _driver("nothing"), _driver("noisy depth")),
    ),
    missing=("the released command, which nobody knows in the closed loop",),
)

PLANS = (WHERE, COORDINATES, RANKS, WHERE_PRETRAINED, LOSSES, DEPTH, STATUS, CONDITIONS, LOOPS)
