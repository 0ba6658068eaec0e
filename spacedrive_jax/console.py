"""What every command line of the project shares: one clear error line, a log, progress, one JSON object.

A command is a frozen dataclass deriving from `Command`: its fields are its flags (tyro builds the
parser and the `--help` page from names, types and docstrings) and `run` does the work and returns what
`--json` prints.

Results go to stdout; what happens on the way goes through `logging`, which a command line sends to stderr
and a notebook configures as it likes (every module logs under its own name, below `spacedrive_jax` or
`data_prep`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro
from tqdm import tqdm

from spacedrive_jax import __version__
from spacedrive_jax.bounds import Bounds, check_bounds
from spacedrive_jax.buckets import MOUNT, is_bucket, place
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.io import require_replaceable, say
from spacedrive_jax.json_files import to_json
from spacedrive_jax.parallel import raise_on_signals

T = TypeVar("T")
LogLevel = Literal["debug", "info", "warning", "error"]
LOGGERS = ("spacedrive_jax", "data_prep")
"""The project's own: other libraries speak from warnings on."""

KEPT_NAMES = frozenset(
    (
        *("config.json", "run.json", "best.json", "metrics.jsonl", "wandb.json"),
        *("provenance.json", "dataset_info.json", "features.json", "weights.json", "spacedrive.json"),
    )
)
"""What makes a folder a run, records or weights: no flag's file may be called so."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Command:
    """Base of all commands."""

    json: tyro.conf.FlagCreatePairsOff[bool] = dataclasses.field(default=False, kw_only=True)
    """Print one JSON object with the results as the last line of stdout."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = dataclasses.field(default=False, kw_only=True)
    """Show the whole traceback when something fails."""
    log_level: LogLevel = dataclasses.field(default="info", kw_only=True)
    """How much to say on stderr; `debug` names module and time of every line."""
    quiet: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["-q"])] = dataclasses.field(
        default=False, kw_only=True
    )
    """Say warnings and errors only, and draw no progress: short for --log-level warning."""

    when_stopped: ClassVar[str] = "nothing was kept"
    """What a person who stopped the command (Ctrl-C, SIGTERM, SIGHUP) has to know."""
    when_out_of_memory: ClassVar[str] = "use fewer at a time, or more or larger devices"
    """What to do where the devices, or the machine, have too little memory for it."""
    BOUNDS: ClassVar[Bounds] = {}
    """What its numbers may be."""

    BUCKETS: ClassVar[tuple[str, ...]] = ()
    """Its flags that take a bucket's `gs://…` as well as a path."""
    WRITES: ClassVar[tuple[str, ...]] = ()
    """Its flags that name a file to write, which replaces what is there."""

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "--")
        self._check_outputs()
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            for path in given if isinstance(given, tuple) else (given,):
                if isinstance(path, _Refused):
                    raise ConfigError(f"--{field.name.replace('_', '-')} {path.why}")
                if is_bucket(path) and isinstance(path, os.PathLike) and field.name not in self.BUCKETS:
                    raise ConfigError(
                        f"--{field.name.replace('_', '-')} {os.fspath(path)}: this needs a disk; {MOUNT}"
                    )

    def _check_outputs(self) -> None:
        """Refuses to write over what is read, another output, what makes a folder a run, or a device."""
        given: dict[str, str] = {}
        for name in sorted((each.name for each in dataclasses.fields(self)), key=self.WRITES.__contains__):
            paths = getattr(self, name)
            for path in paths if isinstance(paths, tuple) else (paths,):
                if not isinstance(path, os.PathLike) or isinstance(path, _Refused):
                    continue
                real = os.fspath(path) if is_bucket(path) else os.path.realpath(path)
                if name in self.WRITES:
                    flag = f"--{name.replace('_', '-')} {os.fspath(path)}"
                    if real in given:
                        other = f"--{given[real].replace('_', '-')}"
                        raise ConfigError(
                            f"{flag} is the file of {other} too, and would replace it: name another"
                        )
                    if not is_bucket(path):
                        require_replaceable(path)
                        if os.path.dirname(real) == real:
                            raise ConfigError(f"{flag} is the root of the file system: name a place in it")
                        folder = next(each for each in Path(real).parents if os.path.exists(each))
                        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
                            raise ConfigError(f"{flag}: the folder {folder} cannot be written to")
                    if os.path.basename(real) in KEPT_NAMES:
                        raise ConfigError(
                            f"{flag}: runs, records or weights keep something else there: name another"
                        )
                given[real] = name

    def run(self) -> Mapping[str, Any]:
        """Does the work; the returned mapping is what `--json` prints."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Refused:
    """In place of a path that cannot be: tyro has words of its own for an error met while parsing."""

    why: str

    def __fspath__(self) -> str:
        return self.why


def _path_or_refused(given: list[str]) -> Any:
    try:
        return place(given[0])
    except ConfigError as error:
        return _Refused(str(error))


class Terminated(BaseException):
    """SIGTERM or SIGHUP: raised where the command is, so that it cleans up as on any other error."""


class _Stderr(logging.Handler):
    """Log lines on stderr, above a progress bar where there is one.

    A line is said once: what is logged while a program is traced comes again with every layer and program.
    """

    def __init__(self, *, verbose: bool, tracebacks: bool) -> None:
        super().__init__()
        self.setFormatter(_Format(verbose=verbose, tracebacks=tracebacks))
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if text not in self._said:
                self._said.add(text)
                tqdm.write(text, file=sys.stderr)
        except Exception:  # logging never stops the work (a closed pipe, a full disk)
            self.handleError(record)


class _Format(logging.Formatter):
    """The message alone at level info, with its level above; all about it when debugging."""

    def __init__(self, *, verbose: bool, tracebacks: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "%(message)s")
        self._verbose, self._tracebacks = verbose, tracebacks

    def format(self, record: logging.LogRecord) -> str:
        if not self._tracebacks:  # other libraries log pages of them for one full disk
            record = copy.copy(record)
            record.exc_info = record.exc_text = record.stack_info = None
        text = super().format(record)
        if self._verbose or record.levelno == logging.INFO:
            return text
        return f"{record.levelname.lower()}: {text}"


def configure_logging(level: LogLevel = "info", *, tracebacks: bool = False) -> None:
    """Sends log lines to stderr; called by the command line, never by the library.

    Args:
        level: the least serious that is shown of this project; other libraries' from warnings on.
        tracebacks: show those that belong to a line too, as at level debug.
    """
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _Stderr)]:
        root.removeHandler(handler)
    verbose = level == "debug"
    root.addHandler(_Stderr(verbose=verbose, tracebacks=tracebacks or verbose))
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level.upper())


def progress(iterable: Iterable[T] | None = None, *, logged: bool = True, **options: Any) -> tqdm:
    """A tqdm progress bar on stderr, which leaves stdout to results.

    Where stderr is no terminal, a line in the log takes the bar's place every `LOG_SECONDS`, so that a
    short task says nothing and a long one does not seem to hang. Where the log is quiet, so is this.

    Args:
        iterable: what to go through; None where the caller updates the bar.
        logged: False keeps the log free of these lines, where the caller says itself how far it is.
        options: tqdm's.
    """
    heard = log.isEnabledFor(logging.INFO)
    if sys.stderr.isatty():
        # A library used without a command line has no level of its own: there a terminal decides.
        return tqdm(
            iterable,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not heard and _is_configured(),
            **options,
        )
    return tqdm(
        iterable,
        disable=not (logged and heard),
        file=_LogLines(),
        bar_format=_LOG_LINE,
        miniters=1,
        mininterval=LOG_SECONDS,
        delay=LOG_SECONDS,
        **options,
    )


def note(text: str) -> None:
    """Logs a line at level info for code that has no name of its own to log under."""
    log.info("%s", text)


LOG_SECONDS = 30.0
_LOG_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {rate_fmt}, {elapsed} gone, {remaining} left{postfix}"


def _is_configured() -> bool:
    return any(isinstance(handler, _Stderr) for handler in logging.getLogger().handlers)


class _LogLines(io.TextIOBase):
    """What tqdm draws over and over on one line of a terminal, each drawing as a line of the log."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


def finish(
    action: Callable[[], Mapping[str, Any]],
    *,
    as_json: bool,
    debug: bool,
    log_level: LogLevel = "info",
) -> int:
    """Runs `action` under the project's command-line contract and returns the exit status."""
    command = getattr(action, "__self__", None)
    when_stopped = getattr(command, "when_stopped", Command.when_stopped)
    configure_logging(log_level, tracebacks=debug)
    try:
        with _raising_on_signals():
            outcome = action()
    except KeyboardInterrupt:
        print(f"interrupted; {when_stopped}", file=sys.stderr)
        return 130
    except Terminated as stopped:
        status: int = stopped.args[0]
        with contextlib.suppress(OSError):  # the terminal that was closed
            print(f"stopped by {signal.Signals(status - 128).name}; {when_stopped}", file=sys.stderr)
        return status
    except BrokenPipeError:
        raise  # whoever reads our output has seen enough: `until_the_reader_leaves`
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, SpaceDriveError):
            print(f"error: {error}", file=sys.stderr)
        elif is_out_of_memory(error):
            advice = getattr(command, "when_out_of_memory", Command.when_out_of_memory)
            print(f"error: out of memory ({first_line(error)}): {advice}", file=sys.stderr)
        elif isinstance(error, FileNotFoundError) and _here_is_gone():
            print(f"error: {GONE}", file=sys.stderr)
        elif isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
            print(f"error: {no_utf8(error.object)}", file=sys.stderr)  # the current folder's name, say
        elif isinstance(error, OSError) and error.errno and error.filename:
            print(f"error: {error.filename}: {say(error)}", file=sys.stderr)
        else:
            print(f"error: {type(error).__name__}: {error} (--debug shows the traceback)", file=sys.stderr)
        return 1
    if as_json:
        print(to_json(outcome, default=str), flush=True)
    return 0


def no_utf8(name: str) -> str:
    """What to do about a file's name that has lone surrogates."""
    return (
        f"{name!r} is not UTF-8, and records, checkpoints and weights cannot be opened by such a name: "
        "rename it, or, if it is UTF-8, set LC_ALL=C.UTF-8"
    )


GONE = "the current folder was removed: cd to one that is there, or give whole paths"


def _here_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether devices or machine had too little memory, which XLA says in its own words."""
    said = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said or "Out of memory" in said


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that XLA's have."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]


@contextlib.contextmanager
def _raising_on_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP unwind the command."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    restore = raise_on_signals(Terminated)
    try:
        yield
    finally:
        restore()


def run_command(command: Command) -> int:
    """Runs a parsed command and returns its exit status."""
    level: LogLevel = "warning" if command.quiet and command.log_level != "error" else command.log_level
    return finish(command.run, as_json=command.json, debug=command.debug, log_level=level)


def main(program: str, description: str, commands: Mapping[str, type[Command]], argv: list[str]) -> int:
    """Parses `argv`, runs the chosen command and returns its exit status."""
    if argv in (["--version"], ["-V"]):
        print(f"spacedrive_jax {__version__}")
        return 0
    if argv in ([], ["-h"], ["--help"]):  # the overview: a line each
        commands = {
            name: type(
                command.__name__,
                (command,),
                {"__doc__": inspect.cleandoc(command.__doc__ or "").split("\n\n")[0]},
            )
            for name, command in commands.items()
        }
    more = f"`{program} COMMAND --help` shows a command's flags and an example, --version the version."
    return parse_and_run(
        lambda: tyro.extras.subcommand_cli_from_dict(
            dict(commands), prog=program, description=f"{description.strip()}\n\n{more}", args=argv
        ),
        argv,
    )


def parse_and_run(parser: Callable[[], Command], argv: Sequence[str] = ()) -> int:
    """Parses a command line, runs its command and returns the exit status.

    Args:
        parser: parses `argv`.
        argv: the command line; a name that is not UTF-8 has lone surrogates, which neither array records nor
            checkpoints nor safetensors can be opened by.
    """
    try:
        for argument in argv:
            if argument != argument.encode("utf-8", "replace").decode():
                raise ConfigError(no_utf8(argument))
        command = parse(parser)
    except SpaceDriveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except FileNotFoundError:
        if not _here_is_gone():
            raise
        print(f"error: {GONE}", file=sys.stderr)
        return 1
    return run_command(command)


_PATHS = tyro.constructors.ConstructorRegistry()
"""How flags become paths: a bucket's are no `pathlib.Path`, which would lose a slash."""


@_PATHS.primitive_rule
def _path_rule(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    if kind.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_path_or_refused,
        is_instance=lambda value: hasattr(value, "__fspath__"),
        str_from_instance=lambda path: [str(path)],
    )


NARROWEST = 20
"""Columns of a terminal that help pages are made for at least."""


def parse(parser: Callable[[], T]) -> T:
    """Calls a parser of tyro's, whose error for a value that a dataclass refuses is that dataclass's own.

    tyro prints such an error as a page of its own and exits.

    Raises:
        SpaceDriveError: raised where a dataclass was made.
    """
    said = io.StringIO()
    if shutil.get_terminal_size().columns < NARROWEST:  # on fewer, tyro breaks lines without end
        os.environ["COLUMNS"] = str(NARROWEST)
    try:
        with contextlib.redirect_stderr(said), _PATHS:
            return parser()
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, SpaceDriveError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(said.getvalue())
        raise


def _open_streams() -> None:
    """Lets stdout and stderr take every text. Where one is closed (`>&-`) it goes nowhere: the next file that
    is opened would get its number, and what a library prints.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number and not os.path.exists(f"/dev/fd/{number}"):
                os.dup2(nowhere, number)
            setattr(sys, name, io.TextIOWrapper(io.FileIO(nowhere, "w"), "utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def until_the_reader_leaves(run: Callable[[], int]) -> int:
    """Runs a program whose output may be cut short (`… --help | head`), without a traceback.

    Nor does it fail, its work done, over a name that the terminal's encoding lacks, or without streams.

    Returns:
        The program's exit status, or that of a process ended by SIGPIPE as shells see it.
    """
    _open_streams()
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends; there must be somewhere for it to go.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return 128 + signal.SIGPIPE
