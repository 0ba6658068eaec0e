"""Workers end with their parent, however that ends; a stopped command says what to do."""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
import sys
import time
import types
import uuid
from pathlib import Path

import pytest

from spacedrive_jax import console
from spacedrive_jax.parallel import close_coroutines, ordered_map, raise_on_signals
from tests.conftest import ROOT

MARK = "SPACEDRIVE_TEST_FAMILY"


def square(number: int) -> int:
    return number * number


def power(exponent: int, number: int) -> int:
    return number**exponent


def hang(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)


def family(mark: str) -> list[int]:
    """Living processes that inherited a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            dead = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not dead and f"{MARK}={mark}".encode() in folder.joinpath("environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_results_come_in_order_from_any_number_of_workers() -> None:
    for workers in (1, 3):
        assert list(ordered_map(square, range(20), workers)) == [n * n for n in range(20)]
    assert list(ordered_map(functools.partial(power, 3), range(5), 2)) == [0, 1, 8, 27, 64]


def test_an_error_of_the_caller_breaks_the_work_off(tmp_path) -> None:
    started = time.monotonic()
    results = ordered_map(hang, [str(tmp_path)] * 4, 2)
    with pytest.raises(TimeoutError):
        next(_alarmed(results, tmp_path))
    assert time.monotonic() - started < 30


def _alarmed(results, folder):
    """Draws from `results` until workers are at work, then raises in the drawing thread."""

    def ring(number, frame):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 3.0)
    try:
        yield from results
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


PARENT = """
import sys
from spacedrive_jax import console
from spacedrive_jax.parallel import ordered_map
from tests.test_parallel import hang

class Work(console.Command):
    when_stopped = "--resume goes on"
    def run(self):
        list(ordered_map(hang, [sys.argv[1]] * 4, 2))
        return {}

sys.exit(console.finish(Work().run, as_json=False, debug=False))
"""


@pytest.mark.usefixtures("hang_ups")
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_nobody_outlives_the_parent(number: signal.Signals, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {MARK: mark},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
    assert len(family(mark)) >= 3
    parent.send_signal(number)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert wait_until(lambda: not family(mark), 5), "left behind"
    if number in (signal.SIGTERM, signal.SIGHUP):
        assert said == f"stopped by {number.name}; --resume goes on\n"
    if number == signal.SIGINT:
        assert said == "interrupted; --resume goes on\n"


@pytest.mark.usefixtures("hang_ups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_a_command_and_leaves_the_handler_as_it_was(number, capsys) -> None:
    cleaned = []

    def action():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleaned.append(True)

    before = signal.getsignal(number)
    assert console.finish(action, as_json=False, debug=False) == 128 + number
    assert cleaned == [True]
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == f"stopped by {number.name}; nothing was kept\n"


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        restore = raise_on_signals(KeyError)
        os.kill(os.getpid(), signal.SIGHUP)
        restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_ups")
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_that_meets_a_finaliser_is_not_lost(number, status, said, capsys) -> None:
    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    def action():
        Finalised()
        time.sleep(5)

    started = time.monotonic()
    assert console.finish(action, as_json=False, debug=False) == status
    assert time.monotonic() - started < 4
    assert capsys.readouterr().err == f"{said}; nothing was kept\n"


@types.coroutine
def pause():
    yield


async def complains():
    try:
        await pause()
    except BaseException as error:
        raise ValueError("in words of its own") from error


def read() -> None:
    waiting = complains()
    waiting.send(None)
    raise OSError("damaged")


def test_what_a_failed_reader_left_waiting_says_nothing_behind_the_error(monkeypatch) -> None:
    heard: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    with pytest.raises(OSError, match="damaged") as caught:
        read()
    close_coroutines(caught.value)
    del caught
    gc.collect()
    assert heard == []
