"""Table E: sin-cos frequencies with base 10000."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table_e_base_10000",
    {"model.encoder.base": 10000.0},
)
