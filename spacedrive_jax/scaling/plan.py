"""Compiles the real training or planning step for a machine, and reads the plan off the program."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import Config
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.inference.generate import Generation, generate
from spacedrive_jax.scaling.abstract_batch import abstract_batch
from spacedrive_jax.scaling.flops import train_step_flops
from spacedrive_jax.scaling.hlo import Collective, traffic
from spacedrive_jax.scaling.topology import Topology
from spacedrive_jax.training.sharding import check_batch_size, check_replication, make_mesh, replicated
from spacedrive_jax.training.state import abstract_state
from spacedrive_jax.training.step import make_train_step
from spacedrive_jax.vlm.logical_axes import activations_on

StepKind = Literal["train", "plan"]
TPU_OPTIONS: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""Gather weights whole instead of in steps interleaved with their product, which compiles twice as long. The
launch scripts set the same in LIBTPU_INIT_ARGS."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compiled step; byte counts are of one chip."""

    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    step: StepKind
    fits: bool
    reason: str
    """Why it does not fit; empty where it does."""
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    activation_bytes: int
    """Residual stream kept between the blocks for the backward pass: a part of `temporary_bytes`."""
    temporary_bytes: int
    """Everything the step allocates and frees."""
    peak_bytes: int
    hbm_bytes: int | None
    flops_per_chip: float | None
    """Model FLOPs of a step (analytic); None for the planning step."""
    hardware_flops_per_chip: float | None
    """The same with what is recomputed."""
    moved_bytes: int
    """Read from and written to device memory in a step."""
    collectives: tuple[Collective, ...]
    step_seconds: float | None
    """Lower bound: the slowest of arithmetic, device memory and interconnect, fully overlapped."""
    mfu_bound: float | None
    """Model FLOPs over what the chip could do in `step_seconds`."""
    compile_seconds: float


def make_plan(config: Config, topology: Topology, *, step: StepKind = "train") -> Plan:
    """Compiles one step of a config for a described machine.

    Args:
        config: the whole run; `mesh` lays out the machine's devices. Weights and the tokenizer file are not
            read: only their shapes matter.
        topology: from `describe`.
        step: the training step, or the answer to one batch of prompts (`train.batch_size` of them).

    Raises:
        UserError: mesh, batch or model do not go together.
    """
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer=None),
        model=dataclasses.replace(config.model, weights=None),
    )
    mesh = make_mesh(config.mesh, topology.devices)
    check_batch_size(config.train.batch_size, mesh)
    parts = make_train_step(config, mesh)
    check_replication(nnx.merge_state(parts.trainable, parts.frozen), mesh)
    batch = abstract_batch(config, config.train.batch_size, mesh)
    number = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh))
    started = time.monotonic()
    if step == "train":
        lowered = parts.run.lower(parts.trainable, parts.optimizer_state, parts.frozen, batch, number)
        optimizer: Any = parts.optimizer_state
    else:
        lowered = _planning_step(config, mesh).lower(parts.trainable, parts.frozen, batch)
        optimizer = ()
    reason, compiled = "", None
    try:
        compiled = lowered.compile(compiler_options=TPU_OPTIONS if topology.chip is not None else None)
    except Exception as error:
        reason = _out_of_memory(str(error))
        if not reason:
            raise
    seconds = time.monotonic() - started

    memory = None if compiled is None else compiled.memory_analysis()
    moved = None if compiled is None else traffic(compiled.as_text() or "", mesh.size)
    states = _bytes_per_chip((parts.trainable, parts.frozen))  # float32 trainables, frozen base
    peak = _stated_need(reason) or states
    if memory is not None:
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
    chip = topology.chip
    if chip is not None and not reason and peak > chip.hbm_bytes:
        reason = f"needs {peak / 1e9:.2f} GB of {chip.hbm_bytes / 1e9:.2f} GB"
    flops = train_step_flops(config) if step == "train" else None
    bound = None
    if flops is not None and chip is not None and moved is not None:
        bound = max(
            flops.hardware / mesh.size / chip.peak_flops,
            moved.hbm_bytes / chip.hbm_bandwidth,
            moved.interconnect_bytes / chip.interconnect,
        )
    return Plan(
        topology=topology.name,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        batch_size=config.train.batch_size,
        remat=config.model.compute.remat,
        step=step,
        fits=not reason,
        reason=reason,
        parameter_bytes=states,
        optimizer_bytes=_bytes_per_chip(optimizer),
        batch_bytes=_bytes_per_chip(batch),
        activation_bytes=_residual_bytes(config, mesh) if step == "train" else 0,
        temporary_bytes=0 if memory is None else memory.temp_size_in_bytes,
        peak_bytes=peak,
        hbm_bytes=None if chip is None else chip.hbm_bytes,
        flops_per_chip=None if flops is None else flops.model / mesh.size,
        hardware_flops_per_chip=None if flops is None else flops.hardware / mesh.size,
        moved_bytes=0 if moved is None else moved.hbm_bytes,
        collectives=() if moved is None else moved.collectives,
        step_seconds=bound,
        mfu_bound=None
        if bound is None or flops is None or chip is None
        else flops.model / mesh.size / chip.peak_flops / bound,
        compile_seconds=seconds,
    )


def _planning_step(config: Config, mesh: Mesh) -> Any:
    graph, _, _ = abstract_state(config, mesh)
    tokenizer = load_tokenizer(config.data.tokenizer)

    @jax.jit
    def answer(trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch) -> Generation:
        with activations_on(mesh):
            return generate(nnx.merge(graph, trainable, frozen), batch, tokenizer, 100)

    return answer


def _bytes_per_chip(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "sharding")
    )


def _residual_bytes(config: Config, mesh: Mesh) -> int:
    compute, decoder = config.model.compute, config.model.vlm.decoder
    samples = config.train.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulation)
    length = config.data.sequence_length
    if length % mesh.shape["tensor"] == 0:
        length //= mesh.shape["tensor"]
    width = decoder.hidden_size * compute.activation_dtype.itemsize
    return decoder.num_layers * max(samples, 1) * length * width


def _out_of_memory(message: str) -> str:
    """The compiler's own words where it ran out of memory, else nothing."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return ""
    said = re.search(r"Ran out of memory[^\n]*|Used [^\n]* hbm[^\n]*", message)
    return said[0][:300] if said else message.splitlines()[0][:300]


def _stated_need(reason: str) -> int:
    used = re.search(r"Used ([\d.]+)([KMGT])", reason)
    return int(float(used[1]) * 1024 ** (" KMGT".index(used[2]))) if used else 0
