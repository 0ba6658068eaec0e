"""The optimiser of the published run against its definition, written out in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spacedrive_jax.config import TrainConfig
from spacedrive_jax.training.state import learning_rate, make_optimizer

# Short enough to see warm-up and cosine, and a thousand times the rate, lest float32 lose the changes;
# everything else as published.
CONFIG = TrainConfig(steps=8, warmup_steps=3, learning_rate=5e-2)
SHAPES = {
    ("vlm", "decoder", "lora_a"): (4, 3),
    ("vlm", "decoder", "norm", "scale"): (2, 4),  # stacked over layers: a vector each
    ("decoder", "hidden", "kernel"): (3, 3),
    ("decoder", "hidden", "bias"): (3,),
    ("encoder", "alpha"): (),
}
GROUPS = {"vlm": 0.1, "decoder": 4.0, "encoder": 4.0}
DECAYED = {("vlm", "decoder", "lora_a"), ("decoder", "hidden", "kernel")}


def tree_of(values):
    tree = {}
    for path, value in values.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jnp.asarray(value, jnp.float32)
    return tree


def leaf(tree, path):
    for name in path:
        tree = tree[name]
    return np.asarray(tree)


def published_rate(step):
    """Cosine to 1e-3 of the peak over the run, times a linear warm-up from a third."""
    cosine = 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * step / CONFIG.steps))
    return 5e-2 * cosine * (1 / 3 + 2 / 3 * min(step / CONFIG.warmup_steps, 1.0))


def test_without_warm_up_the_first_step_has_the_whole_rate():
    config = dataclasses.replace(CONFIG, warmup_steps=0)
    for step in (0, 1, 8):
        expected = published_rate(step) / (1 / 3 + 2 / 3 * min(step / 3, 1.0))
        np.testing.assert_allclose(learning_rate(config)(step), expected, rtol=1e-6)


def by_definition(values, gradients):
    """AdamW (Loshchilov and Hutter 2019) in float64, one step per item of `gradients`."""
    values = {path: value.astype(np.float64) for path, value in values.items()}
    first = {path: np.zeros_like(value) for path, value in values.items()}
    second = {path: np.zeros_like(value) for path, value in values.items()}
    for step, gradient in enumerate(gradients):
        norm = math.sqrt(sum(np.sum(np.square(each)) for each in gradient.values()))
        shrink = min(1.0, 35.0 / norm)
        for path, value in values.items():
            grad = shrink * gradient[path]
            first[path] = 0.9 * first[path] + 0.1 * grad
            second[path] = 0.999 * second[path] + 0.001 * np.square(grad)
            mean = first[path] / (1 - 0.9 ** (step + 1))
            spread = np.sqrt(second[path] / (1 - 0.999 ** (step + 1)))
            decay = 1e-4 * value if path in DECAYED else 0.0
            rate = published_rate(step) * GROUPS[path[0]]
            values[path] = value - rate * (mean / (spread + 1e-8) + decay)
    return values


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    # Large values, so that decay is not lost beside Adam's unit steps.
    values = {path: np.asarray(rng.normal(0.0, 300.0, shape)) for path, shape in SHAPES.items()}
    sizes = (1.0, 100.0, 0.1, 1.0, 30.0, 1e-3)  # some norms above the clip, some below
    gradients = [
        {path: np.asarray(rng.normal(0.0, size, shape)) for path, shape in SHAPES.items()} for size in sizes
    ]
    return values, gradients


def steps_of(config, values, gradients):
    trainable = tree_of(values)
    optimizer = make_optimizer(config, trainable)
    state = optimizer.init(trainable)
    yield trainable, state
    for gradient in gradients:
        updates, state = optimizer.update(tree_of(gradient), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        yield trainable, state


def test_updates_are_adamw_in_the_published_groups(problem):
    values, gradients = problem
    *_, (trainable, _) = steps_of(CONFIG, values, gradients)
    for path, expected in by_definition(values, gradients).items():
        start = np.float32(values[path])
        # The change, not the value: that is what a wrong rate, group or decay would alter.
        np.testing.assert_allclose(
            leaf(trainable, path) - start, expected - start, rtol=1e-3, atol=2e-4, err_msg=str(path)
        )


def test_a_wrong_group_decay_or_clip_would_show(problem):
    values, gradients = problem
    expected = by_definition(values, gradients)
    for change in (
        {"vlm_lr_mult": 1.0},
        {"head_lr_mult": 1.0},
        {"weight_decay": 0.0},
        {"beta2": 0.99},
        {"clip_norm": 3500.0},
    ):
        *_, (trainable, _) = steps_of(dataclasses.replace(CONFIG, **change), values, gradients)
        differs = [
            not np.allclose(leaf(trainable, path) - start, value - start, rtol=1e-3, atol=2e-4)
            for path, value in expected.items()
            for start in (np.float32(values[path]),)
        ]
        assert any(differs), change


def test_the_rate_warms_up_from_a_third_and_ends_at_a_thousandth():
    config = TrainConfig()
    assert (config.learning_rate, config.warmup_steps, config.clip_norm) == (5e-5, 500, 35.0)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.999, 1e-4)
    assert (config.vlm_lr_mult, config.head_lr_mult) == (0.1, 4.0)
    rate = learning_rate(config)
    np.testing.assert_allclose(rate(0), 5e-5 / 3, rtol=1e-6)
    np.testing.assert_allclose(rate(config.steps), 5e-8, rtol=1e-3)
    assert max(range(0, config.steps, 100), key=lambda step: float(rate(step))) == 500
    short = learning_rate(CONFIG)
    np.testing.assert_allclose(
        [short(step) for step in range(9)], [published_rate(step) for step in range(9)], rtol=1e-5
    )


def test_the_average_follows_the_weights(problem):
    values, gradients = problem
    config = dataclasses.replace(CONFIG, ema_decay=0.75, learning_rate=10.0)
    (first, _), *steps = steps_of(config, values, gradients)
    expected = first
    for trainable, state in steps:
        expected = jax.tree.map(lambda mean, new: 0.75 * mean + 0.25 * new, expected, trainable)
        found = optax.tree.get(state, "average")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
