"""The world as something that can be driven in: reset, step, look, go back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.errors import DataError
from spacedrive_jax.world.scenario import Scenario
from spacedrive_jax.world.step import EgoBody, Traffic, TrafficState
from spacedrive_jax.world.traffic import TIME_STEP, Motion
from spacedrive_jax.world.vehicle import WHEEL_BASE, Control, Limits, VehicleState, actuate, moved


@dataclasses.dataclass(frozen=True)
class WorldState:
    """Everything that changes, at one instant. Plain numbers: keep it, write it, go on from it later."""

    traffic: TrafficState
    vehicle: VehicleState | None
    """The steered ego vehicle; None while it drives by its script, on its route."""

    @property
    def time(self) -> float:
        """Seconds since the start."""
        return self.traffic.time

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; numbers keep all their bits."""
        arrays = {
            name: [None if np.isinf(value) else float(value) for value in getattr(self.traffic, name)]
            for name in ("s", "speed", "acceleration", "since", "stood")
        }
        vehicle = None if self.vehicle is None else dataclasses.asdict(self.vehicle)
        return {"traffic": {"step": self.traffic.step, **arrays}, "vehicle": vehicle}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WorldState:
        """Reads back what `to_json` wrote.

        Raises:
            DataError: these are not a state's values.
        """
        try:
            arrays = {
                name: np.array([np.inf if value is None else value for value in values["traffic"][name]])
                for name in ("s", "speed", "acceleration", "since", "stood")
            }
            vehicle = None if values["vehicle"] is None else VehicleState(**values["vehicle"])
            return cls(TrafficState(int(values["traffic"]["step"]), **arrays), vehicle)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"these are not the values of a world's state ({error})") from error


class World:
    """One scenario, driven.

    `advance` is a pure function of a state and a control; `reset` and `step` keep the states one after the
    other, for whoever looks back (sensors fire between steps, histories, scores).
    """

    def __init__(self, scenario: Scenario, limits: Limits | None = None) -> None:
        """Prepares the traffic.

        Args:
            scenario: who takes part and where the ego vehicle shall go.
            limits: of the ego vehicle's actuators.
        """
        self.scenario, self.limits = scenario, limits or Limits()
        self.traffic = Traffic(scenario.town, scenario.cast)
        self.states: list[WorldState] = []
        """One every `TIME_STEP` seconds from the start; the last is now."""

    @property
    def state(self) -> WorldState:
        """Now."""
        return self.states[-1]

    def reset(self, *, steered: bool = True, shift: tuple[float, float] = (0.0, 0.0)) -> WorldState:
        """Goes to the start of the scenario.

        Args:
            steered: the ego vehicle is a body that controls steer; otherwise it drives by its script.
            shift: how far to the left of its route and by what angle to the left of its direction the ego
                vehicle starts, metres and radians.
        """
        vehicle = self._start(shift) if steered else None
        traffic = self.traffic.start(None if vehicle is None else _body(vehicle))
        self.states = [WorldState(traffic, vehicle)]
        return self.state

    def _start(self, shift: tuple[float, float]) -> VehicleState:
        ego = self.scenario.ego
        vehicle = self._beside_route(float(ego.start), float(ego.speed), 0.0, shift)
        steer = min(max(vehicle.steer, -self.limits.steer), self.limits.steer)
        return dataclasses.replace(vehicle, steer=steer)

    def _beside_route(
        self, s: float, speed: float, acceleration: float, shift: tuple[float, float]
    ) -> VehicleState:
        """The ego vehicle at an arc length of its route, moved and turned to the left by `shift`."""
        route = self.scenario.ego.route
        x, y, yaw = (float(value) for value in route.pose(s))
        aside, turn = shift
        # The wheels follow the route's bend already, so that the start is no jerk of the wheel.
        steer = exact.arctan(WHEEL_BASE * float(route.curvature(s)))
        cos, sin = exact.cos_sin(yaw)
        return VehicleState(x - aside * sin, y + aside * cos, yaw + turn, speed, acceleration, steer)

    def advance(self, state: WorldState, control: Control | None) -> tuple[WorldState, WorldState]:
        """One time step, without a trace in this world.

        Args:
            state: now.
            control: what the driver asks for until the next step; None where the ego vehicle drives by its
                script.

        Returns:
            `state` with what the actuators made of the control, and the state one time step later.
        """
        if state.vehicle is None or control is None:
            return state, WorldState(self.traffic.step(state.traffic), None)
        vehicle = actuate(state.vehicle, control, TIME_STEP, self.limits)
        later = moved(vehicle, TIME_STEP)
        acceleration = state.traffic.acceleration.copy()
        acceleration[0] = vehicle.acceleration
        held = dataclasses.replace(state.traffic, acceleration=acceleration)
        return WorldState(held, vehicle), WorldState(self.traffic.step(held, _body(later)), later)

    def step(self, control: Control | None = None) -> WorldState:
        """Goes one time step on (see `advance`)."""
        held, later = self.advance(self.state, control)
        self.states[-1] = held
        self.states.append(later)
        return later

    def hand_over(self, *, steered: bool, shift: tuple[float, float] = (0.0, 0.0)) -> WorldState:
        """Gives the wheel to a driver, or back to the script, which goes on from the nearest place on the
        route.

        Args:
            steered: a driver takes the wheel.
            shift: the driver finds the vehicle so far to the left, and turned to the left by so much, metres
                and radians.
        """
        state = self.state
        if steered and state.vehicle is None:
            s, speed, acceleration = (
                float(values[0])
                for values in (state.traffic.s, state.traffic.speed, state.traffic.acceleration)
            )
            vehicle = self._beside_route(s, speed, acceleration, shift)
            self.states[-1] = WorldState(state.traffic, vehicle)
        elif not steered and state.vehicle is not None:
            traffic = self.traffic.rejoin(state.traffic, state.vehicle.acceleration)
            self.states[-1] = WorldState(traffic, None)
        return self.state

    def restore(self, state: WorldState, earlier: Sequence[WorldState] = ()) -> None:
        """Goes to a state; what this world did after its time is forgotten.

        Args:
            state: of this scenario, from here or from another process.
            earlier: the states before it, from the start on; by default those that this world knows.

        Raises:
            DataError: the state has another number of movers than this scenario, or its past is not known
                (sensors and histories look back).
        """
        if len(state.traffic.s) != len(self.scenario.cast.movers):
            raise DataError(
                f"the state has {len(state.traffic.s)} movers, this scenario {len(self.scenario.cast.movers)}"
            )
        known = list(earlier or self.states)[: state.traffic.step]
        if len(known) != state.traffic.step:
            raise DataError(
                f"the state is {state.traffic.step} steps from the start, but only {len(known)} "
                "states before it are known: give `earlier`"
            )
        self.states = [*known, state]

    def recording(self) -> Scenario:
        """The scenario with what happened so far in place of what the script foresaw: what sensors see."""
        history = np.stack(
            [[state.traffic.s, state.traffic.speed, state.traffic.acceleration] for state in self.states],
            axis=1,
        )
        motions = tuple(Motion(*history[:, :, i]) for i in range(history.shape[2]))
        driven = tuple(state.vehicle for state in self.states)
        return dataclasses.replace(self.scenario, motions=motions, driven=driven)

    def poses(self, state: WorldState) -> Float[np.ndarray, "R 3"]:
        """x, y, heading of every box centre: the ego vehicle, the other movers, the obstacles."""
        return self.traffic.poses(state.traffic, None if state.vehicle is None else _body(state.vehicle))


def _body(vehicle: VehicleState) -> EgoBody:
    return EgoBody((vehicle.x, vehicle.y, vehicle.yaw), vehicle.speed, vehicle.acceleration)
