"""Table 5: scale alpha fixed at 0.1."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table5_alpha_fixed_0_1",
    {"model.encoder.alpha": 0.1, "model.encoder.learnable_alpha": False},
)
