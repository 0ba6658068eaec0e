"""Table C: metric depth of Depth Anything V2."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table_c_depth_anything",
    {"data.depth.sources": ("depth_anything",)},
)
