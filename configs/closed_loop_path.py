"""SpaceDrive+ for closed-loop driving: behind the six waypoints the answer gives 20 path points 1 m apart."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("table1_spacedrive_plus"),
    "closed_loop_path",
    {
        "model.path_points": 20,
        "data.command": "navigation",
        "data.max_coordinates": 26,
        "data.max_targets": 160,
        "data.sequence_length": 3584,
    },
)
