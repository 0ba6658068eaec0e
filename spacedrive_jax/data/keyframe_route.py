"""Route fields of a record: what the driver is told of the way, and the path that it leads along."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_PAST, NUM_PATH_POINTS, NUM_TARGETS
from spacedrive_jax.data.keyframe_ego import EgoTrack
from spacedrive_jax.data.path import future_path
from spacedrive_jax.data.poses import heading, inverse
from spacedrive_jax.data.route import RoadOption, Route
from spacedrive_jax.data.schema import Record

FAR_OFF = 30.0
"""Metres from the route beyond which it tells nothing (Bench2Drive's deviation limit)."""
PATH_JOINS = 5.0
"""Metres from the route within which the path may go on along it."""
JOIN_AHEAD = 2.0
"""Metres further on at which it does, so that it does not turn back for a lane centre beside it."""


def route_fields(track: EgoTrack, index: int, route: Route | None) -> Record:
    """All record fields about the route at keyframe `index` (see `record_features`).

    Args:
        track: the ego vehicle over the scene.
        index: of the keyframe.
        route: of the scene; None where none is known.
    """
    past = [command_route_at(track, index - 1 - step, route) for step in range(min(index, NUM_PAST))]
    ego_to_global = track.ego_to_global[index]
    place = None if route is None else _place(route, ego_to_global)
    targets = np.zeros((NUM_TARGETS, 2))
    if route is not None and place is not None:
        targets = to_ego(route.targets(place), ego_to_global)
    return {
        "command_route": command_route_at(track, index, route),
        "past_command_route": np.array([*past, *[0] * (NUM_PAST - len(past))], np.int32),
        "target_points": targets,
        "route_valid": place is not None,
        **_path_fields(track, index, route),
    }


def command_route_at(track: EgoTrack, index: int, route: Route | None) -> int:
    """The route's command at keyframe `index`; `RoadOption.VOID` where the route is unknown or far."""
    place = None if route is None else _place(route, track.ego_to_global[index])
    return int(RoadOption.VOID if route is None or place is None else route.command(place))


def _place(route: Route, ego_to_global: Float[np.ndarray, "4 4"]) -> float | None:
    """Metres along the route, None far from it."""
    s, distance = route.project(ego_to_global[:2, 3], float(heading(ego_to_global)))
    return s if distance <= FAR_OFF else None


def _path_fields(track: EgoTrack, index: int, route: Route | None) -> Record:
    """The path: along the scene's whole future, not its next 3 s alone, then along the route."""
    ego_to_global = track.ego_to_global[index]
    future_to_ego = exact.matmul(inverse(ego_to_global), track.ego_to_global[index + 1 :])
    ahead = None
    if route is not None:
        end = track.ego_to_global[-1]
        s, distance = route.project(end[:2, 3], float(heading(end)))
        if distance <= PATH_JOINS:
            further = s + JOIN_AHEAD + np.arange(NUM_PATH_POINTS + 1)
            ahead = to_ego(route.at(further[further <= route.lengths[-1]]), ego_to_global)
    yaw = heading(future_to_ego)
    path = future_path(future_to_ego[:, :2, 3], yaw, NUM_PATH_POINTS, ahead)
    return {"path": path.points.astype(np.float64), "path_mask": path.mask}


def to_ego(
    points: Float[np.ndarray, "M 2"], ego_to_global: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "M 2"]:
    """Global ground points at the vehicle's height, in its frame."""
    lifted = np.concatenate([points, np.full((len(points), 1), ego_to_global[2, 3])], axis=1)
    return exact.rotate(lifted - ego_to_global[:3, 3], ego_to_global[:3, :3].T)[:, :2]
