"""A study as one frozen value: what is varied, over which seeds, what is measured, and what is claimed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from spacedrive_jax.config import (
    PRESET_FOLDER,
    Config,
    change,
    file_and_name,
    load_module,
    naming_line,
    to_json,
    to_plain,
)
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.inference.predict import check_changes
from spacedrive_jax.json_files import json_digest, parse_json
from spacedrive_jax.study.readout import Readout

Measure = Literal["open_loop", "readout", "counterfactual"]
"""What a run is: train, predict `val`, evaluate; read points back from their encodings (`study.readout`), for
which nothing is trained but the reader; or train on questions what would come of other trajectories, and ask
about `val` (`study.measures.counterfactual`)."""


@dataclasses.dataclass(frozen=True)
class Level:
    """One setting of a factor: its name, and the fields of the config that it changes, and of the plan's
    `readout` as `readout.FIELD`.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Factor:
    """What is varied."""

    name: str
    levels: tuple[Level, ...]
    at_test: bool = False
    """Its levels change fields of `data` for the predictions alone: all of them are measured on the same
    trained run."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one cell's runs are better than another's, and from which size on that matters.

    The effect is the mean of `worse` less that of `better`, for a metric of which less is better. The answer
    is `yes` where its 95 % interval lies above zero, `no` where it lies below `margin` (an effect that would
    matter is excluded), else `cannot tell`; a claim whose interval lies above zero and below `margin` is
    `yes, but less than matters`.
    """

    text: str
    metric: str
    better: Mapping[str, str]
    """Factor to level."""
    worse: Mapping[str, str]
    margin: float
    """In the metric's unit."""
    unit: str = "m"


@dataclasses.dataclass(frozen=True)
class RankClaim:
    """That who is better by one metric is better by another: runs are ranked by both.

    The effect is Spearman's rank correlation over the runs, for two metrics of which less is better. Cells
    are drawn with replacement, with all of their seeds, for seeds of one cell are much alike; so are the
    groups of both metrics. `yes` where the 95 % interval lies above zero, `no` where it lies below `margin`,
    else `cannot tell`.
    """

    text: str
    metric: str
    """By which runs are told apart."""
    outcome: str
    """What is to be known of them."""
    among: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Factor to level: of these cells alone."""
    margin: float = 0.5
    """From which rank correlation on a metric is of use."""
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Drives:
    """Closed-loop drives of every trained run."""

    scenarios: str = "small"
    """As `drive --scenarios`."""
    first: int | None = None
    """The first so many of them; None for all."""
    image_size: tuple[int, int] = (99, 176)
    """Height and width of the camera images, pixels."""
    together: int = 8
    """Drives under way together."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study."""

    name: str
    title: str
    base: Config
    factors: tuple[Factor, ...]
    seeds: tuple[int, ...]
    claims: tuple[Claim | RankClaim, ...]
    measure: Measure = "open_loop"
    readout: Readout = dataclasses.field(default_factory=Readout)
    """How points are read back, where that is measured."""
    skipped: tuple[Mapping[str, str], ...] = ()
    """Combinations of levels that are left out: every mapping names the levels of some factors."""
    pretraining: Mapping[str, Any] | None = None
    """Fields of the base from which it is trained before, once a seed; every run then starts from its
    checkpoint (`model.weights`), and is asked in the end what its base was trained on."""
    drives: Drives | None = None
    """Drive with every run, in the closed loop, too."""
    minutes: float = 1.0
    """Of one training on a processor core, as far as is known: for the budget that is printed beforehand."""
    minutes_at_test: float = 0.0
    """Of predicting and scoring, likewise."""
    missing: tuple[str, ...] = ()
    """What the issue of the study asks for and no option of this product offers yet."""

    def __post_init__(self) -> None:
        names = [factor.name for factor in self.factors]
        if len(set(names)) < len(names):
            raise ConfigError(f"plan {self.name}: two factors have the same name")
        for factor in self.factors:
            levels = [level.name for level in factor.levels]
            if not levels or len(set(levels)) < len(levels):
                raise ConfigError(
                    f"plan {self.name}: factor {factor.name} needs levels with names of their own"
                )
            if factor.at_test and self.measure != "open_loop":
                raise ConfigError(
                    f"plan {self.name}: nothing is trained that factor {factor.name} could test"
                )
            if factor.at_test:
                check_changes(
                    {path: value for level in factor.levels for path, value in level.changes.items()}
                )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"plan {self.name} needs seeds, each once")
        if self.drives is not None and self.measure != "open_loop":
            raise ConfigError(f"plan {self.name}: nothing is trained that could drive")
        for cell in self.skipped:
            self._check(cell)
        for claim in self.claims:
            if isinstance(claim, RankClaim):
                self._check(claim.among)
                continue
            if set(claim.better) != set(claim.worse):
                raise ConfigError(
                    f"plan {self.name}: claim {claim.text!r} must name the same factors on both sides"
                )
            self._check(claim.better)
            self._check(claim.worse)

    def _check(self, cell: Mapping[str, str]) -> None:
        levels = {factor.name: [level.name for level in factor.levels] for factor in self.factors}
        for name, level in cell.items():
            if level not in levels.get(name, ()):
                raise ConfigError(f"plan {self.name}: there is no level {name} = {level}")

    def with_seeds(self, seeds: tuple[int, ...]) -> Plan:
        """The part of the plan that has these of its seeds.

        Raises:
            ConfigError: the plan does not have one of them.
        """
        for seed in seeds:
            if seed not in self.seeds:
                raise ConfigError(
                    f"plan {self.name} has the seeds {', '.join(map(str, self.seeds))}, not {seed}"
                )
        return dataclasses.replace(self, seeds=seeds)

    def cells(self) -> list[dict[str, str]]:
        """Every combination of levels that is run, in the order of the factors."""
        names = [factor.name for factor in self.factors]
        products = itertools.product(*([level.name for level in factor.levels] for factor in self.factors))
        cells = [dict(zip(names, levels, strict=True)) for levels in products]
        return [
            cell
            for cell in cells
            if not any(all(cell[name] == level for name, level in out.items()) for out in self.skipped)
        ]

    @property
    def budget(self) -> float:
        """Minutes that all runs take, as far as is known."""
        cells = self.cells()
        varied = [factor.name for factor in self.factors if not factor.at_test]
        trained = {tuple(cell[name] for name in varied) for cell in cells}
        return len(self.seeds) * (len(trained) * self.minutes + len(cells) * self.minutes_at_test)

    def runs(self, records: str | None = None) -> Iterator[Run]:
        """All runs, seed by seed, so that what is finished early covers all cells.

        Args:
            records: folder to train and score on; None for the base's.
        """
        for seed in self.seeds:
            for cell in self.cells():
                fields: dict[str, Any] = {}
                at_test: dict[str, Any] = {}
                for factor in self.factors:
                    level = next(level for level in factor.levels if level.name == cell[factor.name])
                    (at_test if factor.at_test else fields).update(level.changes)
                fields["train.seed"] = seed
                if records is not None:
                    fields["data.records"] = records
                apart = {path for path in fields if path.startswith("readout.")}
                read = {path.removeprefix("readout."): fields.pop(path) for path in apart}
                readout = dataclasses.replace(self.readout, **read)
                name = "-".join([self.name, *cell.values(), str(seed)]).replace(" ", "_").replace("/", "_")
                yield Run(cell, seed, change(self.base, name, fields), readout, at_test)

    def pretrained(self, seed: int, records: str | None = None) -> Config | None:
        """The run whose weights all runs of a seed start from; None where they start from the base's."""
        if self.pretraining is None:
            return None
        fields = {**self.pretraining, "train.seed": seed}
        if records is not None:
            fields["data.records"] = records
        return change(self.base, f"{self.name}-pretraining-{seed}", fields)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a plan."""

    cell: Mapping[str, str]
    seed: int
    config: Config
    readout: Readout
    at_test: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the config that are otherwise for the predictions."""

    def identity(
        self,
        measure: Measure,
        data: str,
        pretrained: Config | None,
        drives: Drives | None = None,
        *,
        trained: bool = False,
    ) -> str:
        """What the run is, whatever it is called and wherever it lies: 16 hexadecimal digits.

        Args:
            measure: of the plan.
            data: fingerprint of the records.
            pretrained: what it starts from.
            drives: that are driven with it.
            trained: of what is trained alone, however it is tested.
        """
        whole = {
            "measure": measure,
            "data": data,
            "config": _settings(self.config),
            "pretrained": None if pretrained is None else _settings(pretrained),
        }
        if measure == "readout":
            whole["readout"] = dataclasses.asdict(self.readout)
        if drives is not None and not trained:
            whole["drives"] = dataclasses.asdict(drives)
        if self.at_test and not trained:
            whole["at_test"] = {path: to_plain(value) for path, value in self.at_test.items()}
        return json_digest(whole)[:16]


def name_of_base(pretrained: Config, data: str) -> str:
    """The folder of a base, whichever plan it is for: a digest of what it is trained on and how."""
    return f"base-{json_digest({'data': data, 'config': _settings(pretrained)})[:16]}"


def _settings(config: Config) -> Any:
    """A config as JSON values, without its name and places."""
    plain = dataclasses.replace(config, name="", run_dir=None)
    plain = dataclasses.replace(plain, data=dataclasses.replace(plain.data, records=""))
    return parse_json(to_json(plain), "the config")


PLAN_FOLDER = PRESET_FOLDER / "studies"


@functools.cache
def known_plans() -> Mapping[str, Plan]:
    """The plans that come with the project, by name.

    Raises:
        ConfigError: a file defines none, or two have the same name.
    """
    plans: dict[str, Plan] = {}
    # As a package: plans share their bases.
    load_module(PLAN_FOLDER / "__init__.py", _PACKAGE)
    for file in sorted(PLAN_FOLDER.glob("[a-z]*.py")):
        for plan in _plans_of(file, f"{_PACKAGE}.{file.stem}"):
            if plan.name in plans:
                raise ConfigError(f"{file} defines the plan {plan.name}, which another file has")
            plans[plan.name] = plan
    return plans


def load_plan(name: str) -> Plan:
    """Finds a plan.

    Args:
        name: of a plan of `configs/studies`, or a .py file that defines `PLANS`, of which FILE.py:NAME takes
            one.

    Raises:
        ConfigError: there is no such plan.
    """
    file, chosen = file_and_name(name)
    path = Path(file)
    if path.suffix == ".py" and path.is_file():
        plans = {plan.name: plan for plan in _plans_of(path)}
        if not chosen and len(plans) == 1:
            return next(iter(plans.values()))
        if chosen in plans:
            return plans[chosen]
        raise ConfigError(f"{path} defines {', '.join(plans)}: give {path}:NAME")
    plans_known = known_plans()
    if name not in plans_known:
        raise ConfigError(f"no plan {name!r}; plans: {', '.join(plans_known)} (or give a .py file)")
    return plans_known[name]


_PACKAGE = "spacedrive_jax_plans"


def _plans_of(file: Path, known: str | None = None) -> tuple[Plan, ...]:
    """The plans of a file; of one that comes with the project by its module's name."""
    with naming_line(file):
        module = load_module(file, f"{_PACKAGE}_{file.stem}") if known is None else import_module(known)
    plans = getattr(module, "PLANS", None)
    if not isinstance(plans, tuple) or not plans or not all(isinstance(plan, Plan) for plan in plans):
        raise ConfigError(f"{file} must define PLANS, a tuple of plans")
    return plans
