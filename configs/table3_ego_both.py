"""Table 3, with ego status: encodings in vision and text, no past positions."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("table1_spacedrive_plus"),
    "table3_ego_both",
    {"model.ego_status": "feature"},
)
