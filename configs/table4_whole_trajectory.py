"""Table 4: the whole trajectory regressed from a single token."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table4_whole_trajectory",
    {"model.decoder.whole_trajectory": True},
)
