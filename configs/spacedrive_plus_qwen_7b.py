"""SpaceDrive+ on Qwen2.5-VL-7B to train anew: the published model, asked without its leaks.

Unlike the published run (`table1_spacedrive_plus`), the command comes from the past alone, depth from the
LiDAR sweep, and a step takes 16 samples, one for each of 16 chips. Give the released weights with
`--model.weights DIR --data.tokenizer DIR`.
"""

from spacedrive_jax.config import Config, MeshConfig, TrainConfig
from spacedrive_jax.data.config import DataConfig
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.spacedrive_config import ModelConfig

config = Config(
    name="spacedrive_plus_qwen_7b",
    model=ModelConfig(compute=ComputeConfig(dtype="bfloat16", param_dtype="bfloat16", remat="full")),
    data=DataConfig(channel_order="bgr"),
    train=TrainConfig(batch_size=16),
    mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
)
