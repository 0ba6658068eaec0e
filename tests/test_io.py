"""Files: one job a folder at a time, typed JSON, nothing half written."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.folders import LOCK, atomic_folder, folder_lock, output_lock
from spacedrive_jax.io import (
    inside,
    is_there,
    place,
    put_in_place,
    remove_partials,
    require_regular,
    require_replaceable,
    said_by,
    write_text,
)
from spacedrive_jax.json_files import parse_json, read_json, read_typed

HOLD = """
import sys, time
from spacedrive_jax.folders import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("digits", [301, 4000, 100_000])
def test_whole_numbers_beyond_any_are_refused(digits):
    with pytest.raises(DataError, match=r"it is not JSON .*digits"):
        parse_json('{"a": ' + "9" * digits + "}", "it")
    assert parse_json('{"a": -' + "9" * 200 + "}", "it")["a"] < 0


def test_second_job_is_told_who_holds_the_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SpaceDriveError, match=rf"process {other.pid} on {socket.gethostname()} since 20"):
            folder_lock(tmp_path).__enter__()
        other.kill()
        other.wait()
        assert (tmp_path / LOCK).exists(), "a killed job leaves its lock behind"
        with folder_lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_lock_of_another_machine_is_not_taken_over(tmp_path):
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "elsewhere", "since": "2026-01-01"}')
    with pytest.raises(SpaceDriveError, match=r"process 1 on elsewhere since 2026-01-01.*remove .*in-use"):
        folder_lock(tmp_path).__enter__()


def test_a_scheduler_may_start_a_job_again_on_another_machine(tmp_path):
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "elsewhere", "since": "2026-01-01"}')
    with folder_lock(tmp_path, take_over=True):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_that_finds_the_disk_full_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("spacedrive_jax.folders.to_json", full)
    for lock in (folder_lock(tmp_path / "run"), output_lock(tmp_path / "p.jsonl")):
        with pytest.raises(SpaceDriveError, match="the disk is full"):
            lock.__enter__()
    assert not list(tmp_path.iterdir())


def test_words_of_libraries_become_ours(tmp_path):
    told = RuntimeError("Failed to write: No space left on device (os error 28)")
    assert said_by(told, tmp_path / "a.rrd").startswith("the disk is full")
    assert said_by(ValueError("bad header\nand more"), tmp_path / "a") == "bad header"


def test_of_two_jobs_that_write_one_folder_or_file_one_gives_way(tmp_path):
    with (
        atomic_folder(tmp_path / "out") as folder,
        pytest.raises(SpaceDriveError, match=rf"out is in use by process {os.getpid()}"),
        atomic_folder(tmp_path / "out"),
    ):
        pass
    (folder.parent / "out").rmdir()
    with output_lock(tmp_path / "p.jsonl"), pytest.raises(SpaceDriveError, match=r"p\.jsonl is in use"):
        output_lock(tmp_path / "p.jsonl").__enter__()
    assert not list(tmp_path.iterdir())


def test_folder_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ValueError, match="no"), folder_lock(tmp_path / "new"):
        raise ValueError("no")
    assert not (tmp_path / "new").exists()


def test_pipes_and_devices_are_not_replaced(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        made = tmp_path / "made"
        made.write_text("made")
        with pytest.raises(SpaceDriveError, match="device or a pipe, name a file"):
            write_text(path, "text")
        with pytest.raises(SpaceDriveError, match="device or a pipe, name a file"):
            put_in_place(made, path)
    assert pipe.is_fifo()
    for device in ("/dev/null", "/dev/stdout", "/dev/fd/1"):
        with pytest.raises(SpaceDriveError, match="device or a pipe, name a file"):
            require_replaceable(device)


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(DataError, match="not a regular file"):
            require_regular(path)
        with pytest.raises(DataError, match="not a regular file"):
            is_there(path)
    assert not is_there(tmp_path / "nothing")
    assert is_there(__file__)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a\0b", "a\\b"])
def test_names_stay_inside(tmp_path, name):
    with pytest.raises(DataError, match="does not stay inside"):
        inside(tmp_path, name, "row 1")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"a": "x"}', "\udcff", "[" * 9999, '{"a": NaN}'])
def test_typed_json_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"a\.json"):
        read_typed(tmp_path / "a.json", dict[str, int])


def test_what_killed_writers_left_is_removed(tmp_path):
    write_text(tmp_path / "a" / "whole.json", "{}")
    (tmp_path / "a" / ".whole.json.partial-123").write_text("{")
    remove_partials(tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["whole.json"]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert read_typed(tmp_path / "a.json", dict[str, int]) == read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("name", [".", "..", "new/.."])
def test_a_folder_may_be_named_by_where_we_are(tmp_path, monkeypatch, name):
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with output_lock(name):
        pass
    with pytest.raises(SpaceDriveError, match="exists: choose another folder"), atomic_folder(name):
        pass
    with pytest.raises(SpaceDriveError, match="cannot write "):
        write_text(name, "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["above", "here"]


def test_the_root_is_no_place_to_write():
    for write in (output_lock, atomic_folder):
        with pytest.raises(SpaceDriveError, match="root of the file system"), write("/"):
            pass


@pytest.mark.usefixtures("unchecked")
def test_a_home_that_no_shell_expanded_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("~/x") == place(Path("~/x")) == tmp_path / "x"
    assert place("~x") == Path("~x")
    for wrong in (None, 3, b"x", ["x"]):
        with pytest.raises(ConfigError, match="expected a path"):
            place(wrong)
