"""What every command line of the project shares: one clear error line, progress, one JSON object.

A command is a frozen dataclass deriving from `Command`: its fields are its flags (tyro builds the
parser and the `--help` page from names, types and docstrings) and `run` does the work and returns the
facts that `--json` prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, ClassVar, TextIO, TypeVar

import tyro
from tqdm import tqdm

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.io import to_json

T = TypeVar("T")


UserError = SpaceDriveError
"""The former name, until every room raises the kind that fits."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Base of all commands."""

    json: tyro.conf.FlagCreatePairsOff[bool] = dataclasses.field(default=False, kw_only=True)
    """Print one JSON object with the results as the last line of stdout."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = dataclasses.field(default=False, kw_only=True)
    """Show the whole traceback when something fails."""

    when_stopped: ClassVar[str] = "nothing was kept"
    """What a person who stopped the command (Ctrl-C, SIGTERM) has to know."""

    def run(self) -> Mapping[str, Any]:
        """Does the work; the returned mapping is what `--json` prints."""
        raise NotImplementedError


class Terminated(BaseException):
    """SIGTERM: raised where the command is, so that it cleans up as on any other error."""


def progress(iterable: Iterable[T] | None = None, *, logged: bool = True, **options: Any) -> tqdm:
    """A tqdm progress bar on stderr, which leaves stdout to results.

    Where stderr is no terminal but a log, a whole line takes the bar's place every `LOG_SECONDS`, so that a
    short task says nothing and a long one does not seem to hang.

    Args:
        iterable: what to go through; None where the caller updates the bar.
        logged: False keeps the log free of these lines, where the caller says itself how far it is (`note`).
        options: tqdm's.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, file=sys.stderr, **options)
    return tqdm(
        iterable,
        disable=not logged,
        file=_LogLines(sys.stderr),
        bar_format=_LOG_LINE,
        miniters=1,
        mininterval=LOG_SECONDS,
        delay=LOG_SECONDS,
        **options,
    )


def note(text: str) -> None:
    """Writes a line to stderr, above a progress bar where there is one."""
    tqdm.write(text, file=sys.stderr)


LOG_SECONDS = 30.0
_LOG_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {rate_fmt}, {elapsed} gone, {remaining} left{postfix}"


class _LogLines(io.TextIOBase):
    """What tqdm draws over and over on one line of a terminal, each drawing as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if text.strip():
            self._stream.write(text.strip() + "\n")
            self._stream.flush()
        return len(text)


def finish(action: Callable[[], Mapping[str, Any]], *, as_json: bool, debug: bool) -> int:
    """Runs `action` under the project's command-line contract and returns the exit status."""
    when_stopped = getattr(getattr(action, "__self__", None), "when_stopped", Command.when_stopped)
    try:
        with _raising_on_sigterm():
            facts = action()
    except KeyboardInterrupt:
        print(f"interrupted; {when_stopped}", file=sys.stderr)
        return 130
    except Terminated:
        print(f"stopped by SIGTERM; {when_stopped}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            print(f"error: {type(error).__name__}: {error} (--debug shows the traceback)", file=sys.stderr)
        return 1
    if as_json:
        print(to_json(facts, default=str), flush=True)
    return 0


@contextlib.contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM unwind the command; once, since what unwinds must not be cut off by a second one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(program: str, description: str, commands: Mapping[str, type[Command]], argv: list[str]) -> int:
    """Parses `argv`, runs the chosen command and returns its exit status."""
    command = tyro.extras.subcommand_cli_from_dict(
        dict(commands), prog=program, description=description, args=argv
    )
    return finish(command.run, as_json=command.json, debug=command.debug)
