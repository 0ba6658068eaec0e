"""The open-loop protocols: what each published nuScenes planning score measures, as data.

All protocols score six waypoints at 2 Hz against the recorded drive, at 1, 2 and 3 s. They differ in the
grid, in where the ego box sits on it and in how steps become one number per horizon. `StepRule` holds what
decides the score of a single step, `Protocol` adds how steps are combined, so protocols that share a
step rule share its rasters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from spacedrive_jax.console import UserError

HORIZONS_S = (1, 2, 3)
"""Seconds at which the metrics are reported."""
STEPS_PER_SECOND = 2


@dataclasses.dataclass(frozen=True)
class StepRule:
    """How one predicted step is laid on the grid.

    Attributes:
        resolution: metres a cell; the grid always spans [-50, 50) m in x and y of the ego frame.
        ego_offset: metres from the waypoint forward to the centre of the box that is tested for
            collision. The box tested against the drivable area is always centred on the waypoint.
        footprint_yaw: heading of the box tested against the drivable area: `tangent` to the
            predicted path or always `zero`. (The collision box has its own heading rule.)
    """

    resolution: float
    ego_offset: float
    footprint_yaw: Literal["tangent", "zero"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One published way to turn six scored steps into numbers at 1, 2 and 3 s.

    Attributes:
        name: as given to `--protocol`.
        steps: how a single step is scored.
        l2: `mean` of the errors up to the horizon, or the error at its `endpoint`.
        collision: `any` step up to the horizon collides, or the `mean` share of colliding steps.
        intersection: `any` step up to the horizon leaves the drivable area, or the `mean` share.
        description: one line for tables and reports.
    """

    name: str
    steps: StepRule
    l2: Literal["mean", "endpoint"]
    collision: Literal["any", "mean"]
    intersection: Literal["any", "mean"]
    description: str


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

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {protocol.name: protocol for protocol in (OMNIDRIVE, VAD, UNIAD)}
)


def protocol_named(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
        UserError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name!r} is not one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
