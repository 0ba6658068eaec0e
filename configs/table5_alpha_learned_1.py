"""Table 5: scale alpha learned from 1."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table5_alpha_learned_1",
    {"model.encoder.alpha": 1.0},
)
