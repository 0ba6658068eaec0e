"""`python -m spacedrive_jax aot`: will it fit, how fast can it be, and what moves?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import COUNT, FROM_ZERO, Bounds
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError, SpaceDriveError

if TYPE_CHECKING:
    from spacedrive_jax.config import Config
    from spacedrive_jax.training.throughput import Topology


@dataclasses.dataclass(frozen=True)
class Aot(Command):
    """Compile the real step of a config for a machine that is not there, and print its plan per chip.

    Needs libtpu (pip install -r requirements-aot.txt), no TPU. With --search, tries meshes, batch sizes
    (unless --batch-size names one) and remat policies and ranks those that fit by the step time bound per
    sample.

    Example: python -m spacedrive_jax aot spacedrive_plus_qwen_7b --topology v5e:4x4 --mesh data=1,fsdp=16
    --batch-size 16
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A preset by name (`train --list`), or a .py file that defines `config`."""
    topology: str
    """CHIP:SHAPE: v5e:4x4, v5p:4x4x4, v6e:8x8; or cpu:N, N CPU devices of this process."""
    slices: int = 1
    """Slices of that shape, joined by the data-centre network; what goes over it is counted apart."""
    mesh: str | None = None
    """Devices along each axis, such as data=2,fsdp=4,tensor=2; one may be -1. The config's when not given."""
    batch_size: int | None = None
    """Samples per step over all chips; the config's when not given."""
    remat: Literal["none", "full", "attention", "attention_mlp", "dots", "dots_no_batch"] | None = None
    """What the blocks keep for the backward pass; the config's when not given."""
    base_quantization: Literal["none", "int8", "int4"] | None = None
    """How the frozen base is stored; the config's when not given."""
    step: Literal["train", "plan"] = "train"
    """The training step, or answering a batch of planning questions."""
    search: tyro.conf.FlagCreatePairsOff[bool] = False
    """Try meshes, batch sizes and remat policies."""
    limit: int = 12
    """Most programs that --search compiles; each takes minutes at 7B."""
    results: Path | None = None
    """JSON file that keeps what --search has compiled, so that a search can be interrupted or widened."""

    WRITES: ClassVar[tuple[str, ...]] = ("results",)
    BOUNDS: ClassVar[Bounds] = {"batch_size": COUNT, "limit": FROM_ZERO, "slices": COUNT}

    def run(self) -> Mapping[str, Any]:
        """Compiles; see `spacedrive_jax.aot.plan.make_plan`."""
        from spacedrive_jax.aot.plan import make_plan
        from spacedrive_jax.aot.search import describe_plan
        from spacedrive_jax.config import load_config
        from spacedrive_jax.training.throughput import describe

        if self.search and self.mesh is not None:
            raise ConfigError("--search chooses the mesh: leave --mesh out")
        if self.search and self.remat is not None:
            raise ConfigError("--search chooses the remat policy: leave --remat out")
        config = self._chosen(load_config(self.config))
        topology = describe(self.topology, self.slices)
        if self.search:
            return self._search(config, topology)
        plan = make_plan(config, topology, step=self.step)
        print(describe_plan(plan))
        if not plan.fits:
            raise SpaceDriveError(f"{self.config} does not fit {self.topology}: {plan.reason}")
        return dataclasses.asdict(plan)

    def _search(self, config: Config, topology: Topology) -> Mapping[str, Any]:
        from spacedrive_jax.aot.search import cost, one_line, search, search_space, trial_line

        devices = len(topology.devices)
        candidates = list(search_space(config, devices, step=self.step, batch_size=self.batch_size))
        trials = []
        for trial in search(candidates, topology, step=self.step, limit=self.limit, results=self.results):
            trials.append(trial)
            print(f"[{len(trials)}/{len(candidates)}] {trial_line(trial)}", flush=True)
        compiled = [trial.plan for trial in trials if trial.plan is not None and trial.plan.compile_seconds]
        ranked = sorted((plan for plan in compiled if plan.fits), key=cost)
        untried = len(candidates) - len(trials)
        print(f"{len(ranked)} of {len(compiled)} compiled fit, best first ({untried} not tried):")
        for plan in ranked:
            print(" ", one_line(plan))
        if not ranked:
            raise SpaceDriveError(
                f"nothing tried fits {self.topology}: use more chips, a smaller batch"
                + (f" or a --limit above {self.limit}" if untried else "")
            )
        outcome = {"tried": len(compiled), "refused": len(trials) - len(compiled), "untried": untried}
        return dataclasses.asdict(ranked[0]) | outcome | {"ranked": list(map(one_line, ranked))}

    def _chosen(self, config: Config) -> Config:
        from spacedrive_jax.aot.search import parse_mesh

        train, model = config.train, config.model
        if self.batch_size is not None:
            train = dataclasses.replace(train, batch_size=self.batch_size)
        if self.remat is not None:
            model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, remat=self.remat))
        if self.base_quantization is not None:
            compute = dataclasses.replace(model.compute, base_quantization=self.base_quantization)
            model = dataclasses.replace(model, compute=compute)
        mesh = config.mesh if self.mesh is None else parse_mesh(self.mesh)
        return dataclasses.replace(config, train=train, model=model, mesh=mesh)
