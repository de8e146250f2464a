"""Documentation: every command in it exists with its options, every link leads somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dmx.cli.completion import PARSERS, parser_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m (dmx\.\w+)((?:[^`\n#\\]|\\\n)*)")
SCRIPT = re.compile(r"\b(scripts/[\w/]+\.(?:py|sh))")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(command, its words) of every `python -m dmx.X ...`; a comment or a code mark ends one."""
    found = []
    for command, rest in COMMAND.findall(text):
        words = rest.replace("\\\n", " ").replace("|", " ").replace("[", " ").replace("]", " ")
        found.append((command, shlex.split(words)))
    return found


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_and_option_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for command, words in commands(text):
        assert command in PARSERS, f"{page.name} names {command}, which is no command"
        known = options(parser_of(command))
        for place, word in enumerate(words):
            if not re.match(r"--?[a-zA-Z]", word):
                continue
            name, equals, value = word.partition("=")
            name = name.rstrip(".,;:)")
            assert name in known, f"{page.name}: {command} has no option {name}"
            choices = known[name].choices
            if choices and not equals and place + 1 < len(words):
                value = words[place + 1]
            if choices and value and not value.isupper():
                assert value in choices, f"{page.name}: {command} {name} takes no {value}"


def test_what_is_found_is_what_is_written() -> None:
    """The finder itself: several lines, code marks, alternatives, comments."""
    text = "`python -m dmx.report RUN [--format md|json]` and\n"
    text += "python -m dmx.tune --a b \\\n  --c  # no"
    assert commands(text) == [
        ("dmx.report", ["RUN", "--format", "md", "json"]),
        ("dmx.tune", ["--a", "b", "--c"]),
    ]


def test_enough_is_found() -> None:
    """Otherwise the tests above would prove nothing."""
    found = [c for page in PAGES for c, _ in commands(page.read_text(encoding="utf-8"))]
    assert set(found) == set(PARSERS), "each command is in the documentation"
    assert len(found) >= 30


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_scripts_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"
    for script in SCRIPT.findall(text):
        assert (ROOT / script).is_file(), f"{page.name} names {script}"


def test_examples_in_help_are_true_as_well() -> None:
    for command in PARSERS:
        for named, words in commands(parser_of(command).format_help()):
            known = options(parser_of(named))
            used = [w.partition("=")[0] for w in words if w.startswith("--")]
            assert set(used) <= set(known), f"{command} --help: {named} {used}"


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    """As CI builds it: a broken link, a page or a docstring that cannot be read is an error."""
    words = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "index":
            assert f'href="{page.stem}/"' in index, f"{page.name} is in the menu"
    reference = tmp_path / "site" / "reference" / "dmx.attention.base" / "index.html"
    assert "grouping" in reference.read_text(encoding="utf-8")
