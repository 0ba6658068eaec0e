"""SpaceDrive on Qwen2.5-VL-7B: every row of the paper's tables.

Give weights with `--model.weights DIR`: of 7B as published, or of 3B or another family, whose sizes they
bring along. docs/reference/presets.md has the figures that the paper prints for each.
"""

from spacedrive_jax.config import Config, MeshConfig, TrainConfig, change
from spacedrive_jax.data.depth_sources import DepthConfig
from spacedrive_jax.data.transforms import DataConfig
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.spacedrive_config import ModelConfig

SPACEDRIVE = Config(
    name="spacedrive_qwen_7b",
    model=ModelConfig(
        ego_status="none",
        compute=ComputeConfig(dtype="bfloat16", param_dtype="bfloat16", remat="full"),
    ),
    data=DataConfig(channel_order="bgr", command="none", depth=DepthConfig(sources=("unidepth",))),
    train=TrainConfig(validate_every=1000),
    mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
)
"""SpaceDrive, no ego status and no command (table 1): the base of the ablations.

The same settings are the rows `both` of table 3, `learned from .1` of table 5, UniDepthV2 of C, rank 16 of D,
20000 of E and Huber of F."""

# As published, the command comes from the ground-truth endpoint: it leaks the answer's direction.
SPACEDRIVE_PLUS = change(
    SPACEDRIVE, "table1_spacedrive_plus", {"model.ego_status": "both", "data.command": "released"}
)
"""SpaceDrive+ as published (table 1, and the last row of table 3 with ego status)."""

# Coordinates as digits are longer answers than coordinate tokens are.
DIGITS = {"model.coordinate_tokens": False, "data.max_targets": 192, "data.sequence_length": 3584}

TABLE_3 = (
    change(SPACEDRIVE, "table3_none", {"model.visual_positions": "none", **DIGITS}),
    change(SPACEDRIVE, "table3_vision", DIGITS),
    change(SPACEDRIVE, "table3_text", {"model.visual_positions": "none"}),
    change(
        SPACEDRIVE_PLUS,
        "table3_ego_none",
        {"model.ego_status": "feature", "model.visual_positions": "none", **DIGITS},
    ),
    change(SPACEDRIVE_PLUS, "table3_ego_both", {"model.ego_status": "feature"}),
)
"""Where encodings stand: nowhere, on visual tokens, in the text, both; without and with ego status."""

TABLE_4 = (
    change(SPACEDRIVE, "table4_mlp_encoder", {"model.encoder.kind": "mlp"}),
    change(SPACEDRIVE, "table4_rotary", {"model.visual_positions": "rotate"}),
    change(
        SPACEDRIVE,
        "table4_grid_inversion",
        {"model.decoder.kind": "grid_cosine", "train.position_loss": "cosine"},
    ),
    change(SPACEDRIVE, "table4_whole_trajectory", {"model.decoder.whole_trajectory": True}),
)
"""Other encoders and decoders: a learned MLP, visual tokens rotated by their points, coordinates searched on
a grid of encodings, the whole trajectory regressed from one token."""


def _alpha(name: str, alpha: float, *, learned: bool) -> Config:
    return change(SPACEDRIVE, name, {"model.encoder.alpha": alpha, "model.encoder.learnable_alpha": learned})


TABLE_5 = (
    _alpha("table5_alpha_fixed_1", 1.0, learned=False),
    _alpha("table5_alpha_fixed_0_1", 0.1, learned=False),
    _alpha("table5_alpha_fixed_0_02", 0.02, learned=False),
    _alpha("table5_alpha_learned_1", 1.0, learned=True),
    _alpha("table5_alpha_learned_0_02", 0.02, learned=True),
)
"""The scale alpha of the encodings, fixed or learned from there."""

TABLES_C_TO_F = (
    change(SPACEDRIVE, "table_c_depth_anything", {"data.depth.sources": ("depth_anything",)}),
    change(SPACEDRIVE, "table_d_rank_64", {"model.lora.rank": 64}),
    change(SPACEDRIVE, "table_d_rank_128", {"model.lora.rank": 128}),
    change(SPACEDRIVE, "table_e_base_1000", {"model.encoder.base": 1000.0}),
    change(SPACEDRIVE, "table_e_base_10000", {"model.encoder.base": 10000.0}),
    change(SPACEDRIVE, "table_f_mae", {"train.position_loss": "l1"}),
    change(SPACEDRIVE, "table_f_mse", {"train.position_loss": "l2"}),
)
"""Depth network, rank of the adapters, base of the frequencies, position loss."""

PRESETS = {
    config.name: config
    for config in (SPACEDRIVE, SPACEDRIVE_PLUS, *TABLE_3, *TABLE_4, *TABLE_5, *TABLES_C_TO_F)
}
