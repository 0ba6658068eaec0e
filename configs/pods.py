"""SpaceDrive+ on Qwen2.5-VL-7B to train anew on pods: the published model, asked without its leaks."""

from spacedrive_jax.config import change

from .paper import SPACEDRIVE_PLUS

# Command from the past alone, depth from the LiDAR sweep (exact where drawn), a sample for each of 16 chips.
PRESETS = {
    "spacedrive_plus_qwen_7b": change(
        SPACEDRIVE_PLUS,
        "spacedrive_plus_qwen_7b",
        {
            "data.command": "navigation",
            "data.depth.sources": ("exact", "lidar"),
            "train.batch_size": 16,
        },
    ),
}
