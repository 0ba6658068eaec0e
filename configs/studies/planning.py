"""What the planner gains: plans 1, 2, 4, 5, 6 and 8 of the study, open loop, on a small model."""

import dataclasses

from spacedrive_jax.config import change, load_config
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig, QwenVLConfig
from spacedrive_jax.study.plan import Claim, Factor, Level, Plan

DEMO = load_config("demo")
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
        "model.ego_status": "none",
        "data.image_size": (56, 84),
        "data.command": "none",
        "data.route_targets": False,
        "data.sequence_length": 160,
        "train.steps": 400,
        "train.batch_size": 8,
        "train.language_weight": 0.05,
        "train.beta2": 0.95,
        "train.validate_every": 0,
        "train.checkpoint_every": 400,
        "train.log_every": 20,
        "train.trackers": ("jsonl",),
    },
)
"""The demo's model at half its width and depth on smaller images; SpaceDrive without ego status or command,
as in the paper's ablations."""
SEEDS = (1, 2, 3)
MARGIN = 0.1
"""Metres of average L2 that matter: about what separates the rows of the paper's tables 3 and 4."""

DIGITS = {"model.coordinate_tokens": False, "data.max_targets": 192, "data.sequence_length": 288}
PLUS = {"model.ego_status": "feature", "data.command": "navigation"}

WHERE = Plan(
    name="where",
    title="Where the encodings go (table 3)",
    base=SMALL,
    factors=(
        Factor(
            "encodings",
            (
                Level("none", {"model.visual_positions": "none", **DIGITS}),
                Level("vision", DIGITS),
                Level("text", {"model.visual_positions": "none"}),
                Level("both"),
            ),
        ),
        Factor("ego status", (Level("without"), Level("with", PLUS))),
    ),
    seeds=SEEDS,
    minutes=3.0,
    claims=(
        *(
            Claim(
                text,
                "l2",
                {"encodings": better, "ego status": "without"},
                {"encodings": worse, "ego status": "without"},
                MARGIN,
            )
            for better, worse, text in (
                ("both", "vision", "Encodings on both sides beat encodings on visual tokens alone"),
                ("vision", "none", "Encodings on visual tokens beat none"),
                ("both", "none", "Without ego status encodings help the planner"),
            )
        ),
        Claim(
            "With ego status encodings still help the planner",
            "l2",
            {"encodings": "both", "ego status": "with"},
            {"encodings": "none", "ego status": "with"},
            MARGIN,
        ),
    ),
)

COORDINATES = Plan(
    name="coordinates",
    title="Coordinates regressed, written, searched or all at once (table 4)",
    base=SMALL,
    factors=(
        Factor(
            "coordinates",
            (
                Level("regressed"),
                Level("digits", DIGITS),
                Level("grid", {"model.decoder.kind": "grid_cosine", "train.position_loss": "cosine"}),
                Level("one token", {"model.decoder.whole_trajectory": True}),
            ),
        ),
    ),
    seeds=SEEDS,
    minutes=3.0,
    claims=tuple(
        Claim(f"Regression beats {name}", "l2", {"coordinates": "regressed"}, {"coordinates": level}, MARGIN)
        for level, name in (
            ("digits", "digits"),
            ("grid", "search on a grid"),
            ("one token", "one token for the whole trajectory"),
        )
    ),
)

LANGUAGE = {
    "data.conversation.tasks": "questions",
    "data.conversation.scene_texts": True,
    "model.visual_positions": "none",
    "model.coordinate_tokens": False,
    "data.max_targets": 320,
    "data.sequence_length": 640,
    "train.language_weight": 1.0,
    "train.steps": 1000,
    "train.checkpoint_every": 1000,
}
"""A base that learns to see and speak from the records' own truth, without encodings and without planning."""
RANKS = Plan(
    name="ranks",
    title="Rank of the adapters (table D)",
    base=change(SMALL, "study_ranks", {"model.use_lora": True, "train.learning_rate": 3e-3}),
    pretraining={"model.use_lora": False, "train.learning_rate": 1e-3, **LANGUAGE},
    factors=(
        Factor("rank", tuple(Level(str(rank), {"model.lora.rank": rank}) for rank in (1, 4, 16, 64, 128))),
    ),
    seeds=SEEDS,
    minutes=4.0,
    claims=(
        Claim("Rank 16 beats rank 1", "l2", {"rank": "16"}, {"rank": "1"}, MARGIN),
        Claim("Rank 128 beats rank 16", "l2", {"rank": "128"}, {"rank": "16"}, MARGIN),
    ),
    missing=("forgetting: questions asked before and after", "SmolLM2-135M as a third base"),
)

LOSSES = Plan(
    name="losses",
    title="The position loss (table F)",
    base=SMALL,
    factors=(
        Factor(
            "loss",
            (
                Level("huber"),
                Level("l1", {"train.position_loss": "l1"}),
                Level("l2", {"train.position_loss": "l2"}),
                Level("cosine", {"model.decoder.kind": "grid_cosine", "train.position_loss": "cosine"}),
            ),
        ),
    ),
    seeds=SEEDS,
    minutes=3.0,
    claims=tuple(
        Claim(f"Huber beats {level}", "l2", {"loss": "huber"}, {"loss": level}, MARGIN)
        for level in ("l1", "l2", "cosine")
    ),
)

DEPTH = Plan(
    name="depth",
    title="Where depth comes from (the paper's first limitation)",
    base=SMALL,
    factors=(
        Factor(
            "depth",
            (
                Level("exact", {"data.depth.sources": ("exact",)}),
                Level("lidar", {"data.depth.sources": ("lidar",)}),
                Level("none", {"model.visual_positions": "none"}),
            ),
        ),
    ),
    seeds=SEEDS,
    minutes=3.0,
    claims=(
        Claim("Exact depth beats a densified sweep", "l2", {"depth": "exact"}, {"depth": "lidar"}, MARGIN),
        Claim("Exact depth beats none", "l2", {"depth": "exact"}, {"depth": "none"}, MARGIN),
    ),
    missing=(
        "depth that is scaled, shifted, noisy, blurred or full of holes, and one camera off, at test and in "
        "training: no option disturbs depth",
        "closed loop",
    ),
)

STATUS = Plan(
    name="status",
    title="Ego status and commands",
    base=SMALL,
    factors=(
        Factor(
            "ego status",
            (
                Level("none"),
                Level("feature", {"model.ego_status": "feature"}),
                Level("both", {"model.ego_status": "both"}),
            ),
        ),
        Factor(
            "command",
            (
                Level("none"),
                Level("navigation", {"data.command": "navigation"}),
                Level("released", {"data.command": "released"}),
                Level("route", {"data.command": "route"}),
            ),
        ),
    ),
    seeds=SEEDS,
    minutes=3.0,
    claims=(
        Claim(
            "SpaceDrive+ beats SpaceDrive open loop (table 1)",
            "l2",
            {"ego status": "both", "command": "none"},
            {"ego status": "none", "command": "none"},
            MARGIN,
        ),
        Claim(
            "The released command, which sees the future, beats the leak-free one",
            "l2",
            {"ego status": "both", "command": "released"},
            {"ego status": "both", "command": "navigation"},
            MARGIN,
        ),
        Claim(
            "The route beats the command from the past, to the side",
            "lateral",
            {"ego status": "both", "command": "route"},
            {"ego status": "both", "command": "navigation"},
            0.05,
        ),
    ),
    missing=("closed loop: does better L2 drive worse", "ego status zeroed, frozen or late at test"),
)

PLANS = (WHERE, COORDINATES, RANKS, LOSSES, DEPTH, STATUS)
