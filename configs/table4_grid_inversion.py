"""Table 4: coordinates searched on a grid of encodings instead of regressed."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table4_grid_inversion",
    {"model.decoder.kind": "grid_cosine", "train.position_loss": "cosine"},
)
