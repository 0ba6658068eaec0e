"""SpaceDrive and SpaceDrive+ on other vision-language models than Qwen2.5-VL-7B."""

import dataclasses

from spacedrive_jax.config import Config, change
from spacedrive_jax.models.config import VLConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.families.internvl import InternVLConfig
from spacedrive_jax.models.families.llava import LlavaConfig, lora
from spacedrive_jax.models.families.qwen3_vl import Qwen3VLConfig
from spacedrive_jax.models.families.smolvlm import SmolVLMConfig

from .paper import SPACEDRIVE, SPACEDRIVE_PLUS

# Views of 336 x 336, every patch a token.
LLAVA = {
    "model.vlm": LlavaConfig.llava_1_5_7b(),
    "model.lora": lora(16),
    "data.image_size": (336, 336),
    "data.sequence_length": 3712,
}

# Asked without the published leaks; channels as the towers learnt them.
WITHOUT_LEAKS = {
    "data.channel_order": "rgb",
    "data.command": "navigation",
    "data.depth.sources": ("exact", "lidar"),
}

# Views of 640 x 640 are 20 x 20 tokens.
QWEN3 = {**WITHOUT_LEAKS, "data.sequence_length": 2688}


def on_square_views(name: str, vlm: VLConfig, view: int, sequence_length: int) -> Config:
    """SpaceDrive+ on a base whose tower takes one square size, asked without the published leaks.

    Args:
        name: of the preset.
        vlm: the base.
        view: side of the tower's images in pixels.
        sequence_length: tokens, with room for the longest conversation.
    """
    changes = {
        "model.vlm": vlm,
        "model.lora": family_of(vlm).lora(16),
        "data.image_size": (view, view),
        "data.sequence_length": sequence_length,
        **WITHOUT_LEAKS,
    }
    return change(SPACEDRIVE_PLUS, name, changes)


def with_room(vlm: VLConfig) -> VLConfig:
    """A base whose tables have the two rows of the coordinate tokens behind the released ones.

    The released vocabularies of SmolVLM and InternVL3 fill their tables; `import-weights` adds the rows.
    """
    decoder = dataclasses.replace(vlm.decoder, vocab_size=vlm.decoder.vocab_size + 2)
    return dataclasses.replace(vlm, decoder=decoder)


SQUARE = (
    ("smolvlm_256m_spacedrive_plus", SmolVLMConfig.smolvlm_256m(), 512, 768),
    ("smolvlm_500m_spacedrive_plus", SmolVLMConfig.smolvlm_500m(), 512, 768),
    ("smolvlm_2b_spacedrive_plus", SmolVLMConfig.smolvlm_2b(), 384, 896),
    ("internvl3_1b_spacedrive_plus", InternVLConfig.internvl3_1b(), 448, 1920),
    ("internvl3_2b_spacedrive_plus", InternVLConfig.internvl3_2b(), 448, 1920),
    ("internvl3_8b_spacedrive_plus", InternVLConfig.internvl3_8b(), 448, 1920),
)

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
        *(on_square_views(name, with_room(vlm), view, length) for name, vlm, view, length in SQUARE),
    )
}
