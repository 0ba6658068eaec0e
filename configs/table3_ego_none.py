"""Table 3, with ego status: no encoding anywhere, coordinates as digits."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("table1_spacedrive_plus"),
    "table3_ego_none",
    {
        "model.ego_status": "feature",
        "model.visual_positions": "none",
        "model.coordinate_tokens": False,
        "data.max_targets": 192,
        "data.sequence_length": 3584,
    },
)
