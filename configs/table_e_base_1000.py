"""Table E: sin-cos frequencies with base 1000."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table_e_base_1000",
    {"model.encoder.base": 1000.0},
)
