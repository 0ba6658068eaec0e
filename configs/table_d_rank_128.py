"""Table D: adapters of rank 128."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table_d_rank_128",
    {"model.lora.rank": 128},
)
