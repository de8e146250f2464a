"""A built wheel alone is enough: it has all files, and every line that installs it is right."""

from __future__ import annotations

import ast
import email.parser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CHECK = """
import sys
from pathlib import Path
import dmx
assert Path(dmx.__file__).is_relative_to(sys.argv[1]), dmx.__file__
from dmx.registry import find_yaml, shipped_names
from dmx.search.space import load_space
from dmx.tasks import task_for, task_names
from dmx.attention import ATTENTIONS
for name in shipped_names("search_spaces"):
    assert find_yaml(name, "search_spaces").is_relative_to(sys.argv[1])
    load_space(name, "text").check("text", {})
assert find_yaml("search_spaces/butterfly.yaml", "search_spaces").is_relative_to(sys.argv[1])
print(" ".join(shipped_names("search_spaces")))
print(" ".join(shipped_names("curricula")))
print(len(task_names()), len(ATTENTIONS.names()))
"""
INSTALL = re.compile(r"pip install(?: [^\s'`\"]+)*? '?(dmx[\w-]*)(?:\[(\w+)\])?['`\"\s);]")
"""A line that installs dmx: which distribution, which extra."""


def files(folder: Path, ending: str = "py") -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob(f"*.{ending}")}


def installs() -> list[tuple[Path, str, str]]:
    """(file, distribution, extra) of every line that a user is told to type."""
    folders = [ROOT / name for name in ("dmx", "docs", "scripts", "search_spaces", "curricula")]
    found = [p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".md", ".yaml")]
    found += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [
        (path, *match.groups(default=""))
        for path in found
        for match in INSTALL.finditer(path.read_text(encoding="utf-8"))
    ]


def run(words: list[str | Path], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves build/ and an egg-info behind
    source.mkdir()
    for name in ("dmx", "search_spaces", "curricula", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    run([*command, "-w", str(folder)], source)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel, and what it needs from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "zz.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # after its own
    return python


def test_every_package_is_in_the_wheel():
    """setup.cfg lists them one by one: one that it lacks is there in a checkout only."""
    listed = re.search(r"^packages =\n((?: +\S+\n)+)", (ROOT / "setup.cfg").read_text(), re.M)
    assert listed
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "dmx").rglob("__init__.py")
    }
    assert set(listed[1].split()) == found | {"dmx.search_spaces", "dmx.curricula", "dmx.docs"}


def test_every_line_that_installs_names_this_distribution():
    """PyPI's `dmx` is another package: it would be installed, and with it a stranger's code."""
    found = installs()
    assert {path.name for path, _, extra in found if extra} >= {
        *("README.md", "search.md", "cluster.md", "reports.md", "samplers.py", "samples.py"),
        *("ray-cluster.yaml", "rayjob.yaml"),
    }
    for path, name, _ in found:
        assert name == "dmx-lra", path


def test_messages_name_no_page_that_only_a_checkout_has():
    for path in (ROOT / "dmx").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                assert not re.search(r"docs/\w+\.md", str(node.value)), f"{path}:{node.lineno}"


@pytest.mark.slow
def test_a_wheel_has_every_file_and_says_where_it_comes_from(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert files(tmp_path / "dmx") == files(ROOT / "dmx"), "every module is in the wheel"
    assert files(tmp_path / "dmx" / "docs", "md") == files(ROOT / "docs", "md")
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    said = email.parser.Parser().parsestr(metadata.read_text(encoding="utf-8"))
    assert said["Name"] == "dmx-lra"
    urls = said.get_all("Project-URL", [])
    assert any("github.com/tsumansapkota/Solving-LRA-PathX" in url for url in urls), urls
    assert {extra for _, _, extra in installs() if extra} <= set(said.get_all("Provides-Extra"))


@pytest.mark.slow
def test_search_spaces_come_with_a_wheel(installed, tmp_path):
    home = installed.parents[1]
    done = run([installed, "-c", CHECK, home], tmp_path)
    spaces, curricula, _ = done.stdout.splitlines()
    assert spaces.split() == sorted(p.stem for p in (ROOT / "search_spaces").glob("*.yaml"))
    assert curricula.split() == sorted(p.stem for p in (ROOT / "curricula").glob("*.yaml"))


@pytest.mark.slow
def test_commands_work_without_a_checkout(installed, tmp_path):
    said = run([installed, "-m", "dmx"], tmp_path).stdout
    page = said.split()[-1]
    assert Path(page).is_file() and Path(page).is_relative_to(installed.parents[1]), said
    words = ["--attention", "butterfly", "--task", "listops", "--dry-run"]
    said = run([installed, "-m", "dmx.tune", *words], tmp_path, COLUMNS="80").stdout
    assert "butterfly" in said and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_line_that_installs_finds_the_wheel_in_an_empty_environment(wheel, tmp_path):
    """As pip would, from the wheel's folder; what it depends on is not fetched."""
    venv.create(tmp_path / "empty", with_pip=True, symlinks=True)
    wanted = {f"{name}[{extra}]" if extra else name for _, name, extra in installs()}
    assert len(wanted) >= 5
    words = ["-m", "pip", "install", "--dry-run", "--no-deps", "--no-index"]
    words += ["--find-links", str(wheel.parent), *sorted(wanted)]
    done = run([tmp_path / "empty" / "bin" / "python", *words], tmp_path)
    assert "Would install dmx-lra-" in done.stdout
    assert "does not provide the extra" not in done.stderr, done.stderr
