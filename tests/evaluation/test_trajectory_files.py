from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.evaluation.prediction_files import read_predictions

PATH = np.array([[1.0, 0.1], [2.0, 0.2], [3.0, 0.3], [4.0, 0.4], [5.0, 0.5], [6.0, 0.6]])


def pickled(path: Path, content: object, protocol: int = pickle.HIGHEST_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickled_dictionaries(tmp_path: Path, protocol: int) -> None:
    content = {
        "array": PATH,
        "batched": PATH[None].astype(np.float32),
        "with_yaw": np.concatenate([PATH, np.zeros((6, 1))], axis=1),
        "list": PATH.tolist(),
        "short": PATH[:4],
        "none": None,
        "nan": PATH * np.nan,
        "empty": [],
    }
    predictions = read_predictions(pickled(tmp_path / "p.pkl", content, protocol))
    assert set(predictions.waypoints) == {"array", "batched", "with_yaw", "list"}
    for points in predictions.waypoints.values():
        np.testing.assert_allclose(points, PATH, atol=1e-6)
    assert predictions.short == ("short", "empty")
    assert predictions.unparsed == ("none",)
    assert predictions.non_finite == ("nan",)


def test_json_dictionary_lists_repeated_tokens(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    one = json.dumps(PATH.tolist())
    path.write_text(f'{{"a": {one}, "b": {one}, "a": [[9, 9]]}}')
    predictions = read_predictions(path)
    assert set(predictions.waypoints) == {"a", "b"}
    assert predictions.duplicates == ("a",)
    path.write_text(json.dumps({"token": "a", "waypoints": PATH.tolist()}) + "\n")
    np.testing.assert_array_equal(read_predictions(path).waypoints["a"], PATH)


def test_axes_are_declared(tmp_path: Path) -> None:
    """A lidar-frame plan, x to the right and y ahead, drives ahead and to the left here."""
    lidar = np.stack([-PATH[:, 1], PATH[:, 0]], axis=1)
    path = pickled(tmp_path / "p.pkl", {"a": lidar})
    np.testing.assert_allclose(read_predictions(path, "right-forward").waypoints["a"], PATH)
    mirrored = pickled(tmp_path / "q.pkl", {"a": PATH * [1, -1]})
    np.testing.assert_allclose(read_predictions(mirrored, "forward-right").waypoints["a"], PATH)
    np.testing.assert_array_equal(read_predictions(path).waypoints["a"], lidar)


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("content", [{"a": Attack()}, {"a": np.array([Attack()], object)}, {"a": Path("x")}])
def test_pickles_cannot_run_anything(
    tmp_path: Path, content: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpaceDriveError, match=r"p\.pkl is not a pickle of .*it (asks for|holds an array of)"):
        read_predictions(pickled(tmp_path / "p.pkl", content))
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([PATH], "expected a dictionary of token to waypoints, found list"),
        ({}, "holds no prediction"),
        ({1: PATH}, "a token must be a non-empty text, found 1"),
        ({"a": "ahead"}, "p.pkl, token a: expected waypoints"),
        ({"a": np.zeros((2, 6, 2))}, r"token a: expected an n x 2 .* found shape \(2, 6, 2\)"),
        ({"a": [[1, 2], [3]]}, "token a: expected waypoints"),
    ],
)
def test_what_is_no_trajectory_is_named(tmp_path: Path, content: object, problem: str) -> None:
    with pytest.raises(SpaceDriveError, match=problem):
        read_predictions(pickled(tmp_path / "p.pkl", content))


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "p.pkl").write_bytes(b"\x80\x04 nothing")
    with pytest.raises(SpaceDriveError, match="is not a pickle"):
        read_predictions(tmp_path / "p.pkl")
    (tmp_path / "p.json").write_text("[1, 2")
    with pytest.raises(SpaceDriveError, match="is not JSON"):
        read_predictions(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("[1, 2]")
    with pytest.raises(SpaceDriveError, match="expected an object of token to waypoints, found list"):
        read_predictions(tmp_path / "p.json")


def program(*parts: bytes) -> bytes:
    return b"\x80\x04}(X\3\0\0\0tok" + b"".join(parts) + b"u."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


FLOATS = named("numpy", "dtype") + b"(X\2\0\0\0f8\x89\x88tR"
OBJECTS = named("numpy", "dtype") + b"(X\2\0\0\0O8\x89\x88tR"
STRUCTURED = named("numpy", "dtype") + b"(X\2\0\0\0V8\x89\x88tR"
FROM_BUFFER = named("numpy._core.numeric", "_frombuffer")
OUTSIDE = b"(K\3X\1\0\0\0|NX\1\0\0\0f}X\1\0\0\0fI1073741824\nsK\x08K\1K\0tb"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            named("numpy", "ndarray") + b"((K\6K\2t" + OBJECTS + b"B\x60\0\0\0" + b"AAAAAA\0\0" * 12 + b"tR",
            "type 'O8'",
        ),
        (
            FROM_BUFFER + b"(B\x60\0\0\0" + b"A" * 96 + STRUCTURED + OUTSIDE + b"(K\x0ctX\1\0\0\0CtR",
            "type 'V8'",
        ),
        (named("numpy", "ndarray") + b"((K\6K\2t" + FLOATS + b"tR", "other than its own bytes"),
        (FROM_BUFFER + b"(B\x08\0\0\0" + bytes(8) + FLOATS + b"(I1073741824\ntX\1\0\0\0CtR", "do not make"),
        (named("numpy._core.multiarray", "scalar") + b"(" + FLOATS + b"C\1\0tR", "do not make"),
        (FLOATS + OUTSIDE, "not of plain numbers"),
        (named("numpy", "ndarray") + b"}X\x08\0\0\0__init__Nsb", "it changes a type"),
        (FROM_BUFFER + b"N}X\x0c\0\0\0__defaults__Ns\x86b", "it changes a function"),
        (b"Nr" + (1 << 28).to_bytes(4, "little"), None),
    ],
)
def test_pickles_reach_no_memory_but_their_own(tmp_path: Path, content: bytes, problem: str | None) -> None:
    """numpy takes addresses, fields outside an item and sizes from a pickle; here each is refused."""
    (tmp_path / "p.pkl").write_bytes(program(content))
    if problem is None:  # a memo entry of number 2^28, which the machine in C makes room for
        assert read_predictions(tmp_path / "p.pkl").unparsed == ("tok",)
        return
    with pytest.raises(SpaceDriveError, match=problem):
        read_predictions(tmp_path / "p.pkl")
