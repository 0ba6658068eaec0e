"""Plans as text."""

from __future__ import annotations

from spacedrive_jax.scaling.plan import Plan
from spacedrive_jax.scaling.search import Trial


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
