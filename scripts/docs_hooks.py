"""Hooks of mkdocs: the order of the pages, and a reference page for every module of dmx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("index", "tutorial", "search", "curriculum", "reports", "tensorboard")
"""Pages that come first, where they exist; every other page of docs/ follows by name."""
REFERENCE = "reference"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the navigation: a new page in docs/ needs no entry anywhere."""
    pages = {path.stem: path.name for path in (ROOT / "docs").glob("*.md")}
    ordered = [name for name in FIRST if name in pages]
    ordered += sorted(pages.keys() - set(ordered))
    packages: dict[str, list[Any]] = {}
    for name in modules():
        packages.setdefault(name.rpartition(".")[0] or name, []).append(
            {name: f"{REFERENCE}/{name}.md"}
        )
    config.nav = [
        *(pages[name] for name in ordered),
        {"Reference": list(map(dict, _nav(packages)))},
    ]
    return config


def _nav(packages: dict[str, list[Any]]) -> list[dict[str, list[Any]]]:
    return [{package: pages} for package, pages in sorted(packages.items())]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each module; mkdocstrings fills it."""
    for name in modules():
        content = f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n"
        files.append(File.generated(config, f"{REFERENCE}/{name}.md", content=content))
    return files


def modules() -> list[str]:
    """Dotted names of dmx's modules, but for those whose name is private or that are packages."""
    found = []
    for path in sorted((ROOT / "dmx").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not path.stem.startswith("_"):
            found.append(name)
    return found
