"""Right to the last place, and the very same bits however the arithmetic of the machine is set up."""

from __future__ import annotations

import ast
import hashlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from scipy.signal import savgol_filter
from scipy.spatial.transform import Rotation

from spacedrive_jax import exact

ANGLES = np.concatenate([
    np.random.default_rng(0).normal(0.0, 3.0, 2000),
    np.random.default_rng(1).normal(0.0, 1000.0, 2000),
    np.arange(-40, 41) * math.pi / 4,
    [0.0, -0.0, 1e-9, -1e-300, 1e5],
])  # fmt: skip


def units_apart(actual: np.ndarray, expected: list[float]) -> float:
    """The largest difference in units of the last place."""
    wanted = np.array(expected)
    return float(np.max(np.abs(actual - wanted) / np.spacing(np.abs(wanted))))


def test_elementary_functions_are_right_to_one_unit_in_the_last_place() -> None:
    cos, sin = exact.cos_sin(ANGLES)
    assert units_apart(cos, [math.cos(x) for x in ANGLES]) <= 1
    assert units_apart(sin, [math.sin(x) for x in ANGLES]) <= 1
    assert units_apart(exact.tan(ANGLES), [math.tan(x) for x in ANGLES]) <= 2
    assert units_apart(exact.arctan(ANGLES), [math.atan(x) for x in ANGLES]) <= 1
    other = np.random.default_rng(2).permutation(ANGLES)
    assert units_apart(exact.arctan2(other, ANGLES), list(map(math.atan2, other, ANGLES))) <= 1
    exponents = np.clip(ANGLES, -600, 600)
    assert units_apart(exact.exp(exponents), [math.exp(x) for x in exponents]) <= 1


@pytest.mark.parametrize("deriv", [0, 1, 2])
def test_the_filter_is_scipys(deriv: Literal[0, 1, 2]) -> None:
    values = np.random.default_rng(4).normal(size=40)
    expected = savgol_filter(values, 15, 2, deriv=deriv, delta=0.1)
    np.testing.assert_allclose(exact.savitzky_golay(values, 15, step=0.1, deriv=deriv), expected, atol=1e-11)


@pytest.mark.parametrize(("y", "x"), list(itertools.product([0.0, -0.0, 2.0, -2.0], repeat=2)))
def test_directions_along_the_axes(y: float, x: float) -> None:
    for angle in (exact.arctan2(y, x), exact.arctan2(np.array([y]), np.array([x]))[0]):
        assert angle == math.atan2(y, x)
        assert math.copysign(1, angle) == math.copysign(1, math.atan2(y, x))


def test_exp_at_its_limits() -> None:
    assert exact.exp(0.0) == 1.0
    assert exact.exp(np.array([0.0, -1e4, 1e4])).tolist() == [1.0, exact.exp(-700.0), exact.exp(700.0)]


def test_floats_and_arrays_go_through_the_same_operations() -> None:
    for function in (exact.arctan, exact.exp, lambda x: exact.cos_sin(x)[0], lambda x: exact.cos_sin(x)[1]):
        one_by_one = [function(float(x)) for x in ANGLES]
        assert all(type(value) is float for value in one_by_one)
        assert np.array_equal(one_by_one, function(ANGLES))
    assert np.array_equal(
        [exact.arctan2(float(a), float(b)) for a, b in itertools.pairwise(ANGLES)],
        exact.arctan2(ANGLES[:-1], ANGLES[1:]),
    )


def test_products_and_lengths() -> None:
    rng = np.random.default_rng(3)
    left, right, points = rng.normal(size=(5, 4, 3)), rng.normal(size=(3, 2)), rng.normal(size=(7, 2, 3))
    assert np.allclose(exact.matmul(left, right), left @ right, atol=1e-14)
    assert exact.matmul(np.eye(2), np.array([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert np.allclose(exact.rotate(points, left[0]), points @ left[0].T, atol=1e-14)
    assert exact.norm(np.array([[3.0, 4.0], [0.3, 0.4]])).tolist() == [5.0, 0.5]
    assert exact.dot(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 11.0
    assert exact.hypot(3.0, 4.0) == 5.0
    assert exact.power(np.array([2.0, 3.0]), 5).tolist() == [32.0, 243.0]


def test_inverses() -> None:
    rng = np.random.default_rng(4)
    poses = np.tile(np.eye(4), (20, 1, 1))
    poses[:, :3, :3] = exact.rotation_matrix(rng.normal(size=(20, 4)))
    poses[:, :3, 3] = rng.normal(0, 500, (20, 3))
    assert np.allclose(exact.matmul(exact.rigid_inverse(poses), poses), np.eye(4), atol=1e-12)
    intrinsics = np.array([[1266.4, 0.0, 816.3], [0.0, 1266.4, 491.5], [0.0, 0.0, 1.0]])
    assert np.allclose(exact.inverse_3x3(intrinsics), np.linalg.inv(intrinsics), atol=1e-15)
    poses[:, :3, :3] *= 2.0
    assert np.allclose(exact.matmul(exact.affine_inverse(poses), poses), np.eye(4), atol=1e-12)
    with pytest.raises(np.linalg.LinAlgError, match="singular"):
        exact.inverse_3x3(np.ones((3, 3)))


def test_quaternions_and_back() -> None:
    quaternions = np.random.default_rng(5).normal(size=(200, 4))
    matrices = exact.rotation_matrix(quaternions)
    assert np.allclose(matrices, Rotation.from_quat(quaternions, scalar_first=True).as_matrix(), atol=1e-14)
    expected = Rotation.from_matrix(matrices).as_quat(canonical=True, scalar_first=True)
    assert np.allclose([exact.quaternion(one) for one in matrices], expected, atol=1e-14)
    with pytest.raises(ValueError, match="zeros"):
        exact.rotation_matrix(np.zeros((2, 4)))
    half_turns = [np.diag([-1.0, -1.0, 1.0]), np.diag([1.0, -1.0, -1.0]), np.diag([-1.0, 1.0, -1.0])]
    assert [exact.quaternion(one).tolist() for one in half_turns] == [
        [0, 0, 0, 1],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
    ]


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 60, 64), (64, 3000, 12), (2, 0, 3)])
def test_product_is_near_the_exact_one_and_the_same_in_any_order(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    n, k, m = shape
    left, right = rng.normal(0, 1e-7, (n, k)), rng.normal(0, 300, (k, m))
    found = exact.product(left, right)
    scale = max(k, 1) * np.abs(left).max(initial=0) * np.abs(right).max(initial=0)
    np.testing.assert_allclose(found, left @ right, rtol=0, atol=1e-5 * scale + 1e-300)
    order = rng.permutation(k)
    np.testing.assert_array_equal(exact.product(left[:, order], right[order]), found)


def digest() -> str:
    """Of everything this module computes on fixed inputs."""
    grid = (np.arange(6000.0) - 3000.0) / 7.0
    poses = np.tile(np.eye(4), (1000, 1, 1))
    poses[:, :3, :3] = exact.rotation_matrix(grid[:4000].reshape(-1, 4))
    poses[:, :3, 3] = grid[:3000].reshape(-1, 3)
    results = [
        *exact.cos_sin(grid),
        exact.arctan(grid),
        exact.arctan2(grid, grid[::-1] / 3),
        exact.exp(grid),
        exact.norm(grid.reshape(-1, 3)),
        exact.matmul(exact.rigid_inverse(poses), poses[::-1]),
        exact.affine_inverse(poses),
        exact.quaternion(poses[7, :3, :3]),
        exact.product(grid.reshape(60, 100), grid.reshape(100, 60)),
    ]
    return hashlib.sha256(b"".join(np.ascontiguousarray(one).tobytes() for one in results)).hexdigest()


DIGEST = "f6b01692679c0f4ab6f5d4ddcba021aa6c5a00e2726ea94a5e4143562cb9e261"


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"OPENBLAS_CORETYPE": "Nehalem"},
        {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"},
        {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"},
        {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4"},
    ],
    ids=str,
)
def test_the_same_bits_whatever_the_processor_offers(setting: dict[str, str]) -> None:
    code = "from tests.test_exact import digest; print(digest())"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | setting,
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == DIGEST


ROOMS = ("world", "data", "evaluation", "driving")
IN_CARLA = ("bench2drive_agent.py", "bench2drive_rig.py", "bench2drive_route.py")
"""Of `driving`: copied into CARLA's own Python, without this project; no drive there repeats its last bit."""
INEXACT = {
    "np": """arccos arcsin arctan arctan2 cbrt convolve correlate cos cosh dot einsum exp exp2 expm1 fft
        hypot inner linalg log log10 log1p log2 matmul polyfit power sin sinc sinh tan tanh tensordot vdot""",
    # `math.hypot` and `math.dist` are Python's own, made of exact operations.
    "math": "acos asin atan atan2 cos cosh exp exp2 expm1 log log10 log1p log2 pow sin sinh tan tanh",
    "cv2": "GaussianBlur blur filter2D warpAffine warpPerspective",
}
"""What rounds as the processor pleases, by the name its module is imported under."""
INEXACT_MODULES = ("fft", "interpolate", "linalg", "optimize", "signal", "spatial.transform", "special")
"""Of SciPy; they go through LAPACK, or through such functions as above."""


def inexact_operations(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            found.append(f"{file}:{node.lineno}: @")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            if name in INEXACT.get(module, "").split():
                found.append(f"{file}:{node.lineno}: {module}.{name}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            tuple(f"scipy.{name}" for name in INEXACT_MODULES)
        ):
            found.append(f"{file}:{node.lineno}: {node.module}")
    return found


@pytest.mark.parametrize("room", [*(f"spacedrive_jax/{name}" for name in ROOMS), "data_prep"])
def test_what_is_written_or_decided_is_computed_exactly(room: str) -> None:
    files = sorted((Path(__file__).parents[1] / room).rglob("*.py"))
    files = [file for file in files if file.name not in IN_CARLA]
    assert files
    assert not [fault for file in files for fault in inexact_operations(file)]
