"""Table 4: a learned MLP instead of the sin-cos encoding."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table4_mlp_encoder",
    {"model.encoder.kind": "mlp"},
)
