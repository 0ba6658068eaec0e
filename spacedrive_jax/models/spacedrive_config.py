"""What a SpaceDrive is made of: vision-language model, coordinate encoder and decoder, options.

Apart from the model, so that an exported program is served without it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from spacedrive_jax.bounds import Bound, Bounds, check_bounds
from spacedrive_jax.constants import NUM_PATH_POINTS
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import ComputeConfig, LoraConfig, VLConfig
from spacedrive_jax.models.coordinate_decoder import CoordinateDecoderConfig
from spacedrive_jax.models.coordinate_encoder import CoordinateEncoderConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVLConfig

EgoStatusInput = Literal["none", "feature", "positions", "both", "language"]
"""SpaceDrive (`none`), or SpaceDrive+: feature token, past-position tokens, both (`feature+PE`), or a
sentence of the question instead of tokens."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """SpaceDrive: a vision-language model, the universal coordinate encoder and the coordinate decoder."""

    vlm: VLConfig = dataclasses.field(default_factory=QwenVLConfig.qwen2_5_vl_7b)
    weights: str | None = None
    """What to start from: a transformers checkpoint, a folder of `import-weights`, or a run of this project
    (its newest checkpoint, or RUN/checkpoints/STEP). It settles `vlm`, the tokenizer and the image size. None
    draws random weights."""
    random_base: bool = False
    """Adapters on a frozen base of random numbers are meant: without this, `use_lora` needs `weights`."""
    lora: LoraConfig = LoraConfig()
    use_lora: bool = True
    """Adapters on a frozen base; without them the base itself is trained."""
    new_token_rows: bool = True
    """Train embedding and head rows of their own for the two new tokens; without them (and with adapters)
    the tokens keep their frozen rows."""
    encoder: CoordinateEncoderConfig = CoordinateEncoderConfig()
    decoder: CoordinateDecoderConfig = CoordinateDecoderConfig()
    """The coordinate decoder; the language model is `vlm.decoder`."""
    visual_positions: Literal["add", "rotate", "none"] = "add"
    """How visual tokens learn where they are: the scaled encoding is added (the paper's), they are rotated
    by their points (table 4), or not at all (table 3)."""
    coordinate_tokens: bool = True
    """Coordinates are tokens of their own, read by the coordinate decoder. Without them the indicator is a
    token like any other when an answer is generated."""
    ego_status: EgoStatusInput = "both"
    """`none` is SpaceDrive, `both` is SpaceDrive+; `language` says it in the question, without tokens."""
    ego_units: bool = False
    """Divide each number of the ego status by what is usual of it before its MLP (speed by 8 m/s, yaw rate by
    0.2 rad/s), and leave the orientation out: by it a small model knows the places it was trained in. The
    published model reads all of them raw; from scratch it then learns from the large ones first."""
    target_points_in_status: bool = False
    """The ego feature's MLP reads the target points too, beside their tokens (`data.target_points`): a
    model that trains from scratch learns from them hundreds of steps earlier."""
    strips_in_status: int = 0
    """The ego feature's MLP reads how close the nearest visual token is in so many strips along the route
    (`models.coordinate_encoder.closeness_along_route`): a small model sees who is in its way as soon as it
    knows its own speed. With `data.depth.heights` that is who stands on the road, without it the road. Needs
    `target_points_in_status`; 0 for none."""
    path_points: int = 0
    """Points of the path, 1 m apart, that the answer gives behind the waypoints: 20 for closed-loop driving
    (waypoints give the speed, the path the direction), 0 for none."""
    position_input: bool = False
    """Feed the encoding of a coordinate at its position token (the published default does not)."""
    position_input_training: Literal["encodings", "zeros"] = "encodings"
    """What position input feeds in training. The published code feeds zeros there, by mistake, and
    encodings at test time (fidelity Q13)."""
    semantic_position: bool = False
    """Add the position token's own embedding to what position input feeds, and take it from the hidden
    state before a coordinate is decoded in training (published, fidelity Q20; the test decode does not)."""
    compute: ComputeConfig = ComputeConfig()

    BOUNDS: ClassVar[Bounds] = {"path_points": Bound(0, NUM_PATH_POINTS), "strips_in_status": Bound(0, 64)}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model")
        if self.compute.base_quantization != "none" and not self.use_lora:
            raise ConfigError(
                f"model.compute.base_quantization {self.compute.base_quantization} needs a frozen base: set "
                "model.use_lora True, or base_quantization none"
            )
        about_feature = self.ego_units or self.target_points_in_status or self.strips_in_status
        if about_feature and self.ego_status not in ("feature", "both"):
            raise ConfigError(
                "model.ego_units, model.target_points_in_status and model.strips_in_status are about the ego "
                f"feature: set model.ego_status feature or both, not {self.ego_status}"
            )
        if self.strips_in_status and self.visual_positions == "none":
            raise ConfigError(
                f"model.strips_in_status {self.strips_in_status} reads where visual tokens are, and "
                "model.visual_positions none reads no depth: set it add or rotate"
            )
        if self.strips_in_status and not self.target_points_in_status:
            raise ConfigError(
                f"model.strips_in_status {self.strips_in_status} lie along the route: set "
                "model.target_points_in_status True, or strips_in_status 0"
            )
        if self.path_points and (self.decoder.whole_trajectory or not self.coordinate_tokens):
            raise ConfigError(
                f"model.path_points {self.path_points} needs a token per point: "
                "model.decoder.whole_trajectory False and model.coordinate_tokens True"
            )
