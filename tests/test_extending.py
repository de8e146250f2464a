"""docs/extending.md is true: its code blocks, written where they say, give what it promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```(?:python|yaml|toml)\n# (\S+)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which the page's files exist."""
    copy = tmp_path_factory.mktemp("checkout")
    subprocess.run(
        ["cp", "-r", str(ROOT / "dmx"), str(ROOT / "search_spaces"), str(copy)], check=True
    )
    blocks = BLOCK.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"))
    assert {name for name, _ in blocks} >= {
        "dmx/attention/window.py",
        "parity.py",
        "pyproject.toml",
        "dmx/curriculum/gates/steady.py",
        "search_spaces/window.yaml",
    }
    for name, body in blocks:
        if name == "pyproject.toml":
            install(copy, tomllib.loads(body)["project"])
        else:
            (copy / name).write_text(body, encoding="utf-8")
    return copy


def install(site: Path, project: dict[str, Any]) -> None:
    """What pip leaves of a package beside its modules."""
    info = site / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    fields = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(fields, encoding="utf-8")
    (plugins,) = project["entry-points"].items()
    lines = [f"[{plugins[0]}]", *(f"{name} = {module}" for name, module in plugins[1].items())]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def run_in(checkout: Path, code: str, timeout: float = 120) -> str:
    """What a fresh Python prints that sees only the copy."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=checkout,
        env={"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_attention_runs_and_averages_a_window(checkout: Path) -> None:
    out = run_in(
        checkout,
        """
        import torch
        from dmx.attention import ATTENTIONS, AttentionConfig, MixerContext
        config = AttentionConfig.parse("window-3", "attention")
        mixer = config.build(MixerContext(length=4, num_heads=1, head_dim=1))
        v = torch.tensor([3.0, 6.0, 9.0, 12.0]).view(1, 1, 4, 1)
        print(mixer(v, v, v, torch.ones(1, 4)).flatten().tolist())
        """,
    )
    # Mean over three positions; avg_pool1d counts the zeros beyond the ends.
    assert out.strip() == "[3.0, 6.0, 9.0, 7.0]"


@pytest.mark.slow
def test_the_contract_holds_for_it_without_a_change(checkout: Path) -> None:
    """Every contract test, of it alone and within a butterfly; none of them needs packing."""
    for name in ("tests", "pyproject.toml", "docs"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(checkout)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "window",
         "tests/attention", "tests/nn/test_pretend_cuda.py"],
        cwd=checkout,
        env={"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.match(r"\.{30,} +\[100%\]\n", done.stdout), "none of them is skipped"


@pytest.mark.slow
def test_a_task_of_ones_own_is_searched_on_a_cpu(checkout: Path) -> None:
    """The page's, whose family is in no table, with a store by `write_store`; two trials."""
    run_in(
        checkout,
        """
        import sys
        from pathlib import Path
        import numpy as np
        from dmx import tune
        from dmx.data.store import Manifest
        from dmx.data.store_writer import write_store

        def fill(writer):
            draw = np.random.default_rng(0)
            for split in ("train", "dev", "test"):
                for _ in range(40):
                    ids = draw.integers(1, 3, 16)
                    writer.add(split, ids, int((ids == 1).sum() % 2))

        manifest = Manifest(
            task="parity", data_name="parity", origin="here", note="", num_classes=2,
            max_length=64, vocab_size=8, dtype="uint8",
        )
        write_store(Path("data/parity"), manifest, fill)
        sizes = ["--set", "model.num_layers=1", "--set", "model.embedding_dim=8"]
        words = ["--attention", "window", "--task", "parity", "--data-root", "data"]
        sys.exit(tune.main([*words, "--num-trials", "2", "--max-steps", "8", *sizes]))
        """,
        timeout=400,
    )
    summary = json.loads((checkout / "runs/window-parity/study.json").read_text(encoding="utf-8"))
    assert 0.0 <= summary["best"]["test_accuracy"] <= 1.0


def test_its_size_is_checked_before_training(checkout: Path) -> None:
    out = run_in(
        checkout,
        """
        from dmx.config import parse_run_config
        from dmx.errors import ConfigError
        try:
            parse_run_config({"task": "parity", "attention": "window-4"})
        except ConfigError as error:
            print(error)
        """,
    )
    assert out.strip() == "attention.window_size is 4; it must be odd and fit the length."


def test_the_search_space_and_the_task_are_found(checkout: Path) -> None:
    out = run_in(
        checkout,
        """
        from dmx.search.space import load_space
        from dmx.tasks import task_for
        task = task_for("parity")
        space = load_space("window", "parity")
        space.check("parity", {})
        print(task.max_length, sorted(space.distributions()))
        """,
    )
    assert out.strip() == "64 ['attention.window_size', 'optim.learning_rate']"


def test_the_gate_decides(checkout: Path) -> None:
    out = run_in(
        checkout,
        """
        from dmx.curriculum.gates.base import Gate
        from dmx.runs.curriculum import Attempt
        gate = Gate.parse({"name": "steady", "evaluations": 2, "max_swing": 0.05}, "gate")
        for curve in ((0.5,), (0.1, 0.5, 0.53), (0.5, 0.6)):
            reports = {step: {"dev_accuracy": value} for step, value in enumerate(curve)}
            attempt = Attempt(
                number=0, retry=0, config={}, source={}, spec={}, data={},
                curve=reports,
            )
            found = gate.decide(attempt)
            print(found.passed, found.reason)
        """,
    )
    assert out.splitlines() == [
        "False steady: only 1 evaluations",
        "True steady: swing 0.0300",
        "False steady: swing 0.1000",
    ]
