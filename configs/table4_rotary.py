"""Table 4: visual tokens rotated by their points instead of encodings added."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table4_rotary",
    {"model.visual_positions": "rotate"},
)
