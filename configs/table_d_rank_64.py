"""Table D: adapters of rank 64."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table_d_rank_64",
    {"model.lora.rank": 64},
)
