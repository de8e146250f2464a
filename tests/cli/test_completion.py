"""The TAB key, in a real bash: options, values, run names; and that nothing heavy runs for it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dmx.cli.completion import PARSERS, parser_of
from dmx.cli.leaderboard import LEADERBOARD_FORMATS
from dmx.cli.report import REPORT_FORMATS
from dmx.reporting import leaderboard, report

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
source {activation}
COMP_LINE={line}
COMP_POINT=${{#COMP_LINE}}
COMP_TYPE=9
read -r -a COMP_WORDS <<< "$COMP_LINE"
[[ "$COMP_LINE" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_python_argcomplete_global {python}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completions(line: str, folder: Path, **environment: str) -> list[str]:
    """What bash would offer after `python -m LINE`, in a folder."""
    import argcomplete

    activation = Path(argcomplete.__file__).parent / "bash_completion.d" / "_python-argcomplete"
    whole = f"{sys.executable} -m {line}"
    # The shell knows Python by a name that begins with python, as users type it.
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    python = bin_folder / "python"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
    whole = f"python -m {line}"
    script = SCRIPT.format(
        activation=shlex.quote(str(activation)), line=shlex.quote(whole), python="python"
    )
    path = f"{bin_folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [word.rstrip() for word in done.stdout.splitlines() if word.strip()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with two runs."""
    for name in ("butterfly-text", "softmax-text"):
        (tmp_path / "runs" / name / "best").mkdir(parents=True)
    (tmp_path / "own.yaml").write_text("x: 1\n")
    return tmp_path


def test_options_and_values_of_tune(folder: Path) -> None:
    assert {"--attention", "--task"} <= set(completions("dmx.tune --", folder))
    assert "--resume" in completions("dmx.tune --task text --re", folder)
    assert completions("dmx.tune --attention bu", folder) == ["butterfly"]
    assert completions("dmx.tune --task listo", folder) == ["listops"]
    assert {"asha", "none"} <= set(completions("dmx.tune --scheduler ", folder))
    assert {"butterfly", "nystrom", "own.yaml"} <= set(completions("dmx.tune --space ", folder))
    assert completions("dmx.tune --resume --name b", folder) == ["butterfly-text"]


def test_commands_are_answered_without_torch_and_ray(folder: Path) -> None:
    """Stand-ins that cannot be imported come first on the path."""
    for name in ("torch", "ray", "optuna", "tensorboard"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported')\n")
    path = f"{folder}:{ROOT}"
    assert completions("dmx.tune --attention sof", folder, PYTHONPATH=path) == ["softmax"]
    assert completions("dmx.train --task text --att", folder, PYTHONPATH=path) == ["--attention"]
    assert "pathx" in completions("dmx.curriculum p", folder, PYTHONPATH=path)
    assert "listops" in completions("dmx.data l", folder, PYTHONPATH=path)
    assert completions("dmx.leaderboard --format l", folder, PYTHONPATH=path) == ["latex"]
    assert completions("dmx.report runs/b", folder, PYTHONPATH=path) == ["runs/butterfly-text/"]


def test_curricula_and_their_stages(folder: Path) -> None:
    found = completions("dmx.curriculum p", folder)
    assert {"pathx", "pathx-mini"} <= set(found)
    assert "nogap" in completions("dmx.curriculum pathx --until no", folder)


def test_settings_of_train(folder: Path) -> None:
    found = completions("dmx.train --task text optim.l", folder)
    assert [word.rstrip("=") for word in found] == ["optim.learning_rate"]


def test_other_programs_that_import_dmx_are_left_alone(tmp_path: Path) -> None:
    """Only `python -m dmx.COMMAND` is answered; a program of the user's own imports dmx freely."""
    program = tmp_path / "own.py"
    program.write_text("import dmx\nprint('goes on')\n")
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "_ARGCOMPLETE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "goes on\n", done.stderr


@pytest.mark.parametrize("command", PARSERS)
def test_every_command_is_marked_for_argcomplete(command: str) -> None:
    place = ROOT.joinpath(*command.split("."))
    path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    assert "PYTHON_ARGCOMPLETE_OK" in path.read_text(encoding="utf-8")[:1024]


@pytest.mark.parametrize("command", PARSERS)
def test_help_teaches_by_example(command: str) -> None:
    shown = parser_of(command).format_help()
    assert shown.count(f"python -m {command}") >= 3, "usage and several examples"


def test_no_command_is_missing() -> None:
    """Whatever asks the shell for completion or is a package's __main__ is a command.

    But for dmx/__main__.py, which lists them.
    """
    commands = {
        f"dmx.{p.stem}"
        for p in (ROOT / "dmx").glob("*.py")
        if p.stem != "__main__" and "PYTHON_ARGCOMPLETE_OK" in p.read_text(encoding="utf-8")
    }
    commands |= {f"dmx.{p.parent.name}" for p in (ROOT / "dmx").glob("*/__main__.py")}
    assert commands == set(PARSERS)


def test_the_formats_offered_are_those_that_exist() -> None:
    assert tuple(report.FORMATS) == REPORT_FORMATS
    assert tuple(leaderboard.FORMATS) == LEADERBOARD_FORMATS
