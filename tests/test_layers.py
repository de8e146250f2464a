"""Imports point down the layers; Ray, Optuna and TensorBoard stay where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dmx"

# Lowest first. A package, or a module beside the packages, imports only what stands above it here.
LAYERS = """
    errors format terminal process schema registry
    storage runs tensorboard
    tasks data nn attention model config training search costs
    cluster study curriculum reporting cli
    report leaderboard tune train attention_maps
    __main__
""".split()  # noqa: SIM905

# Edges that still point up. None may be added.
UPWARD: set[tuple[str, str]] = set()

# Packages and modules that may import them, at the top of a file or within a function.
RAY = {"cluster", "study", "curriculum", "data"}
OPTUNA = {"search", "reporting"}
TENSORBOARD = {"tensorboard", "reporting", "runs"}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else name


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def package_of(module: str) -> str:
    """A package's `__main__` is a door to dmx.cli, above all of them."""
    return "__main__" if module.endswith("__main__") else module.partition(".")[0]


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            found.update(inner for part in node.body for inner in ast.walk(part))
    return found


def imports(path: Path) -> set[str]:
    """Dotted names a file imports anywhere, `from a import b` as a.b; not those for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = type_checking_only(tree)
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def own_imports(module: str) -> set[str]:
    """Modules of dmx that a module imports."""
    found = set()
    for name in imports(FILES[module]):
        head, _, rest = name.partition(".")
        if head != "dmx":
            continue
        while rest and rest not in FILES:
            rest = rest.rpartition(".")[0]
        if rest and rest != module:
            found.add(rest)
    return found


def test_packages_import_downwards():
    upward = set()
    for module in FILES:
        own = package_of(module)
        assert own in [*LAYERS, "__init__"], f"{own} is in no layer; add it to LAYERS"
        for other in map(package_of, own_imports(module)):
            if other != own and LAYERS.index(other) > LAYERS.index(own):
                upward.add((own, other))
    assert upward == UPWARD, "an edge that points up was added, or is gone from the code only"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("ray", RAY), ("optuna", OPTUNA), ("tensorboard", TENSORBOARD)],
)
def test_who_imports_what(library, allowed):
    prefixes = {"tensorboard": ("tensorboard", "torch.utils.tensorboard")}.get(library, (library,))
    users = {
        package_of(module)
        for module, path in FILES.items()
        if any(n == p or n.startswith(f"{p}.") for n in imports(path) for p in prefixes)
    }
    assert users <= allowed, f"{sorted(users - allowed)} must not import {library}"


@pytest.mark.parametrize(
    ("module", "library"), [("train", "ray"), ("train", "optuna"), ("tune", "ray.tune")]
)
def test_a_command_imports_late_what_takes_seconds(module, library):
    """A single run needs no Ray; a refusal does not wait for Ray Tune."""
    code = f"import sys, dmx.{module}; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("module", FILES)
def test_a_file_says_its_job_in_its_first_line(module):
    docstring = ast.get_docstring(ast.parse(FILES[module].read_text(encoding="utf-8")))
    assert docstring, f"{FILES[module]} has no docstring"
    assert len(docstring.splitlines()[0].strip()) >= 10


def test_readme_tree_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^dmx/\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert tree, "README has no tree of dmx/"
    named = 0
    for line in tree[1].splitlines():
        below = PACKAGE if line.startswith("  ") else ROOT
        words = re.split(r" {2,}(?=[^ ])", line.strip())[0].split()
        for word in words:
            if word.endswith((".py", "/")):
                assert (below / word).exists(), f"README names {below / word}, which does not exist"
                named += 1
    assert named >= 25
    packages = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert packages <= set(re.findall(r"(\w+)/(?=[ \n])", tree[1])), "a package is not in README"


def test_only_the_commands_know_of_argparse():
    """What lies below them takes plain arguments, so that it can be called from Python."""
    users = {package_of(module) for module, path in FILES.items() if "argparse" in imports(path)}
    assert users <= {"cli"}
