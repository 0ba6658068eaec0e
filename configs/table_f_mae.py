"""Table F: mean absolute error on waypoints."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table_f_mae",
    {"train.position_loss": "l1"},
)
