"""`python -m spacedrive_jax aot`: will it fit, how fast can it be, and what moves?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from spacedrive_jax.console import Command, UserError, progress

if TYPE_CHECKING:
    from spacedrive_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Aot(Command):
    """Compile the real step of a config for a machine that is not there, and print its plan per chip.

    Needs libtpu (pip install -r requirements-aot.txt), no TPU. With --search, tries meshes, batch sizes and
    remat policies and ranks those that fit by the step time bound per sample.

    Example: python -m spacedrive_jax aot spacedrive_plus_qwen_7b --topology v5e:4x4 --mesh data=1,fsdp=16
    --batch-size 16
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A preset in configs/ by name, or a .py file that defines `config`."""
    topology: str
    """CHIP:SHAPE: v5e:4x4, v5p:4x4x4, v6e:8x8; or cpu:N, N CPU devices of this process."""
    mesh: str | None = None
    """Devices along each axis, such as data=2,fsdp=4,tensor=2; one may be -1. The config's when not given."""
    batch_size: int | None = None
    """Samples per step over all chips; the config's when not given."""
    remat: Literal["none", "full", "dots", "dots_no_batch"] | None = None
    """What the blocks keep for the backward pass; the config's when not given."""
    step: Literal["train", "plan"] = "train"
    """The training step, or answering a batch of planning questions."""
    search: tyro.conf.FlagCreatePairsOff[bool] = False
    """Try meshes, batch sizes and remat policies."""
    limit: int = 12
    """Most programs that --search compiles."""

    def run(self) -> Mapping[str, Any]:
        """Compiles; see `spacedrive_jax.scaling.plan.make_plan`."""
        from spacedrive_jax.config import load_preset
        from spacedrive_jax.scaling.plan import make_plan
        from spacedrive_jax.scaling.search import cost, search_space
        from spacedrive_jax.scaling.text import describe_plan, one_line
        from spacedrive_jax.scaling.topology import describe

        config = self._chosen(load_preset(self.config))
        topology = describe(self.topology)
        if not self.search:
            plan = make_plan(config, topology, step=self.step)
            print(describe_plan(plan))
            if not plan.fits:
                raise UserError(f"{self.config} does not fit {self.topology}: {plan.reason}")
            return dataclasses.asdict(plan)
        plans, refused = [], []
        candidates = list(itertools.islice(search_space(config, len(topology.devices)), self.limit))
        for candidate in progress(candidates, desc="compile", unit="program"):
            try:
                plans.append(make_plan(candidate, topology, step=self.step))
            except UserError as error:
                refused.append(f"{candidate.mesh} batch {candidate.train.batch_size}: {error}")
        ranked = sorted(plans, key=lambda plan: (not plan.fits, cost(plan)))
        for plan in ranked:
            print(one_line(plan))
        for reason in refused:
            print("refused:", reason)
        if not ranked or not ranked[0].fits:
            raise UserError(f"nothing tried fits {self.topology}: use more chips or a smaller batch")
        return dataclasses.asdict(ranked[0]) | {"tried": len(plans), "ranked": list(map(one_line, ranked))}

    def _chosen(self, config: Config) -> Config:
        from spacedrive_jax.scaling.search import parse_mesh

        train, model = config.train, config.model
        if self.batch_size is not None:
            train = dataclasses.replace(train, batch_size=self.batch_size)
        if self.remat is not None:
            model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, remat=self.remat))
        mesh = config.mesh if self.mesh is None else parse_mesh(self.mesh)
        return dataclasses.replace(config, train=train, model=model, mesh=mesh)
