"""The open-loop protocols: what each published nuScenes planning score measures, as data.

All protocols score six waypoints at 2 Hz against the recorded drive, at 1, 2 and 3 s. They differ in the
grid (or in having none), in where the ego box sits and in how steps become one number per horizon.
`StepRule` and `PolygonRule` hold what decides the score of a single step, `Protocol` adds how steps are
combined, so protocols that share a step rule share its work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from spacedrive_jax.constants import EGO_CENTRE
from spacedrive_jax.errors import ConfigError

HORIZONS_S = (1, 2, 3)
"""Seconds at which the metrics are reported."""
STEPS_PER_SECOND = 2


@dataclasses.dataclass(frozen=True)
class StepRule:
    """How one predicted step is laid on the grid."""

    resolution: float
    """Metres a cell; the grid always spans [-50, 50) m in x and y of the ego frame."""
    ego_offset: float
    """Metres from the waypoint forward to the centre of the box that is tested for collision. The box tested
    against the drivable area is always centred on the waypoint."""
    footprint_yaw: Literal["tangent", "zero"]
    """Heading of the box tested against the drivable area: `tangent` to the predicted path or always `zero`.
    (The collision box has its own heading rule.)"""


@dataclasses.dataclass(frozen=True)
class PolygonRule:
    """How one predicted step is tested without a grid: boxes as polygons, overlaps as areas."""

    ego_offset: float
    """Metres from the waypoint (the rear axle) forward along the heading to the centre of the ego box, in
    both tests."""
    pedestrians: bool = False
    """Whether people count as obstacles beside vehicles."""


Combination = Literal["any", "mean", "endpoint"]
"""Any step up to the horizon, the mean over the steps up to it, or the step at it alone."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to turn six scored steps into numbers at 1, 2 and 3 s."""

    name: str
    """As given to `--protocol`."""
    steps: StepRule | PolygonRule
    """How a single step is scored."""
    l2: Literal["mean", "endpoint"]
    """How the errors of the steps become one number."""
    collision: Combination
    """The same for colliding steps."""
    intersection: Combination
    """The same for steps off the drivable area."""
    description: str
    """One line for tables and reports."""
    unscorable: Literal["clean", "left_out"] = "clean"
    """What becomes of a step at which the recorded drive itself collides, and of a sample whose ego box is
    off the road now: counted as `clean`, or `left_out` of the mean."""
    failures: Literal["dropped", "counted"] = "dropped"
    """What becomes of an answer without six finite waypoints: `dropped` from the mean, or `counted` as
    colliding and off the road, with the L2 of standing still."""


_COARSE_STEPS = StepRule(resolution=0.5, ego_offset=0.5, footprint_yaw="zero")

OMNIDRIVE = Protocol(
    name="omnidrive",
    steps=StepRule(resolution=0.1, ego_offset=0.0, footprint_yaw="tangent"),
    l2="mean",
    collision="any",
    intersection="any",
    description="0.1 m grid, mean L2 up to the horizon, any collision or road departure up to it",
)
"""The paper's main protocol (Table 1). Quirks kept for parity with the published numbers: Q1 (no ego
offset, where OmniDrive's own script shifts the box 1.49 m forward), Q2 (two ego rasterisers), Q3 (steps
under 1 m are tested unrotated), Q4 (vehicles only), Q10 (only samples with a whole future count)."""

VAD = Protocol(
    name="vad",
    steps=_COARSE_STEPS,
    l2="mean",
    collision="mean",
    intersection="mean",
    description="0.5 m grid, ego box 0.5 m forward, means over the steps up to the horizon (ST-P3 style)",
)
"""The supplement's "ST-P3" protocol, Q2-Q4 and Q10 kept. Q6 is not: the published script overwrites its
intersection sum and loses terms to an undefined name, so its printed intersection depends on the last
sample and on the thread count. Here intersection is the mean it meant to compute."""

UNIAD = Protocol(
    name="uniad",
    steps=_COARSE_STEPS,
    l2="endpoint",
    collision="any",
    intersection="any",
    description="0.5 m grid, ego box 0.5 m forward, L2 at the horizon, any collision up to it",
)
"""The supplement's "UniAD" protocol, Q2-Q4 and Q10 kept, and Q5: collisions accumulate up to the horizon,
so the figure is an upper bound of UniAD's own per-step one."""

CORRECTED = Protocol(
    name="corrected",
    steps=PolygonRule(ego_offset=EGO_CENTRE),
    l2="endpoint",
    collision="endpoint",
    intersection="endpoint",
    unscorable="left_out",
    failures="counted",
    description="polygons instead of a grid, ego box 1.4 m forward, every horizon by its own step",
)
"""No published script's, but what they mean to measure: the ego box where the vehicle is (Q1), one box and
one overlap test for both metrics, without cells (Q2), headings carried over through short steps (Q3), people
as obstacles on request (Q4), steps judged by themselves (Q5), unusable answers as failures (Q7)."""

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {protocol.name: protocol for protocol in (OMNIDRIVE, VAD, UNIAD, CORRECTED)}
)


def protocol_named(name: str, *, pedestrians: bool = False) -> Protocol:
    """The protocol called `name`.

    Args:
        name: a key of `PROTOCOLS`.
        pedestrians: count people as obstacles too; `corrected` only.

    Raises:
        ConfigError: there is no such protocol, or it has no say about pedestrians.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"--protocol {name!r} is not one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if not pedestrians:
        return protocol
    if not isinstance(protocol.steps, PolygonRule):
        raise ConfigError(
            f"--pedestrians: the {name} protocol counts vehicles only; use it with --protocol corrected"
        )
    return dataclasses.replace(protocol, steps=dataclasses.replace(protocol.steps, pedestrians=True))
