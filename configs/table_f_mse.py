"""Table F: mean squared error on waypoints."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table_f_mse",
    {"train.position_loss": "l2"},
)
