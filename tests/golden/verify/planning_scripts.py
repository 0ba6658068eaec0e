"""The published planning scripts' sums, bugs and all, from this project's scores per sample.

`evaluation` computes what the scripts mean; their printed numbers also hold two slips of the VAD-style
script, which only a comparison with its output has use for. The sum of the off-road share is overwritten by
every sample that leaves the road. And a variable that only such samples set is read when another one collides
or starts off the road, which raises and loses the sample's remaining terms. (Fidelity Q6.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from spacedrive_jax.evaluation.metrics import HorizonScores, StepScores, horizon_scores
from spacedrive_jax.evaluation.protocols import HORIZONS_S, STEPS_PER_SECOND, VAD, Protocol

SUMS = ("l2", "plan_obj_box_col", "plan_boundary")
"""The scripts' names of L2, collision and intersection."""


@dataclasses.dataclass
class ScriptSums:
    """What a script has added up: one row a metric of `SUMS`, one column a horizon."""

    values: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((len(SUMS), len(HORIZONS_S))))
    samples: int = 0
    raised: list[int] = dataclasses.field(default_factory=list)

    def printed(self) -> dict[str, float]:
        """As the script prints them: means, collision and boundary in percent, and the sample count."""
        scale = np.array([[1.0], [100.0], [100.0]]) / max(self.samples, 1)
        table = {
            f"{name}_{seconds}s": float(value)
            for name, row in zip(SUMS, self.values * scale, strict=True)
            for seconds, value in zip(HORIZONS_S, row, strict=True)
        }
        return table | {"samples": float(self.samples)}


def add_up(
    samples: Sequence[tuple[int, StepScores]], protocol: Protocol, sums: ScriptSums | None = None
) -> ScriptSums:
    """One call of the script over consecutive samples (a thread's share).

    Args:
        samples: index and scores (one row) of the samples that count.
        protocol: the script's.
        sums: what earlier calls added up.
    """
    sums = ScriptSums() if sums is None else sums
    assigned = False
    for index, steps in samples:
        sums.samples += 1
        scores = horizon_scores(steps, protocol)
        if protocol is not VAD:
            sums.values += np.concatenate([scores.l2, scores.collision, scores.intersection])
            continue
        assigned, raised = _add_vad(scores, steps, sums, assigned)
        if raised:
            sums.raised.append(index)
    return sums


def _add_vad(scores: HorizonScores, steps: StepScores, sums: ScriptSums, assigned: bool) -> tuple[bool, bool]:
    """Adds one sample; says whether the script's variable is assigned by now and whether it raised."""
    for column, seconds in enumerate(HORIZONS_S):
        sums.values[0, column] += scores.l2[0, column]
        sums.values[1, column] += scores.collision[0, column]
        off_road = steps.off_road[0, : seconds * STEPS_PER_SECOND + 1]
        leaves = bool(off_road[1:].any())
        if leaves and not off_road[0]:
            assigned = True
            sums.values[2, column] = scores.intersection[0, column]
        elif (leaves or scores.collision[0, column] > 0) and not assigned:
            return assigned, True
    return assigned, False
