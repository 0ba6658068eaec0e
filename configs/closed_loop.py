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
}
