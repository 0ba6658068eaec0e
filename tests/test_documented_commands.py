"""Every command that README, docs and `--help` show is one that the real parsers take."""

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import shlex
import typing

import pytest
import tyro

import data_prep.cli
import spacedrive_jax.cli.main
from spacedrive_jax.config import Config, load_config
from tests.conftest import ROOT

COMMANDS = {
    "spacedrive_jax": dict(spacedrive_jax.cli.main.COMMANDS),
    "data_prep": dict(data_prep.cli.COMMANDS),
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.is_file()]
SCRIPTS = [ROOT / "Makefile", *sorted((ROOT / "configs" / "launch").iterdir())]
PLACEHOLDERS = {"CONFIG": "demo", "PRESET": "demo", "spacedrive.json": "demo", "$config": "demo"}
"""What stands for a preset in the docs."""
CALL = re.compile(r"(?:python3?|\(RUN\)) -m (spacedrive_jax|data_prep) ([a-z][a-z0-9-]*)([^`\n]*)")


def calls(text):
    """Program, command and the rest of every call in a text."""
    text = re.sub(r"\\\n\s*", " ", text)
    for match in CALL.finditer(text):
        yield match[1], match[2], match[3]


def examples():
    for page in (*PAGES, *SCRIPTS):
        for program, name, rest in calls(page.read_text()):
            yield pytest.param(program, name, rest, id=f"{page.name}: {name}{rest}")
    for program, commands in COMMANDS.items():
        for name, command in commands.items():
            (example,) = re.findall(
                r"Example: (.*?)(?:\n\n|\Z)", inspect.cleandoc(command.__doc__), re.DOTALL
            )
            ((found, named, rest),) = calls(" ".join(example.split()))
            assert (found, named) == (program, name)
            yield pytest.param(program, name, rest, id=f"--help: {name}{rest}")


def arguments(rest):
    """The arguments of a call; brackets around what may be left out, comments and ellipses are no part."""
    rest = re.sub(r'\s#.*|\.\.\.|…|"\$@"|\s[|;&>].*', " ", rest)
    words = shlex.split(re.sub(r"[\[\]]", " ", re.sub(r"\$\(\w+\)", "2", rest)))
    return [PLACEHOLDERS.get(word.rpartition("/")[2], word) for word in words]


def parse(program, name, words):
    """Parses as the program does."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if name != "train":
                return tyro.cli(COMMANDS[program][name], args=words)
            command, rest = tyro.cli(COMMANDS[program][name], args=words, return_unknown_args=True)
            options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
            kind = tyro.conf.OmitSubcommandPrefixes[Config]
            tyro.cli(kind, default=load_config(command.config), args=rest, config=options)
            return command
    except SystemExit as stop:
        if stop.code == 0:  # --help
            return None
        raise AssertionError(f"{program} {name} {' '.join(words)} is not taken:\n{said.getvalue()}") from stop


@pytest.mark.parametrize(("program", "name", "rest"), list(examples()))
def test_the_parser_takes_it(program, name, rest):
    assert name in COMMANDS[program]
    words = arguments(rest)
    if not words:
        return  # the command by its name alone
    if "…" in rest or "..." in rest:
        shown = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert shown <= flags(COMMANDS[program][name])
        return
    command = parse(program, name, words)
    for preset in (getattr(command, "config", None), getattr(command, "run_config", None)):
        if isinstance(preset, str):
            load_config(preset)


def flags(command):
    given = {name.replace("_", "-") for name in names(command)}
    switches = {field.name for field in dataclasses.fields(command) if field.default is True}
    return {f"--{name}" for name in given} | {f"--no-{name.replace('_', '-')}" for name in switches}


def names(command):
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        given = [
            each.name for each in getattr(hints[field.name], "__metadata__", ()) if getattr(each, "name", 0)
        ]
        yield given[0] if given else field.name


def config_flags(kind=Config, place=""):
    """The flags of all fields, with and without the place of the vision-language model's parts."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{place}{field.name}"
        yield f"--{name.replace('_', '-')}"
        for inner in typing.get_args(hints[field.name]) or (hints[field.name],):
            if dataclasses.is_dataclass(inner):
                yield from config_flags(inner, f"{name}.")
                if field.name == "vlm":
                    yield from config_flags(inner)


FLAG = re.compile(r"(?<![\w-])(?<!var\()--(?!xla_)[a-z][a-z0-9_.-]*[a-z0-9]\b(?!: ?(?:#|\Z))")
OTHERS = {  # flags that no command of ours declares: whose they are
    "--dask_client_address": "Beam",
    "--dask_partition_size": "Beam",
    "--runner": "Beam",
    "--flink_master": "Beam",
    "--direct_num_workers": "Beam",
    "--direct_running_mode": "Beam",
    "--local-dir": "hf download",
    "--logdir": "TensorBoard",
    "--safe_serialization": "optimum",
    "--requirement": "pip",
    "--help": "every program",
    "--version": "every program, taken before its commands are parsed",
    "--list": "train, likewise",
}


def known_flags():
    known = {
        flag for commands in COMMANDS.values() for command in commands.values() for flag in flags(command)
    }
    return known | set(config_flags()) | set(OTHERS)


def texts():
    """Every text of the sources, docstrings too."""
    for room in COMMANDS:
        for file in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", node.value


def test_flags_that_texts_name_exist():
    known = known_flags()
    unknown = [
        f"{place}: {flag}"
        for place, text in texts()
        if not re.fullmatch(r"--\S*", text) or text in known
        for flag in FLAG.findall(text)
        if flag not in known
    ]
    assert unknown == []


def test_flags_that_pages_name_exist():
    known = known_flags()
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        known |= set(FLAG.findall(script.read_text()))
    unknown = [
        f"{page.name}: {flag}"
        for page in PAGES
        for flag in FLAG.findall(page.read_text())
        if flag not in known
    ]
    assert unknown == []
