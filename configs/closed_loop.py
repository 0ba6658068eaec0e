"""SpaceDrive+ for closed-loop driving: behind the waypoints the answer gives path points 1 m apart."""

from spacedrive_jax.config import change

from .paper import SPACEDRIVE_PLUS

PRESETS = {
    "closed_loop_path": change(
        SPACEDRIVE_PLUS,
        "closed_loop_path",
        {
            "model.path_points": 20,
            "data.command": "navigation",
            "data.max_coordinates": 26,
            "data.max_targets": 160,
            "data.sequence_length": 3584,
        },
    ),
    # Bench2Drive with the paper's settings (12 epochs, batch 8, supplement A.2). The base set has 950
    # training clips of some 235 frames, so 45,000 keyframes: 5,600 steps an epoch. The route's command and
    # next nodes are told, for without them nobody can know where to turn; the paper does not say how.
    "bench2drive_spacedrive_plus": change(
        SPACEDRIVE_PLUS,
        "bench2drive_spacedrive_plus",
        {
            "model.path_points": 20,
            "data.records": "data/bench2drive",
            "data.command": "route",
            "data.target_points": True,
            "data.max_coordinates": 28,
            "data.max_targets": 160,
            "data.sequence_length": 3584,
            "data.drop_without_future": True,
            "train.steps": 12 * 5600,
        },
    ),
}
