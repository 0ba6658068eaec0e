"""SpaceDrive on Qwen2.5-VL-7B, no ego status and no command (paper, table 1): the base of the ablations.

Give the released weights with `--model.weights DIR --data.tokenizer DIR`. The same settings are the paper's
rows `both` of table 3, `learned from .1` of table 5, UniDepthV2 of C, rank 16 of D, 20000 of E, Huber of F.
"""

from spacedrive_jax.config import Config, MeshConfig, TrainConfig
from spacedrive_jax.data.config import DataConfig
from spacedrive_jax.data.depth_sources import DepthConfig
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.spacedrive_config import ModelConfig

config = Config(
    name="spacedrive_qwen_7b",
    model=ModelConfig(
        ego_status="none",
        compute=ComputeConfig(dtype="bfloat16", param_dtype="bfloat16", remat="full"),
    ),
    data=DataConfig(channel_order="bgr", command="none", depth=DepthConfig(sources=("unidepth",))),
    train=TrainConfig(),
    mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
)
