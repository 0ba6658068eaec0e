"""Arithmetic whose bits do not depend on the processor.

BLAS and LAPACK pick a kernel for the processor they find and round the last bit as that kernel pleases.
NumPy's vectorised `exp`, `arctan2`, `power` and their like do the same (machines with AVX-512 take another
library), and so do the C library's `sin` and `cos` (with and without fused multiply-add). A last bit is
enough to turn one command class into another, to move a point over a threshold, or to change a fingerprint.
What is written, hashed, compared exactly or held against a threshold is therefore computed here, out of the
operations that IEEE 754 defines to the last bit: `+ - * /`, `sqrt`, rounding to a whole number, scaling by a
power of two. Sums run in the order of their axis.

Safe without this module, by the same rule: elementwise NumPy arithmetic, `np.sqrt`, `np.square`,
`np.interp`, `np.cumsum`, and `np.sum` and `np.mean`, whose order depends on the shape alone (NumPy writes
`x**2` as a product, but `x**3` as a power). Sorts that may meet ties take `kind="stable"`.

The elementary functions are those of fdlibm (Sun Microsystems, 1993: `s_sin.c`, `k_sin.c`, `k_cos.c`,
`s_atan.c`, `e_atan2.c`, `e_exp.c`; the argument reduction is that of `e_rem_pio2.c` for medium sizes),
without branches, so that arrays and plain floats go through the same operations. They are right to within
one unit in the last place (`tan` two). A plain float gives a plain float, anything else an array of float64.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float, Num

Number = TypeVar("Number", float, np.ndarray)
"""A plain float, or an array worked through element by element."""

_TWO_OVER_PI = 6.36619772367581382433e-01
# Pi / 2 in three parts: the first two have 33 bits each, so that whole multiples of them are exact.
_HALF_PI_1 = 1.57079632673412561417e00
_HALF_PI_2 = 6.07710050630396597660e-11
_HALF_PI_3 = 2.02226624879595063154e-21
_SIN = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
_COS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)
_ATAN = (
    3.33333333333329318027e-01,
    -1.99999999998764832476e-01,
    1.42857142725034663711e-01,
    -1.11111104054623557880e-01,
    9.09088713343650656196e-02,
    -7.69187620504482999495e-02,
    6.66107313738753120669e-02,
    -5.83357013379057348645e-02,
    4.97687799461593236017e-02,
    -3.65315727442169155270e-02,
    1.62858201153657823623e-02,
)
_PI_LOW = 1.2246467991473531772e-16
"""What pi lacks as a float64."""
_LN2_HIGH, _LN2_LOW, _ONE_OVER_LN2 = (
    6.93147180369123816490e-01,
    1.90821492927058770002e-10,
    1.44269504088896338700e00,
)
_EXP = (
    1.66666666666666019037e-01,
    -2.77777777770155933842e-03,
    6.61375632143793436117e-05,
    -1.65339022054652515390e-06,
    4.13813679705723846039e-08,
)


def matmul(left: Num[np.ndarray, "... n k"], right: Num[np.ndarray, "... k m"]) -> Num[np.ndarray, "... n m"]:
    """The product of (stacks of) small matrices, summed over k in order."""
    left, right = np.asarray(left), np.asarray(right)
    total = left[..., :, 0, None] * right[..., None, 0, :]
    for k in range(1, left.shape[-1]):
        total = total + left[..., :, k, None] * right[..., None, k, :]
    return total


def product(left: Float[np.ndarray, "n k"], right: Float[np.ndarray, "k m"]) -> Float[np.ndarray, "n m"]:
    """The product of two matrices of any size, through BLAS, whose kernel cannot matter.

    Both are rounded to fixed point first, with so few bits that no sum of products is ever rounded, in
    whatever order it is taken: some 20 bits for a thousand terms, of each matrix's largest number.

    Args:
        left: finite numbers.
        right: finite numbers.
    """
    bits = (52 - max(left.shape[1] - 1, 0).bit_length()) // 2
    whole, shifts = [], 0
    for matrix in (left, right):
        _, exponent = math.frexp(float(np.max(np.abs(matrix), initial=0.0)))
        shift = bits - exponent
        shifts += shift
        whole.append(np.rint(np.ldexp(np.asarray(matrix, np.float64), shift)))
    return np.ldexp(whole[0] @ whole[1], -shifts)


def dot(left: Float[np.ndarray, "... k"], right: Float[np.ndarray, "... k"]) -> Float[Any, "..."]:
    """The inner product along the last axis, summed in order."""
    left, right = np.asarray(left), np.asarray(right)
    total = left[..., 0] * right[..., 0]
    for k in range(1, left.shape[-1]):
        total = total + left[..., k] * right[..., k]
    return total


def rotate(
    points: Float[np.ndarray, "... k"], rotation: Float[np.ndarray, "m k"]
) -> Float[np.ndarray, "... m"]:
    """`rotation` applied to each point: `points @ rotation.T`."""
    points = np.asarray(points)
    total = points[..., :1] * rotation[:, 0]
    for k in range(1, points.shape[-1]):
        total = total + points[..., k : k + 1] * rotation[:, k]
    return total


def transform(
    points: Float[np.ndarray, "... 3"], a_to_b: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "... 3"]:
    """Points of frame a in frame b."""
    return rotate(points, a_to_b[:3, :3]) + a_to_b[:3, 3]


def norm(vectors: Float[np.ndarray, "... k"]) -> Float[Any, "..."]:
    """Euclidean length along the last axis."""
    return np.sqrt(dot(vectors, vectors))


def hypot(x: Any, y: Any) -> Any:
    """`sqrt(x * x + y * y)`; metres and pixels need no care about overflow."""
    square = x * x + y * y
    return math.sqrt(square) if isinstance(square, float) else np.sqrt(square)


def rigid_inverse(a_to_b: Float[np.ndarray, "... 4 4"]) -> Float[np.ndarray, "... 4 4"]:
    """`b_to_a` of rigid transforms: the transposed rotation."""
    result = np.zeros_like(a_to_b)
    rotation = np.swapaxes(a_to_b[..., :3, :3], -1, -2)
    result[..., :3, :3] = rotation
    result[..., :3, 3] = -dot(rotation, a_to_b[..., None, :3, 3])
    result[..., 3, 3] = 1.0
    return result


def inverse_3x3(matrix: Float[np.ndarray, "... 3 3"]) -> Float[np.ndarray, "... 3 3"]:
    """The inverse by cofactors, for camera intrinsics and the like.

    Raises:
        numpy.linalg.LinAlgError: a determinant is 0.
    """
    rows = np.moveaxis(np.asarray(matrix, dtype=np.float64), -2, 0)
    # The columns of the adjugate are the cross products of the rows.
    cofactors = [np.cross(rows[1], rows[2]), np.cross(rows[2], rows[0]), np.cross(rows[0], rows[1])]
    determinant = dot(rows[0], cofactors[0])
    if np.any(determinant == 0):
        raise np.linalg.LinAlgError("singular matrix")
    return np.stack(cofactors, axis=-1) / determinant[..., None, None]


def affine_inverse(a_to_b: Float[np.ndarray, "... 4 4"]) -> Float[np.ndarray, "... 4 4"]:
    """`b_to_a` of transforms whose upper left 3x3 need not be a rotation; the last row is (0, 0, 0, 1)."""
    result = np.zeros(np.shape(a_to_b))
    linear = inverse_3x3(a_to_b[..., :3, :3])
    result[..., :3, :3] = linear
    result[..., :3, 3] = -dot(linear, a_to_b[..., None, :3, 3])
    result[..., 3, 3] = 1.0
    return result


def rotation_matrix(quaternion: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "... 3 3"]:
    """Rotation matrices of quaternions w, x, y, z, which need not be of unit length.

    Raises:
        ValueError: a quaternion is all zeros.
    """
    quaternion = np.asarray(quaternion, dtype=np.float64)
    length = norm(quaternion)
    if np.any(length == 0):
        raise ValueError("a quaternion of zeros is no rotation")
    w, x, y, z = np.moveaxis(quaternion / length[..., None], -1, 0)
    return np.stack(
        [
            np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], axis=-1),
            np.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], axis=-1),
            np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], axis=-1),
        ],
        axis=-2,
    )


def quaternion(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "4"]:
    """The unit quaternion w, x, y, z of one rotation matrix, its first part that is not 0 positive.

    The largest of the four parts comes first, from its square, and the others from it (Shepperd, 1978).
    """
    (a, b, c), (d, e, f), (g, h, i) = np.asarray(rotation, dtype=np.float64).tolist()
    parts = [a + e + i, a, e, i]
    largest = parts.index(max(parts))
    if largest == 0:
        value = [1 + a + e + i, h - f, c - g, d - b]
    elif largest == 1:
        value = [h - f, 1 + a - e - i, b + d, c + g]
    elif largest == 2:
        value = [c - g, b + d, 1 - a + e - i, f + h]
    else:
        value = [d - b, c + g, f + h, 1 - a - e + i]
    result = np.array(value)
    result /= norm(result)
    first = next(part for part in result.tolist() if part != 0.0)
    # Adding 0 turns a negative zero into a plain one.
    return (result if first > 0 else -result) + 0.0


def savitzky_golay(
    values: Float[np.ndarray, " T"], window: int, *, step: float, deriv: Literal[0, 1, 2] = 0
) -> Float[np.ndarray, " T"]:
    """Savitzky and Golay's filter of second order: `scipy.signal.savgol_filter` with its mode `interp`.

    Each value becomes that of the parabola through the window around it (near the ends: the first or last
    window), fitted with orthogonal polynomials: SciPy's fit goes through LAPACK.

    Args:
        values: at even steps, as many as the window has at least.
        window: values to fit to, three at least.
        step: between two values; derivatives are per unit of it.
        deriv: gives the parabola's first or second derivative in place of its value.
    """
    index = np.arange(len(values))
    first = np.clip(index - window // 2, 0, len(values) - window)
    offset = np.arange(window) - (window - 1) / 2
    square = offset * offset - np.mean(offset * offset)
    seen = values[first[:, None] + np.arange(window)]
    linear = dot(seen, offset) / dot(offset, offset)
    bent = dot(seen, square) / dot(square, square)
    here = index - first - (window - 1) / 2
    if deriv == 2:
        return 2 * bent / (step * step)
    if deriv == 1:
        return (linear + 2 * bent * here) / step
    return seen.mean(axis=1) + linear * here + bent * (here * here - np.mean(offset * offset))


def cos_sin(angle: Any) -> tuple[Any, Any]:
    """Cosine and sine of an angle in radians, up to some 10^6 of them."""
    x = _number(angle)
    turns = _round(x * _TWO_OVER_PI)
    first = x - turns * _HALF_PI_1
    w = turns * _HALF_PI_2
    r = first - w
    w = turns * _HALF_PI_3 - ((first - r) - w)
    high = r - w
    low = (r - high) - w
    z = high * high
    v = z * high
    sine = high - ((z * (0.5 * low - v * _horner(z, _SIN[1:])) - low) - v * _SIN[0])
    half = 0.5 * z
    rest = 1.0 - half
    cosine = rest + (((1.0 - rest) - half) + (z * (z * _horner(z, _COS)) - high * low))
    quarter = turns % 4.0
    odd = quarter % 2.0 == 1.0
    return (
        _select(odd, sine, cosine) * _select((quarter == 1.0) | (quarter == 2.0), -1.0, 1.0),
        _select(odd, cosine, sine) * _select(quarter >= 2.0, -1.0, 1.0),
    )


def tan(angle: Any) -> Any:
    """Tangent of an angle in radians: sine over cosine, to within two units in the last place."""
    cos, sin = cos_sin(angle)
    return sin / cos


def arctan(x: Any) -> Any:
    """The angle in radians, from -pi/2 to pi/2, whose tangent is `x`."""
    value = _number(x)
    size = abs(value)
    # Each range is turned by an angle whose tangent is 0, 1/2, 1, 3/2 or infinite: what is left is small.
    above, top, bottom = 0.0, size, 1.0
    high, low = 0.0, 0.0
    for start, numerator, denominator, base, base_low in (
        (0.4375, 2.0 * size - 1.0, 2.0 + size, 4.63647609000806093515e-01, 2.26987774529616870924e-17),
        (0.6875, size - 1.0, size + 1.0, 7.85398163397448278999e-01, 3.06161699786838301793e-17),
        (1.1875, size - 1.5, 1.0 + 1.5 * size, 9.82793723247329054082e-01, 1.39033110312309984516e-17),
        (2.4375, -1.0, size, 1.57079632679489655800e00, 6.12323399573676603587e-17),
    ):
        above = size >= start
        top, bottom = _select(above, numerator, top), _select(above, denominator, bottom)
        high, low = _select(above, base, high), _select(above, base_low, low)
    t = top / bottom
    z = t * t
    w = z * z
    odd = z * _horner(w, _ATAN[0::2])
    even = w * _horner(w, _ATAN[1::2])
    angle = high - ((t * (odd + even) - low) - t)
    return _copysign(angle, value)


def arctan2(y: Any, x: Any) -> Any:
    """The direction of (x, y) in radians, from -pi to pi; with zeros and signs as `math.atan2`."""
    y, x = _number(y), _number(x)
    rise, run = abs(y), abs(x)
    # Where the run is 0 the steepest ratio there is stands for an infinite one; both 0 count as flat.
    ratio = _select(rise == 0.0, 0.0, _select(run == 0.0, 1e300, rise / _select(run == 0.0, 1.0, run)))
    angle = arctan(ratio)
    behind = (x < 0.0) | ((rise == 0.0) & (_copysign(1.0, x) < 0.0))
    return _copysign(_select(behind, math.pi - (angle - _PI_LOW), angle), y)


def exp(x: Any) -> Any:
    """The exponential, e to the power of `x`, for `x` from -700 to 700 (beyond, the nearest of these)."""
    value = _number(x)
    if isinstance(value, float):
        value = 700.0 if value > 700.0 else (-700.0 if value < -700.0 else value)
    else:
        value = np.minimum(np.maximum(value, -700.0), 700.0)
    k = _round(value * _ONE_OVER_LN2)
    high = value - k * _LN2_HIGH
    low = k * _LN2_LOW
    r = high - low
    t = r * r
    c = r - t * _horner(t, _EXP)
    result = 1.0 - ((low - (r * c) / (2.0 - c)) - high)
    if isinstance(result, float):
        return math.ldexp(result, int(k))
    return result * ((k.astype(np.int64) + 1023) << 52).view(np.float64)  # 2 to the power of k, by its bits


def power(base: Any, exponent: int) -> Any:
    """`base` to a whole power of at least 1, by squaring."""
    result, square = None, base
    while exponent:
        if exponent & 1:
            result = square if result is None else result * square
        exponent >>= 1
        if exponent:
            square = square * square
    return result


def _horner(x: Number, coefficients: tuple[float, ...]) -> Number:
    """c0 + x (c1 + x (c2 + ...))."""
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = coefficient + x * total
    return total


def _number(value: Any) -> Any:
    """A plain float where `value` is one number, else an array of float64."""
    if isinstance(value, float | int | np.number) or np.ndim(value) == 0:
        return float(value)
    return np.asarray(value, dtype=np.float64)


def _round(value: Any) -> Any:
    """To the nearest whole number, ties to even."""
    return float(round(value)) if isinstance(value, float) else np.rint(value)


def _select(condition: Any, yes: Any, no: Any) -> Any:
    return np.where(condition, yes, no) if isinstance(condition, np.ndarray) else (yes if condition else no)


def _copysign(size: Any, sign: Any) -> Any:
    return np.copysign(size, sign) if isinstance(sign, np.ndarray) else math.copysign(size, sign)
