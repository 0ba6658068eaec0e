"""SpaceDrive and SpaceDrive+ on other vision-language models than Qwen2.5-VL-7B."""

from spacedrive_jax.config import change
from spacedrive_jax.models.families.llava import LlavaConfig, lora

from .paper import SPACEDRIVE, SPACEDRIVE_PLUS

# Views of 336 x 336, every patch a token.
LLAVA = {
    "model.vlm": LlavaConfig.llava_1_5_7b(),
    "model.lora": lora(16),
    "data.image_size": (336, 336),
    "data.sequence_length": 3712,
}

PRESETS = {
    config.name: config
    for config in (
        change(SPACEDRIVE, "base_vlm_llava", LLAVA),
        change(SPACEDRIVE_PLUS, "base_vlm_plus_llava", LLAVA),
    )
}
