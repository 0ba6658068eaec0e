"""The scenario kinds, the sets of drives over them, and how a drive is staged from a few numbers."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from spacedrive_jax.driving.actors import (
    Actor,
    Blocker,
    Crosser,
    CutIn,
    Flow,
    HeadOn,
    Lead,
    Oncoming,
    RedRunner,
    Stage,
    Standing,
)
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.json_files import read_json
from spacedrive_jax.world.scenario import (
    MANOEUVRES,
    WARM_UP,
    Scenario,
    Script,
    UnplayableError,
    cast_scenario,
    write_script,
)
from spacedrive_jax.world.town import LOCATIONS, TEST_TOWN, Town, build_town
from spacedrive_jax.world.traffic import Mover, Obstacle, Priority, Route

CAR = "vehicle.car"
TEST_SEED = 9000
"""Seed of the towns that drives are scored in; data sets are synthesized with smaller ones."""
TRAINING_SEEDS = {"train": 5001, "train_more": 8001}
"""Sets for collecting, and the seed of their first drive's towns; each drive has towns of its own."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of scenario."""

    group: Literal["manoeuvre", "bench2drive", "neuroncap"]
    manoeuvre: str
    """What the town's rule arranges for the ego vehicle, one of `MANOEUVRES`."""
    actors: tuple[Actor, ...] = ()
    """Who plays a part, with its trigger."""
    arms: int | None = None
    """Arms that the first junction on the way must have."""
    junction: Literal["lights", "goes first", "gives way", "stop sign"] = "lights"
    """What rules the first junction on the way: lights, or none, and the ego vehicle's road goes first, gives
    way to the other, or has a stop sign."""
    mirrored: bool = False
    """`manoeuvre` is that of right-hand traffic: where it keeps to the left, it turns to the other side."""
    oncoming_green: float | None = None
    """Seconds for which at the first light on the way the oncoming traffic has green too."""
    red_for: float | None = None
    """Seconds for which the first light on the way stays red."""
    tries: int = 24
    """Draws after which it counts as impossible in a town."""
    seconds: float = 16.0
    """From the first decision to the end of the script."""
    ends: Literal["script", "behind light", "behind junction"] = "script"
    """Where the drive ends: where the script's driver is at the end of the script; just behind the first
    light on the way, so that whoever runs it is seen to; or just behind that light's junction. The script's
    driver must have got there."""


_across = functools.partial(
    Kind, "bench2drive", mirrored=True, tries=200, seconds=24.0, ends="behind junction"
)
"""A kind that is about who goes first at a junction."""
KINDS: Mapping[str, Kind] = {
    **{name: Kind("manoeuvre", name, seconds=14.0) for name in MANOEUVRES},
    "stop": Kind("manoeuvre", "stop", seconds=26.0, ends="behind light"),
    "BlockedIntersection": Kind("bench2drive", "turn_right", (Blocker(),)),
    "ControlLoss": Kind("bench2drive", "cruise"),
    "DynamicObjectCrossing": Kind("bench2drive", "cruise", (Crosser(2.0, 2.1, 6.0, hidden_behind=CAR),)),
    "HardBreakRoute": Kind("bench2drive", "cruise", (Lead(),)),
    "OppositeVehicleRunningRedLight": Kind("bench2drive", "straight", (RedRunner(),)),
    "ParkingCrossingPedestrian": Kind(
        "bench2drive", "cruise", (Crosser(2.0, 2.15, 6.0, "human.pedestrian.child", hidden_behind=CAR),)
    ),
    "ParkingCutIn": Kind("bench2drive", "cruise", (CutIn(),)),
    "PedestrianCrossing": Kind("bench2drive", "straight", (Crosser(1.3, 3.5, 12.0, where="exit"),)),
    "T_Junction": Kind("bench2drive", "turn_left", arms=3),
    "VanillaSignalizedTurnEncounterGreenLight": Kind("bench2drive", "turn_right"),
    "VanillaSignalizedTurnEncounterRedLight": Kind(
        "bench2drive", "turn_left", red_for=9.0, seconds=24.0, ends="behind light"
    ),
    "VehicleTurningRoute": Kind(
        "bench2drive", "turn_right", (Crosser(3.0, 2.0, 6.0, "vehicle.bicycle", "exit"),)
    ),
    "VehicleTurningRoutePedestrian": Kind(
        "bench2drive", "turn_left", (Crosser(1.8, 2.0, 6.0, where="exit"),)
    ),
    "NeuroNCAPStationary": Kind("neuroncap", "cruise", (Standing(),)),
    "CrossingBicycleFlow": Kind(
        "bench2drive", "turn_right", (Crosser(3.0, 2.0, 6.0, "vehicle.bicycle", "exit", count=3),)
    ),
    "SignalizedJunctionLeftTurn": Kind(
        "bench2drive",
        "turn_left",
        (Oncoming(),),
        mirrored=True,
        oncoming_green=13.0,
        seconds=24.0,
        ends="behind junction",
    ),
    "StaticCutIn": Kind("bench2drive", "cruise", (CutIn("lane", seconds=2.5, metres=14.0, speed=3.5),)),
    "NeuroNCAPFrontal": Kind("neuroncap", "cruise", (HeadOn(),)),
    "NeuroNCAPSide": Kind(
        "neuroncap",
        "turn_left",
        (RedRunner(3.5, 12.0, 9.0),),
        mirrored=True,
        seconds=20.0,
        ends="behind junction",
    ),
    "NonSignalizedJunctionLeftTurn": _across("turn_left", (Flow("opposite"),), junction="goes first"),
    "NonSignalizedJunctionLeftTurnEnterFlow": _across(
        "turn_left", (Flow("opposite", enters=True, speed=5.0, apart=11.0),), junction="goes first"
    ),
    "NonSignalizedJunctionRightTurn": _across(
        "turn_right", (Flow("side", enters=True),), junction="gives way"
    ),
    "VanillaNonSignalizedTurnEncounterStopsign": _across("turn_right", junction="stop sign", mirrored=False),
}
"""Names as Bench2Drive has them where it has the scenario."""
HELD_OUT = (
    "CrossingBicycleFlow",
    "SignalizedJunctionLeftTurn",
    "StaticCutIn",
    "NeuroNCAPFrontal",
    "NeuroNCAPSide",
    "NonSignalizedJunctionLeftTurn",
    "NonSignalizedJunctionLeftTurnEnterFlow",
    "NonSignalizedJunctionRightTurn",
    "VanillaNonSignalizedTurnEncounterStopsign",
)
"""Kinds that the set `train` does not have: no policy that learns from its drives has met them."""
TRAINED = tuple(name for name in KINDS if name not in HELD_OUT)


@dataclasses.dataclass(frozen=True)
class DriveSpec:
    """One drive: everything that happens in it follows from these, and from the policy."""

    number: int
    """In its set; the route's number in result files."""
    kind: str
    town: str
    """Location of the town."""
    seed: int
    world: int = TEST_SEED
    """Seed of the towns; where a policy learns from its drives, another than it is scored in."""

    @property
    def name(self) -> str:
        """Of its folder."""
        world = "" if self.world == TEST_SEED else f"-world{self.world}"
        return f"{self.number:04d}-{self.kind}-{self.town}-{self.seed}{world}"


SETS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "full": (tuple(KINDS), LOCATIONS, 5),
    "unseen": (tuple(KINDS), (TEST_TOWN,), 5),
    "medium": (TRAINED, (*LOCATIONS, TEST_TOWN), 1),
    "small": (
        ("turn_left", "turn_right", "stop", "follow", "bend", "DynamicObjectCrossing", "HardBreakRoute"),
        LOCATIONS,
        1,
    ),
    "tiny": (("straight", "start"), LOCATIONS[:1], 1),
    "train": (TRAINED, LOCATIONS, 1),
    "train_more": (TRAINED, LOCATIONS, 3),
}
"""Kinds, towns and seeds of the sets that `--scenarios` knows by name."""


def drive_set(name: str) -> list[DriveSpec]:
    """The drives of a set, or of a JSON file: a list of {"kind", "town", "seed"}, some with a "world".

    Raises:
        ConfigError: there is no such set.
        DataError: the file is none, or names a kind or a town that is not there.
    """
    if name in SETS:
        kinds, towns, seeds = SETS[name]
        wanted = [(kind, town, seed) for seed in range(seeds) for town in towns for kind in kinds]
        if name in TRAINING_SEEDS:
            return [
                DriveSpec(number, kind, town, 0, TRAINING_SEEDS[name] + number)
                for number, (kind, town, _) in enumerate(wanted)
            ]
        return [DriveSpec(number, *drive) for number, drive in enumerate(wanted)]
    if not Path(name).is_file():
        raise ConfigError(f"--scenarios {name!r}: choose {', '.join(SETS)}, or give a JSON file")
    values = read_json(name, most=16 << 20)
    if not isinstance(values, list) or not values:
        raise DataError(f"{name} is not a list of drives")
    return [_parse(number, value, f"{name}, drive {number}") for number, value in enumerate(values)]


def _parse(number: int, value: object, where: str) -> DriveSpec:
    if not isinstance(value, dict) or set(value) - {"world"} != {"kind", "town", "seed"}:
        raise DataError(
            f'{where} must be {{"kind", "town", "seed"}}, with a "world" or without, found {str(value)[:80]}'
        )
    kind, town, seed = value["kind"], value["town"], value["seed"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(f"{where}: no scenario {kind!r}; there are {', '.join(KINDS)}")
    if town not in (*LOCATIONS, TEST_TOWN):
        raise DataError(f"{where}: no town {town!r}; there are {', '.join((*LOCATIONS, TEST_TOWN))}")
    world = value.get("world", TEST_SEED)
    for name, each in (("seed", seed), ("world", world)):
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < 2**31:
            raise DataError(f"{where}: the {name} {each!r} must be a whole number from 0 on")
    return DriveSpec(number, kind, town, seed, world)


def build_drive(spec: DriveSpec) -> tuple[Scenario, float]:
    """Stages a drive.

    Returns:
        The scenario, and the place on the route at which it ends (`Kind.ends`).

    Raises:
        UnplayableError: the town has no place for it.
    """
    kind, town = KINDS[spec.kind], town_of_drives(spec.town, spec.world)
    for attempt in range(kind.tries):
        rng = np.random.default_rng([spec.world, zlib.crc32(spec.kind.encode()), spec.seed, attempt, 6])
        try:
            scenario = _staged(kind, town, rng)
            return scenario, goal_of(scenario, kind)
        except UnplayableError:
            continue
    raise UnplayableError(f"{spec.kind} finds no place in {spec.town} with seed {spec.seed}")


def _staged(kind: Kind, town: Town, rng: np.random.Generator) -> Scenario:
    total = WARM_UP + kind.seconds
    manoeuvre = kind.manoeuvre
    if kind.mirrored and not town.right_hand:
        manoeuvre = {"turn_left": "turn_right", "turn_right": "turn_left"}[manoeuvre]
    script = _with_rule(kind, town, write_script(town, manoeuvre, total, rng))
    if not kind.actors:
        return cast_scenario(town, script, manoeuvre, total, rng)

    def actors(route: Route) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        stage = Stage(town, script, route, rng)
        cast = [actor.cast(stage, f"actor{number}") for number, actor in enumerate(kind.actors)]
        return [m for movers, _ in cast for m in movers], [p for _, props in cast for p in props]

    return cast_scenario(town, script, manoeuvre, total, rng, actors)


def _with_rule(kind: Kind, town: Town, script: Script) -> Script:
    """The script under the kind's rule for the town.

    Raises:
        UnplayableError: the first junction on the way does not suit it.
    """
    passed = [town.lanes[key] for key in script.keys if town.lanes[key].road is None]
    first = next((lane for lane in passed if town.junctions[lane.junction].signalised), None)
    if first is None:
        rules = (kind.arms, kind.red_for, kind.oncoming_green)
        if kind.junction != "lights" or any(rule is not None for rule in rules):
            raise UnplayableError("the route passes no signalised junction")
        return script
    arms = town.junctions[first.junction].arms
    if kind.arms is not None and len(arms) != kind.arms:
        raise UnplayableError(f"the junction has {len(arms)} arms")
    opposite, sides = (first.arm + 2) % 4, ((first.arm + 1) % 4, (first.arm + 3) % 4)
    if kind.junction != "lights":
        if kind.junction != "goes first" and not set(sides) <= set(arms):
            raise UnplayableError("no road crosses the ego vehicle's at the junction")
        minor = sides if kind.junction == "goes first" else (first.arm, opposite)
        priority = Priority(tuple(arm for arm in minor if arm in arms), kind.junction == "stop sign")
        return dataclasses.replace(script, priorities={first.junction: priority})
    if kind.oncoming_green is not None:
        if opposite not in arms:
            raise UnplayableError("nobody comes from the other side of the junction")
        both = ((-1.0, (first.arm, opposite)), (WARM_UP + kind.oncoming_green, (first.arm,)))
        return dataclasses.replace(script, signals={**script.signals, first.junction: both})
    if kind.red_for is None:
        return script
    other = next(arm for arm in arms if arm != first.arm)
    green = WARM_UP + kind.red_for + 1.0
    lights = ((-1.0, (other,)), (WARM_UP + kind.red_for, ()), (green, (first.arm,)))
    return dataclasses.replace(script, signals={**script.signals, first.junction: lights})


BEHIND_LIGHT, BEHIND_JUNCTION = 12.0, 8.0
"""Metres behind a stop line, and behind a junction's end, at which the whole vehicle has left it behind."""


def goal_of(scenario: Scenario, kind: Kind) -> float:
    """Metres along the route at which a drive of a kind ends.

    Raises:
        UnplayableError: the script's driver does not get past the junction that the kind is about.
    """
    reached = scenario.motions[0].at(WARM_UP + kind.seconds)[0]
    if kind.ends == "script":
        return reached
    gate = scenario.ego.route.gates[0]
    behind = gate.stop + BEHIND_LIGHT if kind.ends == "behind light" else gate.leave + BEHIND_JUNCTION
    if reached < behind:
        raise UnplayableError("the script's driver still waits at the junction at its end")
    return behind


def town_of_drives(location: str, world: int = TEST_SEED) -> Town:
    """The town that drives are scored in, unless another world is asked for; no data set is synthesized in
    it.
    """
    number = (*LOCATIONS, TEST_TOWN).index(location)
    return build_town(location, np.random.default_rng([world, number, 1]))
