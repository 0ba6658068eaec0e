"""`python -m spacedrive_jax aot`: will it fit, how fast can it be, and what moves?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import tyro

from spacedrive_jax.config import Config, MeshConfig, load_preset
from spacedrive_jax.console import Command, UserError, progress
from spacedrive_jax.vlm.config import RematPolicy

if TYPE_CHECKING:
    from spacedrive_jax.scaling.plan import Plan


@dataclasses.dataclass(frozen=True)
class Aot(Command):
    """Compile the real step of a config for a machine that is not there, and print its plan per chip.

    Needs libtpu (pip install -r requirements-aot.txt), no TPU. With --search, tries meshes, batch sizes and
    remat policies and ranks those that fit by the step time bound per sample.

    Example: python -m spacedrive_jax aot spacedrive_plus_qwen_7b --topology v5e:4x4 --mesh data=1,fsdp=16
    --batch-size 16
    """

    config: tyro.conf.Positional[str]
    """A preset in configs/ by name, or a .py file that defines `config`."""
    topology: str
    """CHIP:SHAPE: v5e:4x4, v5p:4x4x4, v6e:8x8; or cpu:N, N CPU devices of this process."""
    mesh: str | None = None
    """Devices along each axis, such as data=2,fsdp=4,tensor=2; one may be -1. The config's when not given."""
    batch_size: int | None = None
    """Samples per step over all chips; the config's when not given."""
    remat: RematPolicy | None = None
    """What the blocks keep for the backward pass; the config's when not given."""
    step: Literal["train", "plan"] = "train"
    """The training step, or answering a batch of planning questions."""
    search: tyro.conf.FlagCreatePairsOff[bool] = False
    """Try meshes, batch sizes and remat policies."""
    limit: int = 12
    """Most programs that --search compiles."""

    def run(self) -> Mapping[str, Any]:
        """Compiles; see `spacedrive_jax.scaling.plan.make_plan`."""
        from spacedrive_jax.scaling.plan import make_plan
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
        train, model = config.train, config.model
        if self.batch_size is not None:
            train = dataclasses.replace(train, batch_size=self.batch_size)
        if self.remat is not None:
            model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, remat=self.remat))
        mesh = config.mesh if self.mesh is None else parse_mesh(self.mesh)
        return dataclasses.replace(config, train=train, model=model, mesh=mesh)


def parse_mesh(text: str) -> MeshConfig:
    """Reads `data=2,fsdp=4,tensor=2`; axes not named are 1.

    Raises:
        UserError: an axis is unknown or its size is not a number.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.lstrip("-").isdigit():
            raise UserError(f"--mesh {text}: expected AXIS=NUMBER of {', '.join(sizes)}, got {part!r}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def search_space(config: Config, devices: int) -> Iterator[Config]:
    """Meshes with every axis a power of two, then larger batches, then every remat policy."""
    powers = [1 << shift for shift in range(devices.bit_length()) if (1 << shift) <= devices]
    meshes = [
        MeshConfig(devices // (fsdp * tensor), fsdp, tensor)
        for tensor in powers
        for fsdp in reversed(powers)
        if devices % (fsdp * tensor) == 0 and config.model.vlm.decoder.num_heads % tensor == 0
    ]
    policies = sorted(get_args(RematPolicy), key=lambda policy: policy != config.model.compute.remat)
    for policy, growth, mesh in itertools.product(policies, (1, 2), meshes):
        batch = config.train.batch_size * growth
        if batch % (mesh.data * mesh.fsdp):
            continue
        compute = dataclasses.replace(config.model.compute, remat=policy)
        yield dataclasses.replace(
            config,
            mesh=mesh,
            model=dataclasses.replace(config.model, compute=compute),
            train=dataclasses.replace(config.train, batch_size=batch),
        )


def cost(plan: Plan) -> float:
    """What to rank by: seconds of a step per sample, or bytes moved where no rates are known."""
    return (plan.step_seconds or plan.moved_bytes) / plan.batch_size


def one_line(plan: Plan) -> str:
    """A plan as one row of a table."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    mfu = "" if plan.mfu_bound is None else f"  MFU<= {plan.mfu_bound:.0%}"
    time = "" if plan.step_seconds is None else f"  step>= {plan.step_seconds:.3f} s"
    fits = "fits" if plan.fits else "too large"
    return (
        f"{mesh}  batch {plan.batch_size}  remat {plan.remat}  peak {plan.peak_bytes / 1e9:.2f} GB  {fits}"
        f"{time}{mfu}"
    )


def describe_plan(plan: Plan) -> str:
    """A plan as a page of text."""

    def size(count: int) -> str:
        return f"{count / 1e9:10.3f} GB"

    rows = [
        f"{plan.topology}, {plan.chips} chips; {plan.step} step, batch {plan.batch_size}, "
        f"mesh {plan.mesh}, remat {plan.remat}",
        "per chip:",
        f"  parameters          {size(plan.parameter_bytes)}",
        f"  optimizer           {size(plan.optimizer_bytes)}",
        f"  batch               {size(plan.batch_bytes)}",
        f"  temporaries         {size(plan.temporary_bytes)}",
        f"    of them kept residual stream {size(plan.activation_bytes)}",
        f"  peak                {size(plan.peak_bytes)}"
        + ("" if plan.hbm_bytes is None else f" of {plan.hbm_bytes / 1e9:.3f} GB"),
        f"  moved in memory     {size(plan.moved_bytes)} a step",
    ]
    rows += [f"  {each.kind:<19} {size(each.bytes)} a step in {each.count} runs" for each in plan.collectives]
    if plan.flops_per_chip is not None and plan.hardware_flops_per_chip is not None:
        rows.append(
            f"  model FLOPs         {plan.flops_per_chip:10.3e}    a step; with recomputation "
            f"{plan.hardware_flops_per_chip:.3e}"
        )
    if plan.step_seconds is not None:
        rows.append(f"step time at least {plan.step_seconds:.3f} s, MFU at most {plan.mfu_bound:.1%}")
    rows.append(f"compiled in {plan.compile_seconds:.0f} s; {'fits' if plan.fits else 'does not fit'}")
    return "\n".join(rows)
