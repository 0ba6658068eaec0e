"""The frozen base in eight or four bits a weight: integers, and scales that turn them back.

`int8` has one scale for every output channel (Dettmers et al. 2022, without outliers); `int4` one for every
block of up to 64 weights along the input (Dettmers et al. 2023, with evenly spaced levels). Both are
symmetric: weight = integer * scale. Scales are rounded to bfloat16 before the integers are worked out from
them, so that a weight read back is exact in float32 and quantises to the same bits again.

Integers of four bits are stored in pairs, offset by 8: the first half of a block in the low bits of its
bytes, the second half in the high ones. (JAX's own `int4` is unpacked by XLA's CPU backend for a whole stack
of layers at once.)

The functions take numpy's arrays and JAX's alike. numpy's are what a checkpoint is read with: every operation
is rounded as IEEE 754 says, so the bits do not depend on the machine.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Integer, Num, UInt8

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.partitioning import AxisNames

Shape = tuple[int, ...]
Quantization = Literal["int8", "int4"]

BLOCK = 64
"""Most weights that share a scale where they are quantised block by block."""
_SMALLEST_BLOCK = 4
_LARGEST = {"int8": 127, "int4": 7}
_OFFSET = 8
SCALE_TYPE = np.dtype(ml_dtypes.bfloat16)


def block_size(width: int) -> int:
    """The largest even divisor of an input axis that is at most `BLOCK`.

    Raises:
        ConfigError: it has none but 2.
    """
    size = next((size for size in range(BLOCK, _SMALLEST_BLOCK - 1, -2) if width % size == 0), None)
    if size is None:
        raise ConfigError(
            f"a projection of {width} inputs cannot be cut into even blocks of {_SMALLEST_BLOCK} to {BLOCK}: "
            "set model.compute.base_quantization to int8"
        )
    return size


def kind_of(levels: Any) -> Quantization:
    """Which of the two an array of integers is."""
    return "int4" if levels.dtype == np.uint8 else "int8"


def kernel_shape(levels: Any, in_axes: int) -> Shape:
    """Shape of the kernel that an array of integers stands for.

    Args:
        levels: from `quantize`, or its description.
        in_axes: how many input axes there are, counted behind those of stacked layers.
    """
    shape = list(levels.shape)
    if kind_of(levels) == "int4":
        shape[in_axes - 1] *= 2
    return tuple(shape)


def scale_names(kind: Quantization, in_names: AxisNames, out_names: AxisNames) -> AxisNames:
    """Logical axis names of a kernel's scales: the output's for `int8`, all of the kernel's for `int4`."""
    return out_names if kind == "int8" else (*in_names, *out_names)


def scales(kernel: Float[Any, "..."], kind: Quantization, in_axes: int) -> Float[Any, "..."]:
    """The scales of `quantize` alone."""
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    wide = kernel.astype(np.float32)
    blocked, axes = (wide, tuple(range(in_axes))) if kind == "int8" else (_blocks(wide, in_axes), (in_axes,))
    return (xp.max(xp.abs(blocked), axis=axes) / np.float32(_LARGEST[kind])).astype(SCALE_TYPE)


def quantize(
    kernel: Float[Any, "..."], kind: Quantization, in_axes: int
) -> tuple[Integer[Any, "..."], Float[Any, "..."]]:
    """Rounds a kernel to integers.

    Args:
        kernel: input axes first, then output axes; finite.
        kind: see the module.
        in_axes: how many input axes there are.

    Returns:
        The integers, int8 in the kernel's shape, or uint8 with the last input axis halved; and the scales,
        bfloat16, in the shape of the output, with `int4` behind that of the input, its last axis cut into
        blocks.
    """
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    wide, scale = kernel.astype(np.float32), scales(kernel, kind, in_axes)
    step = xp.where(scale == 0, 1, scale).astype(np.float32)
    step = xp.expand_dims(step, tuple(range(in_axes)) if kind == "int8" else in_axes)
    if kind == "int4":
        wide = _blocks(wide, in_axes)
    # The scale was rounded: the largest weight may lie up to a quarter of a step beyond the last integer.
    levels = xp.clip(xp.rint(wide / step), -_LARGEST[kind], _LARGEST[kind]).astype(np.int8)
    if kind == "int8":
        return levels, scale
    low, high = xp.split((levels + _OFFSET).astype(np.uint8), 2, axis=in_axes)
    shape = list(kernel.shape)
    shape[in_axes - 1] //= 2
    return (low | (high << 4)).reshape(shape), scale


def dequantize(
    levels: Integer[Any, "..."], scale: Float[Any, "..."], dtype: Any = np.float32
) -> Num[Any, "..."]:
    """The weights that `quantize` stands for.

    Args:
        levels: its integers.
        scale: its scales.
        dtype: of the result; float32 holds every product exactly.
    """
    steps = scale.astype(np.float32)
    xp: Any = np if isinstance(levels, np.ndarray) else jnp
    if kind_of(levels) == "int8":
        steps = xp.expand_dims(steps, tuple(range(levels.ndim - steps.ndim)))
        return (levels.astype(np.float32) * steps).astype(dtype)
    # The axis that was cut; a block has at least two bytes.
    (axis,) = (axis for axis in range(levels.ndim) if scale.shape[axis] != levels.shape[axis])
    blocked = _split(levels, axis, scale.shape[axis])
    wide = xp.concatenate([_centred(blocked & 15), _centred(blocked >> 4)], axis=axis + 1)
    return (wide * xp.expand_dims(steps, axis + 1)).reshape(kernel_shape(levels, axis + 1)).astype(dtype)


def _centred(nibbles: UInt8[Any, "..."]) -> Float[Any, "..."]:
    return nibbles.astype(np.int8).astype(np.float32) - _OFFSET


def _blocks(kernel: Num[Any, "..."], in_axes: int) -> Num[Any, "..."]:
    """The last input axis as two: blocks, and the weights of a block."""
    width = kernel.shape[in_axes - 1]
    return _split(kernel, in_axes - 1, width // block_size(width))


def _split(array: Num[Any, "..."], axis: int, parts: int) -> Num[Any, "..."]:
    shape = array.shape
    return array.reshape(*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])
