"""Table 3, no ego status: coordinate tokens only, no encoding on visual tokens."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table3_text",
    {"model.visual_positions": "none"},
)
