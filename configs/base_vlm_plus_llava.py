"""SpaceDrive+ on LLaVA-1.5-7B: views of 336 x 336, every patch a token."""

from spacedrive_jax.config import change, load_preset
from spacedrive_jax.models.config import LlavaConfig, LoraConfig

config = change(
    load_preset("table1_spacedrive_plus"),
    "base_vlm_plus_llava",
    {
        "model.vlm": LlavaConfig.llava_1_5_7b(),
        "model.lora": LoraConfig.llava_1_5(),
        "data.image_size": (336, 336),
        "data.sequence_length": 3712,
    },
)
