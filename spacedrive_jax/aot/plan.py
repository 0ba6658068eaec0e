"""Compiles the real training or planning step for a machine, and reads the plan off the program.

Before that, from shapes alone: what a step takes at least in each chip's memory.
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from spacedrive_jax.aot.hlo import Collective, Traffic, traffic
from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import Config
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.inference.answers import expected_draft
from spacedrive_jax.inference.generate import planning_step
from spacedrive_jax.models.families import family_of
from spacedrive_jax.training.sharding import (
    batch_sharding,
    bytes_per_device,
    check_batch_size,
    check_replication,
    make_mesh,
    replicated,
    slice_of,
)
from spacedrive_jax.training.state import abstract_state
from spacedrive_jax.training.step import batch_spec, make_train_step
from spacedrive_jax.training.throughput import Chip, StepFlops, Topology, plan_step_flops, train_step_flops


def residual_bytes(config: Config, mesh: Mesh) -> int:
    """The residual stream that the language model's scan keeps between its blocks for the backward pass."""
    decoder, length = config.model.vlm.decoder, config.data.sequence_length
    if length % mesh.shape["tensor"] == 0:
        length //= mesh.shape["tensor"]
    width = decoder.hidden_size * config.model.compute.activation_dtype.itemsize
    samples = _samples_per_chip(config, mesh, config.train.grad_accum_steps)
    return decoder.num_layers * samples * length * width


def product_bytes(config: Config, mesh: Mesh) -> int:
    """What the language model's blocks keep for the backward pass besides the residual stream.

    A lower bound: the products with the base's weights that their backward pass needs (query, key, value,
    attention's output, gate, up), and the attention scores where they are written out; adapters, norms and
    the vision tower's blocks come on top. Nothing with remat `full`; with `attention` no gate and up, but
    what attention gives.
    """
    compute, decoder, length = config.model.compute, config.model.vlm.decoder, config.data.sequence_length
    if compute.remat == "full":
        return 0
    heads = decoder.num_heads + 2 * decoder.num_kv_heads
    width = heads * decoder.head_dim + decoder.hidden_size
    if compute.remat in ("attention", "attention_mlp"):
        width += decoder.num_heads * decoder.head_dim  # what is attended to; the residual is counted above
    if compute.remat != "attention":
        width += 2 * decoder.intermediate_size
    kept = length * width * compute.activation_dtype.itemsize
    if compute.remat in ("none", "dots") and compute.attention == "xla":
        kept += decoder.num_heads * length * length * compute.activation_dtype.itemsize
    samples = _samples_per_chip(config, mesh, config.train.grad_accum_steps)
    return decoder.num_layers * samples * kept // mesh.shape["tensor"]


def cache_bytes(config: Config, mesh: Mesh) -> int:
    """Keys and values of the prompts in the planning step."""
    decoder, samples = config.model.vlm.decoder, _samples_per_chip(config, mesh, pieces=1)
    token = 2 * decoder.num_kv_heads * decoder.head_dim * config.model.compute.activation_dtype.itemsize
    return decoder.num_layers * samples * config.data.sequence_length * token // mesh.shape["tensor"]


def out_of_memory(message: str) -> tuple[int, str] | None:
    """Reads a compiler's error.

    Returns:
        Bytes that it says it needed (0 where it names none) and its own words; None where the error is
        another one.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    said = re.search(r"Ran out of memory[^\n]*", message)
    reason = (said[0] if said else message.splitlines()[0])[:300]
    # "required for HLO temporaries (47.68G) exceeds available HBM (15.75G)", or "Used 20.4G of 15.75G hbm"
    number = re.search(r"required[^()\n]*\(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT])", message)
    if number is None:
        return 0, reason
    count, unit = [group for group in number.groups() if group]
    return int(float(count) * 1024 ** " KMGT".index(unit)), reason


def _samples_per_chip(config: Config, mesh: Mesh, pieces: int) -> int:
    return max(config.train.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * pieces), 1)


StepKind = Literal["train", "plan"]
TPU_OPTIONS: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""Gather weights whole instead of in steps interleaved with their product, which compiles twice as long. The
launch scripts set the same in LIBTPU_INIT_ARGS."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step on one machine; byte counts are of one chip."""

    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    attention: str
    step: StepKind
    fits: bool
    reason: str
    """Why it does not fit; empty where it does."""
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    activation_bytes: int
    """At least kept for the backward pass, or for the answers' keys and values: a part of
    `temporary_bytes`."""
    temporary_bytes: int
    """Everything the step allocates and frees; 0 where nothing was compiled."""
    peak_bytes: int
    """By the compiler; where nothing was compiled, what is needed at least."""
    hbm_bytes: int | None
    flops_per_chip: float | None
    """Model FLOPs of a step (analytic); None for a planning step token by token."""
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
    """0 where it could not fit, by shapes alone, and was not compiled."""
    slices: int = 1
    dcn_collectives: tuple[Collective, ...] = ()
    """Between slices, over the data-centre network: not part of `step_seconds`."""


@dataclasses.dataclass(frozen=True)
class _Program:
    """A step that can be lowered, and the arrays it takes."""

    run: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    parameters: Any
    optimizer: Any
    batch: DrivingBatch
    kept_bytes: int
    flops: StepFlops | None


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What compiling a program showed, or why it was not compiled."""

    reason: str
    peak_bytes: int
    temporary_bytes: int = 0
    traffic: Traffic | None = None
    seconds: float = 0.0


def make_plan(config: Config, topology: Topology, *, step: StepKind = "train") -> Plan:
    """Compiles one step of a config for a described machine.

    What cannot fit by its shapes alone is not compiled.

    Args:
        config: the whole run; `mesh` lays out the machine's devices. Weights and the tokenizer file are not
            read: only their shapes matter.
        topology: from `describe`.
        step: the training step, or the answer to one batch of prompts (`train.batch_size` of them), in one
            pass where the config's answers have a frame.

    Raises:
        ConfigError: mesh, batch or model do not go together.
    """
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer=None),
        model=dataclasses.replace(config.model, weights=None),
    )
    mesh = make_mesh(config.mesh, topology.devices)
    pieces = config.train.grad_accum_steps if step == "train" else 1
    check_batch_size(config.train.batch_size, mesh, pieces=pieces)
    program = _training(config, mesh) if step == "train" else _planning(config, mesh)
    check_replication(nnx.merge_state(*program.parameters), mesh)
    parameters, optimizer, batch = map(
        bytes_per_device, (program.parameters, program.optimizer, program.batch)
    )
    least = parameters + optimizer + batch + program.kept_bytes
    chip = topology.chip
    measured = _measure(program, topology, least, mesh.size)
    flops, moved, bound = program.flops, measured.traffic, None
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
        attention=config.model.compute.attention,
        step=step,
        fits=not measured.reason,
        reason=measured.reason,
        parameter_bytes=parameters,
        optimizer_bytes=optimizer,
        batch_bytes=batch,
        activation_bytes=program.kept_bytes,
        temporary_bytes=measured.temporary_bytes,
        peak_bytes=measured.peak_bytes,
        hbm_bytes=None if chip is None else chip.hbm_bytes,
        flops_per_chip=None if flops is None else flops.model / mesh.size,
        hardware_flops_per_chip=None if flops is None else flops.hardware / mesh.size,
        moved_bytes=0 if moved is None else moved.hbm_bytes,
        collectives=() if moved is None else moved.collectives,
        step_seconds=bound,
        mfu_bound=None
        if bound is None or flops is None or chip is None
        else flops.model / mesh.size / chip.peak_flops / bound,
        compile_seconds=measured.seconds,
        slices=len({slice_of(device) for device in mesh.devices.flat}),
        dcn_collectives=() if moved is None else moved.dcn,
    )


def _training(config: Config, mesh: Mesh) -> _Program:
    parts = make_train_step(config, mesh)
    batch = batch_spec(config, sharding=batch_sharding(mesh))
    number = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh))
    return _Program(
        parts.run,
        (parts.trainable, parts.optimizer_state, parts.frozen, batch, number),
        (parts.trainable, parts.frozen),
        parts.optimizer_state,
        batch,
        residual_bytes(config, mesh) + product_bytes(config, mesh),
        train_step_flops(config),
    )


def _planning(config: Config, mesh: Mesh) -> _Program:
    graph, trainable, frozen = abstract_state(config, mesh)
    tokenizer = load_tokenizer(config.data.tokenizer, family_of(config.model.vlm).chat)
    draft = expected_draft(config, tokenizer)
    batch = batch_spec(config, sharding=batch_sharding(mesh))
    return _Program(
        planning_step(graph, mesh, config, tokenizer),
        (trainable, frozen, batch),
        (trainable, frozen),
        (),
        batch,
        cache_bytes(config, mesh),
        None if draft is None or draft.opening else plan_step_flops(config, len(draft.frame)),
    )


def _measure(program: _Program, topology: Topology, least: int, devices: int) -> _Measured:
    """Compiles a program that needs `least` bytes a chip at least, unless that is too much already."""
    chip = topology.chip
    if chip is not None and least > chip.hbm_bytes:
        return _Measured(f"needs at least {_of_hbm(least, chip)} by its shapes; not compiled", least)
    started = time.monotonic()
    lowered = program.run.lower(*program.arguments)
    try:
        compiled = lowered.compile(compiler_options=TPU_OPTIONS if chip is not None else None)
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        need, reason = needed
        return _Measured(reason, max(need, least), seconds=time.monotonic() - started)
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    assert memory is not None  # TPU and CPU compilers both report it
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    reason = f"needs {_of_hbm(peak, chip)}" if chip is not None and peak > chip.hbm_bytes else ""
    return _Measured(reason, peak, memory.temp_size_in_bytes, _traffic(compiled, devices), seconds)


def _traffic(compiled: jax.stages.Compiled, devices: int) -> Traffic:
    try:
        return traffic(compiled.as_text() or "", devices)
    except jax.errors.JaxRuntimeError as error:
        raise SpaceDriveError(
            "the compiled program cannot be read back: this libtpu and jaxlib do not go together, install "
            f"the one in requirements-aot.txt ({str(error).splitlines()[0][:200]})"
        ) from error


def _of_hbm(count: int, chip: Chip) -> str:
    return f"{count / 1e9:.1f} GB of a {chip.name}'s {chip.hbm_bytes / 1e9:.1f} GB"
