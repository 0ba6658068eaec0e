"""The demo's config at the smallest size that still has every part: compiles in seconds."""

import dataclasses

from spacedrive_jax.config import load_config

_demo = load_config("demo_published")
_decoder = dataclasses.replace(
    _demo.model.vlm.decoder,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mrope_section=(2, 3, 3),
)
_vision = dataclasses.replace(
    _demo.model.vlm.vision,
    hidden_size=16,
    intermediate_size=24,
    depth=2,
    num_heads=2,
    full_attention_blocks=(1,),
    out_hidden_size=32,
)
_vlm = dataclasses.replace(_demo.model.vlm, decoder=_decoder, vision=_vision)
config = dataclasses.replace(
    _demo,
    name="tiny",
    model=dataclasses.replace(_demo.model, vlm=_vlm),
    data=dataclasses.replace(
        _demo.data, image_size=(56, 56), sequence_length=160, command="navigation", target_points=False
    ),
    train=dataclasses.replace(
        _demo.train,
        steps=4,
        batch_size=4,
        warmup_steps=2,
        log_every=1,
        checkpoint_every=2,
        validate_every=0,
    ),
)
