"""Both command lines: help that teaches, one clear error line, JSON last."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import data_prep.cli
import spacedrive_jax.cli.main
from data_prep.cli import Inspect
from spacedrive_jax import console
from spacedrive_jax.cli.common import use_compilation_cache
from spacedrive_jax.cli.drive import Drive
from spacedrive_jax.cli.evaluate import Evaluate
from spacedrive_jax.cli.predict import Predict
from spacedrive_jax.cli.report import Report, Show
from spacedrive_jax.cli.study import Study
from spacedrive_jax.cli.train import Train
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from tests.conftest import ROOT


@pytest.mark.parametrize("command", sorted(spacedrive_jax.cli.main.COMMANDS))
def test_every_command_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        spacedrive_jax.cli.main.main([command, "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert f"Example: python -m spacedrive_jax {command}" in " ".join(page.replace("│", " ").split())
    assert "--json" in page


@pytest.mark.parametrize("command", sorted(data_prep.cli.COMMANDS))
def test_every_data_command_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        data_prep.cli.main([command, "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert f"Example: python -m data_prep {command}" in " ".join(page.replace("│", " ").split())


@pytest.mark.parametrize("program", [spacedrive_jax.cli.main, data_prep.cli])
def test_the_overview_fits_on_a_screen(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    page = capsys.readouterr().out
    assert all(f"• {name} " in page for name in program.COMMANDS)
    assert len(page.splitlines()) < 60
    assert "Example: " not in page
    assert "COMMAND --help` shows a command's flags" in page


def test_train_lists_the_fields_of_a_config(capsys):
    with pytest.raises(SystemExit):
        spacedrive_jax.cli.main.main(["train", "demo", "--help"])
    page = capsys.readouterr().out
    assert "--train.learning-rate" in page
    assert "--data.depth.sources" in page


def test_errors_are_one_line_unless_debug(capsys):
    def fail():
        raise SpaceDriveError("file X lacks field Y: add it")

    assert console.finish(fail, as_json=True, debug=False) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: file X lacks field Y: add it\n"
    assert captured.out == ""
    assert console.finish(fail, as_json=False, debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train", "demo", "--run-dir"], ["evaluate", "--predictions"]])
def test_names_that_no_library_opens_are_refused_before_anything_runs(command, capsys):
    assert spacedrive_jax.cli.main.main([*command, "caf\udce9"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: 'caf\\udce9' is not UTF-8")
    assert said.count("\n") == 1
    # As where the current folder has such a name, which is seen where a library is handed the whole path.
    assert console.finish(lambda: {"": "caf\udce9".encode()}, as_json=False, debug=False) == 1
    assert capsys.readouterr().err == said


def test_a_librarys_traceback_is_logged_when_debugging_alone(capsys):
    def fail():
        try:
            raise ValueError("RESOURCE_EXHAUSTED: no space left")
        except ValueError:
            logging.getLogger("absl").exception("a thread ended")
        raise SpaceDriveError("the disk is full")

    assert console.finish(fail, as_json=False, debug=False) == 1
    assert capsys.readouterr().err == "error: a thread ended\nerror: the disk is full\n"
    assert console.finish(fail, as_json=False, debug=True) == 1
    assert "RESOURCE_EXHAUSTED" in capsys.readouterr().err


def test_json_is_the_last_line(capsys):
    assert console.finish(lambda: {"step": 3}, as_json=True, debug=False) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"step": 3}


@pytest.fixture
def said(monkeypatch, capsys):
    """What a command line with its log at a level writes to stderr."""

    def lines(level="info"):
        console.configure_logging(level)
        return capsys

    yield lines
    console.configure_logging()


def test_a_log_gets_a_line_now_and_then_and_nothing_of_short_tasks(monkeypatch, said):
    capsys = said()
    assert list(console.progress(range(3), desc="convert", unit="keyframe")) == [0, 1, 2]
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    with console.progress(total=4, desc="convert", unit="keyframe") as bar:
        for _ in range(2):
            bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" keyframes, ")[0] for line in lines[:3]] == [
        "convert: 0/4",
        "convert: 2/4",
        "convert: 4/4",
    ]
    assert all(" gone, " in line for line in lines)

    with console.progress(total=1, logged=False) as bar:
        logging.getLogger("spacedrive_jax.training.train").info("step 1/1")
        bar.update()
    assert capsys.readouterr().err == "step 1/1\n"


def test_a_quiet_command_says_warnings_and_draws_nothing(monkeypatch, said):
    capsys = said("warning")
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    list(console.progress(range(3), desc="convert"))
    logging.getLogger("spacedrive_jax.data").info("not said")
    logging.getLogger("data_prep.conversion").warning("a shard is damaged")
    assert capsys.readouterr().err == "warning: a shard is damaged\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(console.progress(range(2), desc="convert"))
    assert capsys.readouterr().err == ""


def test_debugging_names_module_and_level(said):
    capsys = said("debug")
    logging.getLogger("spacedrive_jax.data.loader").debug("read 3")
    assert capsys.readouterr().err.rstrip().endswith("DEBUG spacedrive_jax.data.loader: read 3")


def test_the_log_says_which_attention_kernel_runs(said):
    import jax.numpy as jnp

    from spacedrive_jax.models.attention import attend

    capsys = said()
    for length in (8, 1024, 1024):  # as for two layers, which is said once; where there is a choice
        states = jnp.zeros((1, length, 1, 4))
        attend(states, states, states, choice="auto")
    assert capsys.readouterr().err == "attention over 1024 tokens of 4 channels on cpu: blocks\n"


def test_output_goes_where_it_can(tmp_path):
    # An encoding without the page's characters, or names; and no stdout or stderr at all.
    for start, said in (("PYTHONIOENCODING=ascii", b"\\u2022 train"), ("", b"")):
        command = f"{start} {sys.executable} -m spacedrive_jax --help {'' if start else '>&- 2>&-'}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert said in done.stdout
    named = f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {sys.executable} -m data_prep inspect"
    done = subprocess.run(["bash", "-c", f"{named} {tmp_path}/ü"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"set LC_ALL=C.UTF-8" in done.stderr


@pytest.mark.parametrize("module", ["spacedrive_jax", "data_prep"])
def test_a_reader_that_leaves_early_ends_in_no_traceback(module):
    command = f"{sys.executable} -m {module} --help | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "usage:" in done.stdout
    assert done.stderr == ""


def test_both_command_lines_name_the_version(capsys):
    assert spacedrive_jax.cli.main.main(["--version"]) == 0
    assert data_prep.cli.main(["-V"]) == 0
    assert capsys.readouterr().out == f"spacedrive_jax {spacedrive_jax.__version__}\n" * 2


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(console.progress(range(2), desc="convert"))
    assert "100%|" in capsys.readouterr().err


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    chosen = {}
    monkeypatch.setattr("jax.config.update", chosen.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    use_compilation_cache()
    assert chosen == {}  # jax reads the variable itself
    use_compilation_cache(tmp_path / "flag")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is no folder that can be written to"):
        use_compilation_cache(tmp_path / "file" / "in")
    assert chosen == {"jax_compilation_cache_dir": str(tmp_path / "flag")}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("SPACEDRIVE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compilation_cache()
    assert chosen == {"jax_compilation_cache_dir": str(tmp_path / "spacedrive_jax" / "xla")}
    monkeypatch.setenv("SPACEDRIVE_CACHE", str(tmp_path / "chosen"))
    use_compilation_cache()
    assert chosen == {"jax_compilation_cache_dir": str(tmp_path / "chosen" / "xla")}


def test_too_little_device_memory_comes_with_advice(monkeypatch, capsys):
    import jax

    import spacedrive_jax.aot.search
    import spacedrive_jax.training.train

    monkeypatch.setattr(spacedrive_jax.aot.search, "what_fits", lambda config: "")

    def out_of_memory(*_arguments, **_options):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nBuffers: ..."
        )

    monkeypatch.setattr(spacedrive_jax.training.train, "train", out_of_memory)
    assert spacedrive_jax.cli.main.main(["train", "demo", "--data.records", "records"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the devices ran out of memory (RESOURCE_EXHAUSTED: Out of memory alloc")
    assert "--train.grad-accum-steps" in said
    assert said.count("\n") == 1


HEAVY = ("jax", "flax", "transformers", "tensorflow_datasets", "grain", "matplotlib", "cv2", "scipy")


@pytest.mark.parametrize("module", ["spacedrive_jax.cli.main", "data_prep.cli"])
def test_help_waits_for_no_heavy_library(module):
    code = (
        f"import sys, {module} as cli, contextlib\n"
        "with contextlib.suppress(SystemExit):\n    cli.main(['--help'])\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_output_replaces_what_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    one, other, run = Path("a.jsonl"), Path("b.json"), Path("run")
    scored = {"predictions": one, "compare": other, "records": Path("r")}
    predicted = {"checkpoint": run, "records": Path("r"), "overwrite": True}
    with pytest.raises(ConfigError, match=r"--out a.jsonl is the file of --predictions"):
        Evaluate(**scored, out=one)
    with pytest.raises(ConfigError, match=r"is the file of --compare"):
        Evaluate(**scored, out=Path("here/../b.json"))
    with pytest.raises(ConfigError, match="keep something else there: name another"):
        Evaluate(**scored, out=Path("r/provenance.json"))
    with pytest.raises(SpaceDriveError, match="/dev/null: it is a device"):
        Evaluate(**scored, out=Path("/dev/null"))
    with pytest.raises(ConfigError, match="keep something else there"):
        Report((run,), out=run / "metrics.jsonl")
    with pytest.raises(ConfigError, match="is the file of --predictions"):
        Report((run,), predictions=one, out=one)
    with pytest.raises(SpaceDriveError, match="root of the file system"):
        Evaluate(**scored, out=Path("/"))
    with pytest.raises(ConfigError, match=r"name it \.html"):
        Report((run,), out=run / "page.pdf").run()
    with pytest.raises(ConfigError, match="keep something else there"):
        Predict(**predicted, out=run / "metrics.jsonl")
    with pytest.raises(ConfigError, match="give one of the two"):
        Predict(**predicted, resume=True, out=run / "p.jsonl").run()
    with pytest.raises(ConfigError, match=r"x\.mp4 is the file of --(video|rerun)"):
        Drive(policy="expert", video=Path("x.mp4"), rerun=Path("x.mp4"))
    with pytest.raises(ConfigError, match="among the pictures"):
        Show(run, images=Path(), calibration=Path("c.json"), image=Path("CAM_FRONT.jpg")).run()


def test_what_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for flag in ("video", "rerun", "collect"):
        with pytest.raises(ConfigError, match=rf"--{flag} .*: the folder {tmp_path} cannot be written to"):
            Drive(policy="expert", **{flag: tmp_path / "new" / "x"})


def test_flags_that_would_say_nothing_are_refused():
    run = Path("run")
    with pytest.raises(ConfigError, match="--language-data goes with --task counterfactual"):
        Predict(run, Path("r"), language_data=Path("l")).run()
    with pytest.raises(ConfigError, match="--protocol and --workers go with several runs"):
        Report((run,), protocol="uniad").run()
    with pytest.raises(ConfigError, match="give one of them"):
        Train("demo", resume=True, overwrite=True, dry_run=True).run()
    with pytest.raises(ConfigError, match="give --resume with it"):
        Train("demo", accept_changes=True, overwrite=True).run()
    with pytest.raises(ConfigError, match="--depth-cache says whose depth --points lifts"):
        Inspect(run, depth_cache="full").run()
    with pytest.raises(ConfigError, match=r"--points a\.xyz: point clouds are written as \.ply"):
        Inspect(run, points=Path("a.xyz")).run()


def test_a_study_is_not_written_into_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for report in (True, False):
        with pytest.raises(ConfigError, match=r"--out .* holds config\.json: it is a run"):
            Study("encodings_readout", out=tmp_path, report=report).run()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_a_run_was_predicted_is_no_place_for_its_scores(tmp_path, capsys):
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text('{"token": "a", "waypoints": [], "text": "", "status": "unparsed"}\n')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    before = predictions.read_bytes()
    command = ["evaluate", str(tmp_path), "--records", str(tmp_path), "--out", str(predictions)]
    assert spacedrive_jax.cli.main.main(command) == 1
    assert "--predictions" in capsys.readouterr().err
    assert predictions.read_bytes() == before


def test_a_folder_that_is_gone_is_called_that(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    command = ["evaluate", "--predictions", "p.jsonl", "--records", "r"]
    assert spacedrive_jax.cli.main.main(command) == 1
    assert capsys.readouterr().err.startswith("error: the current folder was removed")


@pytest.mark.parametrize("columns", ["0", "1", "2"])
def test_help_on_the_narrowest_terminal_ends(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)  # tyro breaks lines without end there
    with pytest.raises(SystemExit):
        spacedrive_jax.cli.main.main(["report", "--help"])
    assert "--highlight" in capsys.readouterr().out


def test_coordinates_are_floored_to_no_grid_that_numbers_get_lost_in():
    for pitch in (1e-320, 1e30):
        with pytest.raises(ConfigError, match=r"--discrete-coords .* must be 0\.001 or more and at most 100"):
            Evaluate(discrete_coords=pitch)


def test_runs_to_hold_a_drive_against_are_looked_at_before_it_is_driven(tmp_path):
    with pytest.raises(DataError, match=r"no finished run of drives"):
        Drive(policy="expert", scenarios="tiny", out=tmp_path / "new", against=(tmp_path / "gone",)).run()
    with pytest.raises(ConfigError, match="this run's own folder"):
        Drive(policy="expert", scenarios="tiny", out=tmp_path / "new", against=(tmp_path / "new",)).run()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("url", ["ws://", "ws://:8000", "ws://host:0", "ws://host:99999", "ws://host:port"])
def test_addresses_that_no_server_has_are_not_waited_for(url, tmp_path):
    with pytest.raises(SpaceDriveError, match="is no address of a policy server"):
        Drive(checkpoint=url, scenarios="tiny", out=tmp_path / "new").run()
