"""What every command line of the project shares: one clear error line, progress, one JSON object.

A command is a frozen dataclass deriving from `Command`: its fields are its flags (tyro builds the
parser and the `--help` page from names, types and docstrings) and `run` does the work and returns the
facts that `--json` prints.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

T = TypeVar("T")


class UserError(Exception):
    """Something the user can mend. The message names the file, field, shape or flag, and what to do."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Base of all commands."""

    json: tyro.conf.FlagCreatePairsOff[bool] = dataclasses.field(default=False, kw_only=True)
    """Print one JSON object with the results as the last line of stdout."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = dataclasses.field(default=False, kw_only=True)
    """Show the whole traceback when something fails."""

    def run(self) -> Mapping[str, Any]:
        """Does the work; the returned mapping is what `--json` prints."""
        raise NotImplementedError


def progress(iterable: Iterable[T] | None = None, **options: Any) -> tqdm:
    """A tqdm progress bar that shows on a terminal only, on stderr, and leaves stdout to results."""
    return tqdm(iterable, disable=None, dynamic_ncols=True, file=sys.stderr, **options)


def finish(action: Callable[[], Mapping[str, Any]], *, as_json: bool, debug: bool) -> int:
    """Runs `action` under the project's command-line contract and returns the exit status."""
    try:
        facts = action()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            print(f"error: {type(error).__name__}: {error} (--debug shows the traceback)", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(facts, default=str), flush=True)
    return 0


def main(program: str, description: str, commands: Mapping[str, type[Command]], argv: list[str]) -> int:
    """Parses `argv`, runs the chosen command and returns its exit status."""
    command = tyro.extras.subcommand_cli_from_dict(
        dict(commands), prog=program, description=description, args=argv
    )
    return finish(command.run, as_json=command.json, debug=command.debug)
