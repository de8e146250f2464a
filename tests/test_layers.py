"""Imports point down the layers; Ray, Optuna and TensorBoard stay where they belong."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dmx"

# Lowest first (design.md, section 2). A file imports its own layer and lower ones, never a higher
# one. A new file is put where it belongs; what matches an earlier line is not looked at again.
LAYERS: list[tuple[str, str]] = [
    ("errors, log", "__init__ errors log process"),
    ("packages", "nn storage training search cluster study curriculum commands costing reporting"),
    (
        "values",
        "cli paths fitting wording registry schema overrides records resources "
        "tensorboard quiet_threads "
        "training.workers nn.device nn.allocator storage.patience storage.journal storage.claim "
        "commands.compute_flags commands.place_flags",
    ),
    ("objectives", "search.objectives search.brackets"),
    (
        "mathematics",
        "nn.packing nn.padding nn.parallel nn.dropout nn.functional nn.ends nn.optim",
    ),
    ("kinds", "attention attention.* tasks tasks.* gates gates.*"),
    ("model", "nn.model"),
    ("experiment", "config training.reference search.space search.space_file search.population"),
    ("data", "data data.*"),
    ("storage of a cluster", "storage.*"),
    ("checkpoints", "training.checkpoint training.transfer"),
    ("training", "training.*"),
    ("search", "search.*"),
    ("stages", "curriculum.stages curriculum.order curriculum.file curriculum.history"),
    (
        "plans",
        "curriculum.edits curriculum.planner curriculum.observer curriculum.precheck "
        "curriculum.promotion curriculum.stage_data",
    ),
    (
        "plans, shown",
        "curriculum.lineage study.files costing.count costing.probe costing.st*",
    ),
    (
        "ray",
        "cluster.connection cluster.size cluster.gang cluster.waiting "
        "cluster.launch study.trainable study.scheduler study.pbt "
        "study.budget study.config study.watchdog study.hooks",
    ),
    (
        "study",
        "study.study study.view study.live_view study.finals curriculum.stage_study "
        "curriculum.work",
    ),
    ("study's end", "study.end study.identity curriculum.view curriculum.dryrun"),
    (
        "control",
        "curriculum.room curriculum.side_work curriculum.controller curriculum.backend "
        "curriculum.show curriculum.session",
    ),
    (
        "reports",
        "commands.reading_options reporting.* report leaderboard costing.* cluster.gpu_packing",
    ),
    ("commands", "commands.* tune train curriculum.__main__ attention_maps __main__"),
]

# Who may import what, at the top of a file or within a function.
RAY = [
    *("cluster", "cluster.connection", "cluster.gang", "cluster.waiting"),
    *("cluster.gpu_packing", "cluster.launch"),
    *("study.trainable", "study.scheduler", "study.study", "study.hooks", "study.watchdog"),
    *("curriculum.backend", "data.ray_shards"),
]
OPTUNA = [
    *("search.sampling", "search.past", "search.proposals", "search.warm_start"),
    *("search.optuna_file", "search.trial_results", "search.telling", "search.ledger"),
    *("reporting.reading", "reporting.importance"),
]
# What a file imports only once it was asked for several workers.
LAZY = {
    "commands.train_workers": {"cluster", "cluster.connection", "cluster.gang"},
}
TENSORBOARD = ["tensorboard", "reporting.reading"]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else name


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> int:
    for number, (_, patterns) in enumerate(LAYERS):
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns.split()):
            return number
    pytest.fail(f"dmx/{module.replace('.', '/')}.py is in no layer; add it to LAYERS")


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


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    own = layer_of(module)
    for other in sorted(own_imports(module)):
        other_layer = layer_of(other)
        assert other_layer <= own, (
            f"{module} ({LAYERS[own][0]}) imports {other} ({LAYERS[other_layer][0]}), a higher one"
        )


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("ray", RAY), ("optuna", OPTUNA), ("tensorboard", TENSORBOARD)],
)
def test_who_imports_what(package, allowed):
    prefixes = {"tensorboard": ("tensorboard", "torch.utils.tensorboard")}.get(package, (package,))
    users = {
        module
        for module, path in FILES.items()
        if any(n == p or n.startswith(f"{p}.") for n in imports(path) for p in prefixes)
    }
    assert users <= set(allowed), f"{sorted(users - set(allowed))} must not import {package}"


def test_training_needs_no_ray():
    """Models, data, training and the single-run command are usable without Ray and Optuna."""
    seen: set[str] = set()
    waiting = ["train", "training.runner", "training.reference", "data.__main__"]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(own_imports(module) - LAZY.get(module, set()))
    assert {"nn.model", "config", "data.store"} <= seen
    assert not seen & (set(RAY) - {"data.ray_shards"})
    assert "search.ledger" not in seen


def test_a_refusal_need_not_wait_for_ray_tune():
    """It takes seconds to import, and is needed only once a study has been found sound."""
    code = "import sys, dmx.tune; sys.exit('ray.tune' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_import_cycles():
    """Within a layer as well: who imports whom is a tree one can read from top to bottom."""
    graph = {module: own_imports_at_top(module) for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def own_imports_at_top(module: str) -> set[str]:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dmx":
            for alias in node.names:
                name = f"{node.module}.{alias.name}".partition(".")[2]
                while name and name not in FILES:
                    name = name.rpartition(".")[0]
                if name and name != module:
                    found.add(name)
    return found


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
