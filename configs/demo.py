"""SpaceDrive+ at a size that trains from scratch on a laptop and learns to drive, for `make demo`.

The architecture is Qwen2.5-VL's and the data path is the real one; only the sizes are small. There are no
released weights to adapt, so everything trains, at one rate.
"""

import dataclasses

from spacedrive_jax.config import Config, TrainConfig
from spacedrive_jax.data.transforms import DataConfig
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig, QwenVLConfig
from spacedrive_jax.models.spacedrive_config import ModelConfig

WIDTH = 128
VISION = QwenVisionConfig(
    hidden_size=64,
    intermediate_size=192,
    depth=4,
    num_heads=4,
    full_attention_blocks=(1, 3),
    window_size=56,
    out_hidden_size=WIDTH,
)

PUBLISHED = Config(
    name="demo_published",
    model=ModelConfig(
        vlm=QwenVLConfig(
            decoder=LanguageModelConfig(
                vocab_size=512,
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                num_layers=4,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
                mrope_section=(4, 6, 6),
                tie_word_embeddings=True,
            ),
            vision=VISION,
            image_token_id=5,
            vision_start_token_id=3,
            vision_end_token_id=4,
        ),
        use_lora=False,
    ),
    data=DataConfig(
        records="demo/records",
        image_size=(84, 140),
        command="route",
        target_points=True,
        max_coordinates=8,
        sequence_length=256,
        max_targets=32,
        drop_without_future=True,
        cache_in_memory=True,
        read_threads=2,
    ),
    train=TrainConfig(
        steps=500,
        batch_size=8,
        learning_rate=1e-3,
        vlm_lr_mult=1.0,
        head_lr_mult=1.0,
        warmup_steps=50,
        weight_decay=1e-2,
        clip_norm=10.0,
        checkpoint_every=200,
        validate_every=100,
        validate_keyframes=32,
    ),
)
"""The published model's settings, whatever they are worth at this size: what studies vary and tests take."""

DEMO = Config(
    name="demo",
    # What makes a model that starts from nothing learn from its first steps on, and less of everything else:
    # benchmarks/results/driving_demo.md has the experiments.
    model=dataclasses.replace(
        PUBLISHED.model,
        vlm=dataclasses.replace(
            PUBLISHED.model.vlm,
            decoder=dataclasses.replace(PUBLISHED.model.vlm.decoder, num_layers=2),
            vision=dataclasses.replace(VISION, depth=2, full_attention_blocks=(1,)),
        ),
        compute=dataclasses.replace(PUBLISHED.model.compute, init="fan_in"),
        decoder=dataclasses.replace(PUBLISHED.model.decoder, output_scale=10.0, whole_trajectory=True),
        encoder=dataclasses.replace(PUBLISHED.model.encoder, base=100.0, frequency_scaling=0.3, alpha=1.0),
        ego_units=True,
        target_points_in_status=True,
    ),
    data=dataclasses.replace(PUBLISHED.data, image_size=(84, 84), sequence_length=184),
    train=dataclasses.replace(
        PUBLISHED.train,
        steps=800,
        learning_rate=1.5e-3,
        warmup_steps=20,
        beta2=0.95,
        language_weight=0.05,
        position_loss="l1",
        validate_every=200,
    ),
)
"""What `make demo` trains, on the demo's records and a swaying expert's (docs/how-to/driving.md)."""

PRESETS = {"demo": DEMO, "demo_published": PUBLISHED}
