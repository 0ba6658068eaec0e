"""AdamW as in the published run: groups with their own rates, warm-up into a cosine, one global clip."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spacedrive_jax.config import TrainConfig

NOT_DECAYED = ("bias", "scale", "alpha")
"""Names of vectors and scalars, which have no weight decay. (Stacked over layers they look like matrices.)"""


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Base rate per step: cosine over the whole run, times a linear warm-up at its start.

    The warm-up multiplies the cosine rather than preceding it, as in the published trainer.
    """

    def schedule(step: Any) -> Any:
        progress = jnp.clip(step / config.steps, 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        decayed = config.final_fraction + (1.0 - config.final_fraction) * cosine
        warm = jnp.clip(step / max(config.warmup_steps, 1), 0.0, 1.0)
        return config.learning_rate * decayed * (config.warmup_start + (1.0 - config.warmup_start) * warm)

    return schedule


def make_optimizer(config: TrainConfig, trainable: Any) -> optax.GradientTransformation:
    """The optimiser for a tree of trainables.

    Args:
        config: rates and decay.
        trainable: the tree (values are not read); its paths decide groups and decay.
    """

    def group(path: Any, _: Any) -> str:
        return "vlm" if _names(path)[0] == "vlm" else "heads"

    def decays(path: Any, _: Any) -> bool:
        return _names(path)[-1] not in NOT_DECAYED

    groups = jax.tree_util.tree_map_with_path(group, trainable)
    decayed = jax.tree_util.tree_map_with_path(decays, trainable)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.multi_transform(
            {"vlm": optax.scale(config.vlm_lr_mult), "heads": optax.scale(config.head_lr_mult)}, groups
        ),
        optax.scale_by_learning_rate(learning_rate(config)),
        optax.identity() if config.ema_decay is None else moving_average(config.ema_decay),
    )


class MovingAverageState(NamedTuple):
    """The average of the trainables, float32, same tree."""

    average: Any


def moving_average(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the updated trainables; passes updates on unchanged.

    It stands last in the chain, where updates are what will be added. It starts at the first trainables.

    Args:
        decay: share of the old average in the new one.
    """

    def start(trainable: Any) -> MovingAverageState:
        return MovingAverageState(jax.tree.map(jnp.array, trainable))

    def update(updates: Any, state: MovingAverageState, trainable: Any) -> tuple[Any, MovingAverageState]:
        average = jax.tree.map(
            lambda mean, old, change: decay * mean + (1.0 - decay) * (old + change),
            state.average,
            trainable,
            updates,
        )
        return updates, MovingAverageState(average)

    return optax.GradientTransformation(start, update)


def _names(path: Any) -> list[str]:
    """The plain names along a key path, without the wrappers of variables."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return [name for name in names if name not in ("value", "raw_value")]
