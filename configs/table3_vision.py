"""Table 3, no ego status: encodings on visual tokens only, coordinates as digits."""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table3_vision",
    {"model.coordinate_tokens": False, "data.max_targets": 192, "data.sequence_length": 3584},
)
