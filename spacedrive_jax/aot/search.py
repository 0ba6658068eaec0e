"""Layouts of a run on a machine: which to try, which is best, and plans as text.

And what would fit where a training step ran out of memory, by the compiler's own account of smaller ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import jax

from spacedrive_jax.aot.plan import Plan, StepKind, make_plan, product_bytes, residual_bytes
from spacedrive_jax.config import Config, MeshConfig, change, to_json
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.json_files import MOST_JSON, read_typed, write_json
from spacedrive_jax.models.config import RematPolicy
from spacedrive_jax.models.partitioning import BATCH_AXES
from spacedrive_jax.training.sharding import bytes_per_device, make_mesh
from spacedrive_jax.training.step import make_train_step
from spacedrive_jax.training.throughput import CHIPS, Topology, train_step_flops

log = logging.getLogger(__name__)

POLICIES: tuple[RematPolicy, ...] = ("full", "attention", "attention_mlp", "dots_no_batch", "dots", "none")
"""From the one that keeps least for the backward pass to the one that keeps most."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of one candidate."""

    config: Config
    plan: Plan | None
    """None where the candidate was refused."""
    refusal: str = ""
    known: bool = False
    """Read from the results of an earlier search."""


def parse_mesh(text: str) -> MeshConfig:
    """Reads `data=2,fsdp=4,tensor=2`; axes not named are 1.

    Raises:
        ConfigError: an axis is unknown or its size is not a number.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    parts = [part.partition("=") for part in text.split(",")]
    if len({axis for axis, _, _ in parts}) < len(parts):
        raise ConfigError(f"--mesh {text}: names an axis twice")
    for axis, equals, size in parts:
        part = axis + equals + size
        if axis not in sizes or not re.fullmatch(r"-?\d{1,9}", size):
            raise ConfigError(f"--mesh {text}: expected AXIS=NUMBER of {', '.join(sizes)}, got {part!r}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def search_space(
    config: Config, devices: int, *, step: StepKind = "train", batch_size: int | None = None
) -> Iterator[Config]:
    """Candidates: every mesh whose axes are powers of two, batch size and, for training, remat policy.

    Args:
        config: the run to lay out.
        devices: chips of the machine; where they are no power of two, `data` takes the odd factor.
        step: planning keeps nothing for a backward pass: its remat policy stays.
        batch_size: the only one to try; None tries one, two and four times the config's, and one, two and
            four samples a chip.
    """
    powers = [1 << shift for shift in range(devices.bit_length()) if (1 << shift) <= devices]
    meshes = [
        MeshConfig(devices // (fsdp * tensor), fsdp, tensor)
        for tensor in powers
        for fsdp in powers
        if devices % (fsdp * tensor) == 0 and config.model.vlm.decoder.num_heads % tensor == 0
    ]
    sizes = [batch_size] if batch_size else []
    if not sizes:
        sizes = sorted({base * times for base in (config.train.batch_size, devices) for times in (1, 2, 4)})
    policies = POLICIES if step == "train" else (config.model.compute.remat,)
    for policy, size, mesh in itertools.product(policies, sizes, meshes):
        if size % (mesh.data * mesh.fsdp):
            continue
        compute = dataclasses.replace(config.model.compute, remat=policy)
        yield dataclasses.replace(
            config,
            mesh=mesh,
            model=dataclasses.replace(config.model, compute=compute),
            train=dataclasses.replace(config.train, batch_size=size),
        )


def search(
    candidates: Iterable[Config],
    topology: Topology,
    *,
    step: StepKind = "train",
    limit: int,
    results: Path | None = None,
) -> Iterator[Trial]:
    """Compiles candidates, the most promising (`estimate`) first.

    Compiling takes minutes, so what cannot fit is left out before: by its shapes (`make_plan`), or because
    the same mesh did not hold a smaller batch or a policy that keeps less.

    Args:
        candidates: from `search_space`.
        topology: from `describe`.
        step: which step.
        limit: most programs to compile; candidates refused, left out or known do not count.
        results: JSON file of plans. Finished ones are added to it; those of the same config, machine and
            versions are taken from it instead of being compiled again.

    Raises:
        DataError: `results` is something else.
    """
    finished = read_results(results) if results is not None else {}
    known = set(finished)
    too_large: list[Config] = []
    compiled = 0
    for config in sorted(candidates, key=lambda config: estimate(config, topology)):
        smaller = next((other for other in too_large if _takes_more(config, than=other)), None)
        if smaller is not None:
            yield Trial(config, None, f"takes more than batch {_layout(smaller)}, which does not fit")
            continue
        key = result_key(config, topology, step)
        plan = finished.get(key)
        if plan is None:
            if compiled == limit:
                continue
            try:
                plan = make_plan(config, topology, step=step)
            except SpaceDriveError as error:
                yield Trial(config, None, str(error))
                continue
            compiled += plan.compile_seconds > 0
            finished[key] = plan
            if results is not None:
                _write_results(results, finished)
        if not plan.fits:
            too_large.append(config)
        yield Trial(config, plan, known=key in known)


def estimate(config: Config, topology: Topology) -> float:
    """A guess, without compiling, at the seconds of a training step per sample: what to try first.

    Arithmetic at the chip's peak and, one after the other, the bytes that the decoder sends: its weights
    twice (for the forward and the backward pass, recomputed or not) around `fsdp`, the residual stream four
    times a block and pass around `tensor`. Where the machine's rates are not known, those of a v5e.
    """
    chip = topology.chip or CHIPS["v5e"]
    decoder, compute, mesh = config.model.vlm.decoder, config.model.compute, config.mesh
    flops = train_step_flops(config)
    head = decoder.head_dim * (2 * decoder.num_heads + 2 * decoder.num_kv_heads)
    weights = decoder.num_layers * decoder.hidden_size * (head + 3 * decoder.intermediate_size)
    gathered = 2 * weights * compute.weight_bits // 8 // mesh.tensor * (mesh.fsdp - 1) // mesh.fsdp
    samples = config.train.batch_size / (mesh.data * mesh.fsdp)
    stream = samples * config.data.sequence_length * decoder.hidden_size * compute.activation_dtype.itemsize
    passes = 3 if compute.remat == "full" else 2
    sent = 4 * passes * decoder.num_layers * stream * (mesh.tensor - 1) / mesh.tensor
    arithmetic = flops.hardware / len(topology.devices) / chip.peak_flops
    return (arithmetic + (gathered + sent) / chip.interconnect) / config.train.batch_size


def cost(plan: Plan) -> float:
    """What to rank by: seconds of a step per sample, or bytes moved where no rates are known."""
    return (plan.step_seconds or plan.moved_bytes) / plan.batch_size


def result_key(config: Config, topology: Topology, step: StepKind) -> str:
    """Names one plan: the same config, machine, step and versions give the same."""
    names = ("jax", "jaxlib", "libtpu") if topology.chip is not None else ("jax", "jaxlib")
    versions = {name: metadata.version(name) for name in names}
    whole = json.dumps([to_json(config), topology.name, step, versions])
    return hashlib.sha256(whole.encode()).hexdigest()


def read_results(file: Path) -> dict[str, Plan]:
    """Plans of earlier searches by `result_key`.

    Raises:
        DataError: the file is something else.
    """
    if not file.exists():
        return {}
    try:
        return read_typed(file, dict[str, Plan], most=MOST_JSON)
    except DataError as error:
        raise DataError(f"{file} does not hold plans of a search ({error}): choose another file") from error


def _write_results(file: Path, plans: dict[str, Plan]) -> None:
    write_json(file, {key: dataclasses.asdict(plan) for key, plan in plans.items()}, indent=1)


def _takes_more(config: Config, *, than: Config) -> bool:
    rank = POLICIES.index
    return (
        config.mesh == than.mesh
        and config.train.batch_size >= than.train.batch_size
        and rank(config.model.compute.remat) >= rank(than.model.compute.remat)
    )


def _layout(config: Config) -> str:
    mesh = config.mesh
    sizes = f"data={mesh.data},fsdp={mesh.fsdp},tensor={mesh.tensor}"
    return f"{config.train.batch_size} remat {config.model.compute.remat} on {sizes}"


def one_line(plan: Plan) -> str:
    """A plan as one row of a table."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    mfu = "" if plan.mfu_bound is None else f"  MFU<= {plan.mfu_bound:.0%}"
    time = "" if plan.step_seconds is None else f"  step>= {_time(plan.step_seconds)}"
    fits = "fits" if plan.fits else "too large"
    return (
        f"{mesh}  batch {plan.batch_size}  remat {plan.remat}  peak {_bytes(plan.peak_bytes)}  {fits}"
        f"{time}{mfu}"
    )


def trial_line(trial: Trial) -> str:
    """What became of one candidate of a search."""
    if trial.plan is None:
        mesh, train = trial.config.mesh, trial.config.train
        sizes = f"data={mesh.data},fsdp={mesh.fsdp},tensor={mesh.tensor}"
        remat = trial.config.model.compute.remat
        return f"{sizes}  batch {train.batch_size}  remat {remat}  left out: {trial.refusal}"
    if not trial.plan.fits:
        return f"{one_line(trial.plan)}: {trial.plan.reason}"
    source = "known" if trial.known else f"compiled in {trial.plan.compile_seconds:.0f} s"
    return f"{one_line(trial.plan)}  {source}"


def describe_plan(plan: Plan) -> str:
    """A plan as a page of text."""

    def size(count: int) -> str:
        return f"{_bytes(count):>13}"

    rows = [
        f"{plan.topology}, {plan.chips} chips; {plan.step} step, batch {plan.batch_size}, "
        f"mesh {plan.mesh}, remat {plan.remat}",
        "per chip:",
        f"  parameters          {size(plan.parameter_bytes)}",
        f"  optimizer           {size(plan.optimizer_bytes)}",
        f"  batch               {size(plan.batch_bytes)}",
        f"  temporaries         {size(plan.temporary_bytes)}",
        f"    kept at least     {size(plan.activation_bytes)}",
        f"  peak                {size(plan.peak_bytes)}"
        + ("" if plan.hbm_bytes is None else f" of {_bytes(plan.hbm_bytes)}"),
        f"  moved in memory     {size(plan.moved_bytes)} a step",
    ]
    rows += [f"  {each.kind:<19} {size(each.bytes)} a step in {each.count} runs" for each in plan.collectives]
    rows += [
        f"  {each.kind + ', DCN':<19} {size(each.bytes)} a step in {each.count} runs"
        for each in plan.dcn_collectives
    ]
    if plan.flops_per_chip is not None and plan.hardware_flops_per_chip is not None:
        recomputed = plan.hardware_flops_per_chip - plan.flops_per_chip
        rows.append(
            f"  model FLOPs         {plan.flops_per_chip:13.3e} a step"
            + (f", and {recomputed:.3e} of recomputation" if recomputed else "")
        )
    if plan.step_seconds is not None:
        rows.append(f"step time at least {_time(plan.step_seconds)}, MFU at most {plan.mfu_bound:.1%}")
    rows.append(
        f"compiled in {plan.compile_seconds:.0f} s; "
        + ("fits" if plan.fits else f"does not fit: {plan.reason}")
    )
    return "\n".join(rows)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3f} {unit}"
    return f"{count / 1e3:.3f} kB"


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.3f} ms"


COMPILED = 4
"""Programs that are compiled at most; each takes a minute at 7B."""
MORE_DEVICES = "--mesh.data 1 --mesh.fsdp -1"
"""Flags that spread a run's weights over all devices there are; `data` takes them all by default."""


def device_memory() -> int | None:
    """Bytes that one of this process's devices has; None where it does not say.

    CPU devices share the machine's memory.
    """
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    return None


def least_bytes(config: Config) -> int:
    """What a training step takes at least on one device, by its shapes alone."""
    mesh = make_mesh(config.mesh)
    step = make_train_step(config, mesh)
    state = bytes_per_device((step.trainable, step.frozen, step.optimizer_state))
    return state + residual_bytes(config, mesh) + product_bytes(config, mesh)


def what_fits(config: Config, limit: int | None = None) -> str:
    """Flags under which a run's training step fits its devices, the cheapest first.

    Args:
        config: the run that did not fit.
        limit: bytes of one device; None for what this process's devices have.

    Returns:
        What to do, for an error; empty where the devices do not say how much memory they have.
    """
    limit = device_memory() if limit is None else limit
    if limit is None:
        return ""
    log.info("looking for what fits: compiling up to %d smaller steps", COMPILED)
    topology = Topology("these devices", None, tuple(jax.devices()))
    compiled, tried = 0, []
    for flags, smaller in _smaller(config):
        try:
            needed: float = least_bytes(smaller)
            if needed <= limit:
                if compiled == COMPILED:
                    continue  # may fit; its least bytes are no account of it
                compiled += 1
                needed = make_plan(smaller, topology).peak_bytes
                if needed <= limit:
                    return (
                        f"{' '.join(flags)} fits: by `aot`'s account a step then takes {needed / 1e9:.1f} GB "
                        f"of a device's {limit / 1e9:.1f} GB"
                    )
        except (SpaceDriveError, jax.errors.JaxRuntimeError):
            continue  # one that these devices cannot even compile
        tried.append(needed)
    if tried:
        found = (
            f"nothing that was tried fits a device's {limit / 1e9:.1f} GB (the smallest step takes "
            f"{min(tried) / 1e9:.1f} GB)"
        )
    else:
        found = f"there is no smaller step of this batch to try on a device's {limit / 1e9:.1f} GB"
    return (
        f"{found}: use more devices ({MORE_DEVICES}) or larger ones; `aot CONFIG --topology CHIP:SHAPE "
        "--search` finds which"
    )


def _smaller(config: Config) -> Iterator[tuple[list[str], Config]]:
    """Configs that learn the same from the same batches in less memory."""
    mesh = make_mesh(config.mesh)
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    flags: list[str] = []
    if config.model.compute.remat != "full":
        config = change(config, config.name, {"model.compute.remat": "full"})
        flags = ["--model.compute.remat full"]
        yield flags, config
    quantized = [config.model.compute.base_quantization]
    if quantized == ["none"] and config.model.use_lora:
        quantized += ["int8", "int4"]
    for storage in quantized:
        stored = change(config, config.name, {"model.compute.base_quantization": storage})
        told = flags + ([f"--model.compute.base-quantization {storage}"] if storage != quantized[0] else [])
        pieces = config.train.grad_accum_steps
        if storage != quantized[0]:
            yield told, stored
        while config.train.batch_size % (2 * pieces * ways) == 0:
            pieces *= 2
            train = dataclasses.replace(stored.train, grad_accum_steps=pieces)
            yield [*told, f"--train.grad-accum-steps {pieces}"], dataclasses.replace(stored, train=train)
