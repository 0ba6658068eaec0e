"""Files are written through `spacedrive_jax.io`, with `buckets` below it: whole or not at all."""

import ast
import os
from pathlib import Path

import pytest

from spacedrive_jax import buckets, io
from spacedrive_jax.errors import SpaceDriveError
from tests.conftest import ROOT

PATH_METHODS = {"write_text", "write_bytes"}
OF_IO = {"io", "spacedrive_jax"}


def writes_of(tree: ast.Module) -> list[int]:
    """Lines where a file is opened for writing, written or moved without `spacedrive_jax.io`."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if function.attr in PATH_METHODS and owner not in OF_IO:
                lines.append(node.lineno)
            if owner == "os" and function.attr in ("replace", "rename"):
                lines.append(node.lineno)
            if owner == "cv2" and function.attr == "imwrite":
                lines.append(node.lineno)
        if isinstance(function, ast.Name) and function.id == "open":
            modes = [each.value for each in node.args[1:2] if isinstance(each, ast.Constant)]
            if any(set(str(mode)) & set("wax") for mode in modes):
                lines.append(node.lineno)
    return lines


def test_files_are_written_through_io():
    found = []
    for room in ("spacedrive_jax", "data_prep"):
        for file in sorted((ROOT / room).rglob("*.py")):
            tree = ast.parse(file.read_text())
            imported = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
            # What runs in another program's Python (CARLA's) cannot import this project, and does not.
            ours = any(name.startswith("spacedrive_jax") for name in imported)
            if ours and file not in (Path(io.__file__), Path(buckets.__file__)):
                found += [f"{file.relative_to(ROOT)}:{line}" for line in writes_of(tree)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "path.write_text('x')",
        "(a / 'b').write_bytes(b'')",
        "os.replace(a, b)",
        "open('a', 'w')",
        "cv2.imwrite('a', b)",
    ],
)
def test_the_check_finds_what_writes(code):
    assert writes_of(ast.parse(code)) == [1]


def test_a_part_of_a_folder_is_whole_or_an_error_that_names_it(tmp_path):
    io.write_part(tmp_path / "new" / "a.txt", "é\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é\n".encode()
    with pytest.raises(SpaceDriveError, match=r"cannot write .*new: it is a folder"):
        io.write_part(tmp_path / "new", b"")


def test_lines_are_added_and_errors_name_the_file(tmp_path):
    file = tmp_path / "lines"
    for text in ("one", "two"):
        lines = io.LineFile(file)
        lines.write(text)
        assert file.read_text().endswith(f"{text}\n")  # before it is closed
        lines.close()
    assert file.read_text() == "one\ntwo\n"
    with pytest.raises(SpaceDriveError, match=r"cannot write .*absent.*: there is no such file"):
        io.LineFile(tmp_path / "absent" / "lines")
    if os.path.exists("/dev/full"):
        lines = io.LineFile("/dev/full")
        with pytest.raises(SpaceDriveError, match="/dev/full: the disk is full"):
            lines.write("a")
        lines.close()  # and does not fail again


def test_a_finished_file_takes_its_name(tmp_path):
    (tmp_path / "partial").write_text("new")
    (tmp_path / "final").write_text("old")
    io.put_in_place(tmp_path / "partial", tmp_path / "final")
    assert (tmp_path / "final").read_text() == "new"
    with pytest.raises(SpaceDriveError, match=r"cannot write .*final"):
        io.put_in_place(tmp_path / "partial", tmp_path / "final")
