"""What a training run says on stderr: one line when it starts and one every logging interval."""

from __future__ import annotations

from collections.abc import Mapping

from tqdm import tqdm


def opening_line(
    *, name: str, trainable: int, frozen: int, keyframes: int, batch_size: int, start: int, steps: int
) -> str:
    """What is about to be trained on what.

    Args:
        name: of the config.
        trainable: parameters that train.
        frozen: parameters that do not.
        keyframes: training keyframes.
        batch_size: samples a step.
        start: steps done before.
        steps: where the run ends.
    """
    since = f"resumed behind step {start}" if start else "from the start"
    return (
        f"{name}: {trainable:,} parameters train, {frozen:,} are frozen; {keyframes:,} keyframes, "
        f"{batch_size} a step; {since} to {steps}. The first step compiles."
    )


def interval_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """Where the run stands.

    Args:
        step: steps done.
        steps: where the run ends.
        values: the metrics of that step and its window, as in metrics.jsonl.
    """
    left = tqdm.format_interval((steps - step) * values["step_seconds"])
    mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
    return (
        f"step {step}/{steps}: loss {values['loss']:.4f} (language {values['loss_language']:.4f}, position "
        f"{values['loss_position']:.4f}), L2 {values['displacement_m']:.2f} m, gradient "
        f"{values['grad_norm']:.2f}, rate {values['learning_rate']:.2e}, "
        f"{values['samples_per_second']:.1f} samples/s{mfu}, {values['data_wait']:.1%} waiting for data, "
        f"{left} left"
    )
