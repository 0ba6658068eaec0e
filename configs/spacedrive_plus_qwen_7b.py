"""SpaceDrive+ on Qwen2.5-VL-7B as published: six views of 640 x 640, adapters of rank 16, global batch 16.

Give the released weights with `--model.weights DIR --data.tokenizer DIR`.
"""

from spacedrive_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from spacedrive_jax.vlm.config import ComputeConfig

config = Config(
    name="spacedrive_plus_qwen_7b",
    model=ModelConfig(compute=ComputeConfig(dtype="bfloat16", param_dtype="bfloat16", remat="full")),
    data=DataConfig(channel_order="bgr"),
    train=TrainConfig(batch_size=16),
    mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
)
