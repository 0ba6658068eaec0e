"""SpaceDrive and SpaceDrive+ on other vision-language models than Qwen2.5-VL-7B."""

from spacedrive_jax.config import change
from spacedrive_jax.models.families.llava import LlavaConfig, lora
from spacedrive_jax.models.families.qwen3_vl import Qwen3VLConfig

from .paper import SPACEDRIVE, SPACEDRIVE_PLUS

# Views of 336 x 336, every patch a token.
LLAVA = {
    "model.vlm": LlavaConfig.llava_1_5_7b(),
    "model.lora": lora(16),
    "data.image_size": (336, 336),
    "data.sequence_length": 3712,
}

# Views of 640 x 640 are 20 x 20 tokens; asked without the published leaks.
QWEN3 = {
    "data.sequence_length": 2688,
    "data.channel_order": "rgb",
    "data.command": "navigation",
    "data.depth.sources": ("exact", "lidar"),
}

PRESETS = {
    config.name: config
    for config in (
        change(SPACEDRIVE, "base_vlm_llava", LLAVA),
        change(SPACEDRIVE_PLUS, "base_vlm_plus_llava", LLAVA),
        *(
            change(SPACEDRIVE_PLUS, f"qwen3vl_{size}_spacedrive_plus", {"model.vlm": vlm, **QWEN3})
            for size, vlm in (
                ("2b", Qwen3VLConfig.qwen3_vl_2b()),
                ("4b", Qwen3VLConfig.qwen3_vl_4b()),
                ("8b", Qwen3VLConfig.qwen3_vl_8b()),
            )
        ),
    )
}
