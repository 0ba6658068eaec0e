"""Studies of seconds: one run of the tiny model, and points read back by two decoders."""

from pathlib import Path

from spacedrive_jax.config import change, load_config
from spacedrive_jax.study.plan import Claim, Factor, Level, Plan
from spacedrive_jax.study.readout import Readout

TINY = load_config(str(Path(__file__).resolve().parents[1] / "tiny_config.py"))
PLANS = (
    Plan(
        name="drives",
        title="One loss",
        base=change(TINY, "tiny", {"train.steps": 2, "train.trackers": ("jsonl",)}),
        factors=(
            Factor("loss", (Level("l1", {"train.position_loss": "l1"}),)),
            Factor(
                "depth",
                (Level("as it was"), Level("half", {"data.depth.disturb.scale": 0.5})),
                at_test=True,
            ),
        ),
        seeds=(1,),
        claims=(),
    ),
    Plan(
        name="reads",
        title="Two encoders",
        base=change(TINY, "reads", {"model.decoder.kind": "linear"}),
        factors=(
            Factor(
                "encoder",
                (Level("sincos"), Level("nerf", {"model.encoder.kind": "nerf", "model.encoder.base": 10.0})),
            ),
        ),
        seeds=(1,),
        measure="readout",
        readout=Readout(steps=20, batch_size=32, learning_rate=3e-2, test_points=200),
        claims=(Claim("Sin-cos beats NeRF", "error", {"encoder": "sincos"}, {"encoder": "nerf"}, 0.1),),
        missing=("a longer training",),
    ),
)
