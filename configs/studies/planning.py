"""What the planner gains: plans 1, 2 and 5 to 8 of the study, open loop, on a small model."""

import dataclasses

from spacedrive_jax.config import change, load_config
from spacedrive_jax.data.depth_sources import DepthDisturbance
from spacedrive_jax.data.images import CameraFault
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig, QwenVLConfig
from spacedrive_jax.study.plan import Claim, Factor, Level, Plan

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
        "model.target_points_in_status": False,
        "model.path_points": 0,
        "model.ego_status": "none",
        "data.image_size": (56, 84),
        "data.command": "none",
        "data.target_points": False,
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


def claim(text: str, better: dict[str, str], worse: dict[str, str], metric: str = "l2") -> Claim:
    """A claim in metres, with the effect that matters: less to the side."""
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
            claim(text, {"encodings": better, **WITHOUT}, {"encodings": worse, **WITHOUT})
            for better, worse, text in (
                ("both", "none", "Without ego status encodings help the planner"),
                ("both", "vision", "Encodings on both sides beat encodings on visual tokens alone"),
                ("both", "text", "Encodings on both sides beat coordinate tokens alone"),
                ("vision", "none", "Encodings on visual tokens beat none"),
            )
        ),
        claim(
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
        claim(f"Regression beats {name}", {"coordinates": "regressed"}, {"coordinates": level})
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
        claim(f"Huber beats {level}", {"loss": "huber"}, {"loss": level}) for level in ("l1", "l2", "cosine")
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
        claim(
            "Exact depth beats none",
            {"trained on": "exact", "tested on": "exact"},
            {"trained on": "none", "tested on": "exact"},
        ),
        *(
            claim(
                f"Depth with {name} costs a planner trained on exact depth"
                if name != "lidar"
                else "A densified sweep costs a planner trained on exact depth",
                {"trained on": "exact", "tested on": "exact"},
                {"trained on": "exact", "tested on": name},
            )
            for name in (*FAULTS, "lidar")
        ),
        claim(
            "Noise in training costs who has exact depth",
            {"trained on": "exact", "tested on": "exact"},
            {"trained on": "noisy", "tested on": "exact"},
        ),
        *(
            claim(
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
        claim(
            "SpaceDrive+ beats SpaceDrive open loop (table 1)", _told("both", "none"), _told("none", "none")
        ),
        *(
            claim(
                f"The released command, which sees the future, beats the leak-free one{where}",
                _told("both", "released"),
                PAST,
                metric,
            )
            for metric, where in (("l2", ""), ("lateral", ", to the side"))
        ),
        *(
            claim(f"Ego status that is {fault} at test costs SpaceDrive+", PAST, _told(*told))
            for fault, told in (
                ("zero", ("both", "navigation", "zero")),
                ("late", ("both", "navigation", "late")),
            )
        ),
        claim(
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
        claim(f"{name.capitalize()} costs the planner", {"cameras": "sound"}, {"cameras": name})
        for name in CAMERAS_AT_TEST
    ),
    missing=("rain, glare and dirt", "trained under bad conditions", "closed loop"),
)

PLANS = (WHERE, COORDINATES, LOSSES, DEPTH, STATUS, CONDITIONS)
