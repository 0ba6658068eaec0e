"""Building blocks of vision towers and language model: norms, linear projection with optional LoRA, SwiGLU.

Every parameter carries the logical names of its axes (`nnx.get_partition_spec` reads them). They are
plain metadata: nothing is placed on devices here; `training/sharding.py` maps the names to mesh axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.partitioning import AxisNames, constrain, without_fsdp
from spacedrive_jax.models.quantization import dequantize, kind_of, quantize, scale_names

# Layers stacked into one: parameters with a leading layer axis, applied by `jax.lax.scan`.
#
# Tracing and compiling one block serves all of them, so compile time does not grow with depth.


Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")


def stack_layers(build: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """Builds `count` independent layers as one module.

    Args:
        build: constructor of one layer from its random streams.
        count: number of layers.
        rngs: random streams; each layer draws from its own split.

    Returns:
        A module like one layer, whose every parameter has a leading axis named `layers`. It is not callable
        as it stands: `scan_layers` applies it.
    """
    vmapped = nnx.vmap(
        build, in_axes=0, out_axes=0, axis_size=count, transform_metadata={nnx.PARTITION_NAME: "layers"}
    )
    return nnx.split_rngs(splits=count)(vmapped)(rngs)


def scan_layers(
    stacked: Layer,
    apply: Callable[[Layer, Carry, Any], tuple[Carry, Any]],
    carry: Carry,
    per_layer: Any,
    compute: ComputeConfig,
    *,
    unroll: bool = False,
) -> tuple[Carry, Any]:
    """Applies stacked layers one after the other.

    Args:
        stacked: the module that `stack_layers` returned.
        apply: one layer's step: (layer, carry, this layer's inputs) to (carry, output).
        carry: what flows from layer to layer.
        per_layer: pytree of arrays with a leading layer axis, sliced for each step.
        compute: names the rematerialisation policy.
        unroll: writes the layers out instead of looping: for few small ones. XLA's CPU backend runs
            convolutions inside a loop's backward pass some ten times slower than outside.

    Returns:
        The last carry and the outputs, stacked over layers.
    """
    graph, state = nnx.split(stacked)

    def step(carry: Carry, inputs: tuple[Any, Any]) -> tuple[Carry, Any]:
        layer_state, layer_inputs = inputs
        return apply(nnx.merge(graph, layer_state), carry, layer_inputs)

    if compute.remat != "none":
        # Inside a scan nothing can be merged across the checkpoint's boundary, so CSE need not be barred.
        step = jax.checkpoint(step, policy=compute.remat_policy(), prevent_cse=False)
    if not unroll:
        return jax.lax.scan(step, carry, (state, per_layer))
    # `jax.lax.scan(unroll=True)` would keep a loop of one turn.
    outputs = []
    for layer in range(jax.tree.leaves(state)[0].shape[0]):
        carry, output = step(carry, jax.tree.map(lambda array: array[layer], (state, per_layer)))  # noqa: B023
        outputs.append(output)
    return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)


Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

INIT_STD = 0.02
"""Standard deviation of freshly drawn weights (transformers' initializer_range)."""


def weight_initializer(compute: ComputeConfig, inputs: int) -> Initializer:
    """How fresh weights of a linear map or a table are drawn.

    Args:
        compute: says by which rule (`ComputeConfig.init`).
        inputs: numbers that each output is a sum over.
    """
    return jax.nn.initializers.normal(INIT_STD if compute.init == "fixed" else 1.0 / math.sqrt(inputs))


def parameter(
    kind: type[nnx.Param],
    initializer: Initializer,
    shape: tuple[int, ...],
    names: AxisNames,
    *,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Param:
    """Draws one parameter and labels its axes.

    Args:
        kind: `nnx.Param` or the subclass that tells trainables from the frozen base.
        initializer: as in `jax.nn.initializers`.
        shape: shape, without the layer axis that stacking adds in front.
        names: logical axis names, one per axis (None: never sharded).
        dtype: storage type.
        rngs: source of the key (stream `params`).

    Returns:
        The variable, its names in the metadata `out_sharding`.
    """
    value = initializer(rngs.params(), shape, dtype)
    # Eager sharding would read the logical names as mesh axes as soon as a mesh is set.
    return kind(value, out_sharding=names, eager_sharding=False)


def layer_scaled(x: Float[Array, "*B D"], scale: nnx.Param | None) -> Float[Array, "*B D"]:
    """A branch times its learnt gains (LayerScale, Touvron et al. 2021), where a block has them."""
    return x if scale is None else x * jax.lax.broadcast_to_rank(scale[...].astype(x.dtype), x.ndim)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(
        self, features: int, eps: float, *, name: str | None, compute: ComputeConfig, rngs: nnx.Rngs
    ) -> None:
        self.scale = parameter(
            nnx.Param, jax.nn.initializers.ones, (features,), (name,), dtype=compute.storage_dtype, rngs=rngs
        )
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Scales each vector to unit root mean square, then by the learnt gains; keeps the dtype."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = jax.lax.broadcast_to_rank(self.scale[...].astype(jnp.float32), x.ndim)
        return (normed * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with gain and bias (Ba et al. 2016), computed in float32."""

    def __init__(
        self, features: int, eps: float, *, name: str | None, compute: ComputeConfig, rngs: nnx.Rngs
    ) -> None:
        make = functools.partial(
            parameter, nnx.Param, shape=(features,), names=(name,), dtype=compute.storage_dtype, rngs=rngs
        )
        self.scale = make(jax.nn.initializers.ones)
        self.bias = make(jax.nn.initializers.zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Brings each vector to mean 0 and variance 1, then applies gains and biases; keeps the dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scale, bias = (
            jax.lax.broadcast_to_rank(each[...].astype(jnp.float32), x.ndim)
            for each in (self.scale, self.bias)
        )
        return (normed * scale + bias).astype(x.dtype)


def contract(x: Float[Array, "..."], kernel: Float[Array, "..."], in_axes: int) -> Float[Array, "..."]:
    """Contracts the last `in_axes` axes of `x` with the first `in_axes` axes of `kernel`."""
    return jnp.tensordot(x, kernel, axes=in_axes)


class LowRankAdapter(nnx.Module):
    """The trainable low-rank term of one projection: scaling * B(A(dropout(x))), in float32."""

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        in_names: AxisNames,
        out_names: AxisNames,
        *,
        lora: LoraConfig,
        rngs: nnx.Rngs,
    ) -> None:
        # PEFT's initialisation: A uniform in +-1/sqrt(fan_in), B zero, so training starts at the base model.
        bound = 1.0 / math.sqrt(math.prod(in_shape))
        uniform = functools.partial(_uniform, bound=bound)
        make = functools.partial(parameter, nnx.LoRAParam, dtype=jnp.float32, rngs=rngs)
        self.a = make(uniform, (*in_shape, lora.rank), (*in_names, "lora"))
        self.b = make(jax.nn.initializers.zeros, (lora.rank, *out_shape), ("lora", *out_names))
        self.in_axes = len(in_shape)
        self.scaling = lora.scaling
        self.dropout = lora.dropout

    def __call__(self, x: Float[Array, "..."], dropout_key: jax.Array | None) -> Float[Array, "..."]:
        """Returns the term to add to the base projection of `x`; `dropout_key` None keeps every input."""
        x = x.astype(jnp.float32)
        if dropout_key is not None and self.dropout > 0:
            # The barrier keeps the random bits out of the products' own kernels, in which they would be drawn
            # again for every tile and take the TPU compiler a minute each.
            keep = jax.lax.optimization_barrier(
                jax.random.bernoulli(dropout_key, 1.0 - self.dropout, x.shape)
            )
            x = jnp.where(keep, x / (1.0 - self.dropout), 0.0)
        return contract(contract(x, self.a[...], self.in_axes), self.b[...], 1) * self.scaling


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any, *, bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


class Projection(nnx.Module):
    """A linear map between (possibly multi-axis) feature shapes, with optional bias and LoRA.

    Where `compute.base_quantization` says so the kernel is stored as integers, with `kernel_scale` beside it.

    Keeping heads and head channels as axes of their own lets both be named and sharded.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        in_names: AxisNames,
        out_names: AxisNames,
        *,
        bias: bool,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
        lora: LoraConfig | None = None,
    ) -> None:
        drawn = weight_initializer(compute, math.prod(in_shape))
        make = functools.partial(parameter, nnx.Param, dtype=compute.storage_dtype, rngs=rngs)
        kernel = make(drawn, (*in_shape, *out_shape), (*in_names, *out_names))
        self.kernel, self.kernel_scale = kernel, None
        if compute.base_quantization != "none":
            kind = compute.base_quantization
            levels, scale = quantize(kernel[...], kind, len(in_shape))
            names = scale_names(kind, in_names, out_names)
            self.kernel = nnx.Param(levels, out_sharding=(*in_names, *out_names), eager_sharding=False)
            self.kernel_scale = nnx.data(nnx.Param(scale, out_sharding=names, eager_sharding=False))
            self.kernel_names = without_fsdp((*in_names, *out_names))
            self.scale_names = without_fsdp(names)
        self.bias = make(jax.nn.initializers.zeros, out_shape, out_names) if bias else None
        self.adapter = (
            None
            if lora is None
            else LowRankAdapter(in_shape, out_shape, in_names, out_names, lora=lora, rngs=rngs)
        )
        self.in_axes = len(in_shape)
        self.dtype = compute.activation_dtype

    def __call__(
        self, x: Float[Array, "..."], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "..."]:
        """Maps the last axes of `x` from the input shape to the output shape, in the compute dtype."""
        y = self._product(x.astype(self.dtype))
        if self.bias is not None:
            y = y + jax.lax.broadcast_to_rank(self.bias[...].astype(self.dtype), y.ndim)
        if self.adapter is not None:
            y = (y.astype(jnp.float32) + self.adapter(x, dropout_key)).astype(self.dtype)
        return y

    def _product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.kernel_scale is None:
            return contract(x, self.kernel[...].astype(self.dtype), self.in_axes)
        # Gathered over fsdp as it is stored: left to itself, the partitioner sends what it was turned into.
        levels = constrain(self.kernel[...], *self.kernel_names)
        scale = constrain(self.kernel_scale[...], *self.scale_names)
        if kind_of(levels) == "int4":  # a scale for every block of inputs: the product needs the weights
            return contract(x, dequantize(levels, scale, self.dtype), self.in_axes)
        y = contract(x, levels.astype(self.dtype), self.in_axes)
        steps = jax.lax.broadcast_to_rank(scale.astype(jnp.float32), y.ndim)
        return (y.astype(jnp.float32) * steps).astype(self.dtype)


class SwiGLU(nnx.Module):
    """Gated feed-forward block: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(
        self,
        features: int,
        hidden: int,
        names: tuple[str, str],
        *,
        bias: bool,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
        lora: LoraConfig | None = None,
        activations: AxisNames = (),
    ) -> None:
        """Draws a block.

        Args:
            features: D.
            hidden: width between the products.
            names: logical axis names of the two.
            bias: whether the projections have biases.
            compute: dtypes.
            rngs: random streams (`params`).
            lora: adapters on the projections that it names; None for none.
            activations: logical axis names of what lies between the products; () leaves it open.
        """
        self.activations = activations
        outer, inner = names
        make = functools.partial(Projection, bias=bias, compute=compute, rngs=rngs)
        gate, up, down = (None,) * 3 if lora is None else map(lora.on, ("gate", "up", "down"))
        self.gate = make((features,), (hidden,), (outer,), (inner,), lora=gate)
        self.up = make((features,), (hidden,), (outer,), (inner,), lora=up)
        self.down = make((hidden,), (features,), (inner,), (outer,), lora=down)

    def __call__(
        self, x: Float[Array, "... D"], dropout_keys: Key[Array, " 3"] | None = None
    ) -> Float[Array, "... D"]:
        """Applies the block to each vector; the keys are for the adapters' dropout."""
        gate_key, up_key, down_key = (None,) * 3 if dropout_keys is None else dropout_keys
        gate, up = self.gate(x, dropout_key=gate_key), self.up(x, dropout_key=up_key)
        if self.activations:
            gate, up = constrain(gate, *self.activations), constrain(up, *self.activations)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return self.down(jax.nn.silu(gate) * up, dropout_key=down_key)
