"""lra_all.sh prints the seeds' runs; bench_search.py's curves are read off correctly."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from pathlib import Path

import pytest
from search_curves import Curve, describe, plot, read_curve, summarise, table

from dmx.cli.train import parser as train_parser
from tests.reporting.makers import make_study

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "lra_all.sh"


def _run(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def _commands(out: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in out.splitlines() if line.startswith("+ ")]


def test_block_sizes_are_the_seeds(tmp_path: Path) -> None:
    done = _run("--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {
        c[c.index("--task") + 1]: c[c.index("--attention") + 1] for c in _commands(done.stdout)[:-1]
    }
    assert found == {
        "listops": "butterfly-64",
        "text": "butterfly-256",
        "retrieval": "butterfly-128",
        "image": "butterfly-32",
        "pathfinder32-curv_contour_length_14": "butterfly-128",
    }
    assert _commands(done.stdout)[-1][1:] == ["-m", "dmx.leaderboard", "runs"]
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_seeds_settings_and_continuing(tmp_path: Path) -> None:
    done_before = tmp_path / "r" / "lra-butterfly-32-image-seed2023"
    done_before.mkdir(parents=True)
    (done_before / "result.json").write_text("{}")
    (tmp_path / "r" / "lra-butterfly-32-image-seed2024").mkdir()
    options = ["--dry-run", "--seeds", "3", "--tasks", "image", "--storage", "r"]
    done = _run(*options, "--", "train.num_steps=10", "optim.warmup_steps=3", cwd=tmp_path)
    first, second, _ = _commands(done.stdout)
    assert "lra-butterfly-32-image-seed2023 is done." in done.stdout
    assert "--resume" in first and "--resume" not in second
    args = train_parser().parse_intermixed_args(second[3:])
    assert args.name == "lra-butterfly-32-image-seed2025" and args.storage == "r"
    assert args.settings == [
        *("train.seed=2025", "data.seed=125", "train.num_steps=10", "optim.warmup_steps=3")
    ]


def test_studies(tmp_path: Path) -> None:
    options = [
        "--dry-run",
        "--studies",
        "--attention",
        "nystrom",
        "--tasks",
        "text",
        "--seeds",
        "2",
    ]
    (command, _) = _commands(_run(*options, "--data-root", "/a b", cwd=tmp_path).stdout)
    assert command[1:7] == ["-m", "dmx.tune", "--attention", "nystrom", "--task", "text"]
    assert command[command.index("--data-root") + 1] == "/a b"
    assert command[command.index("--final-seeds") + 1] == "2"


@pytest.mark.parametrize(
    "options", [["--seeds", "0"], ["--seeds"], ["--frob"], ["--dry-run", "--tasks", "unknown"]]
)
def test_bad_options(tmp_path: Path, options: list[str]) -> None:
    done = _run(*options, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("lra_all.sh: ")


def _curves() -> list[Curve]:
    return [
        Curve(method="random", seed=0, points=((10, 0.5), (50, 0.6), (90, 0.7))),
        Curve(method="tpe+asha", seed=0, points=((5, 0.4), (20, 0.7), (80, 0.8))),
        Curve(method="random", seed=1, points=((10, 0.5), (100, 0.9))),
        Curve(method="tpe+asha", seed=1, points=((5, 0.4), (60, 0.6))),
    ]


def test_curves_are_read_between_their_points() -> None:
    curve = _curves()[0]
    assert math.isnan(curve.at(9)) and curve.at(10) == 0.5 and curve.at(89) == 0.6
    assert curve.reaches(0.55) == 50 and curve.reaches(0.8) == math.inf


def test_summary_by_hand() -> None:
    found = summarise(_curves(), 100)
    assert found["random_best_mean"] == pytest.approx(0.8)
    assert found["tpe_asha_best_mean"] == pytest.approx(0.7)
    assert found["seeds_that_reached"] == 1
    assert found["median_share_of_budget"] is None, "of 20 % and never"
    assert found["mean_share_of_budget"] is None, "0.7 at the end, and 0.8 is wanted"
    assert [p["tpe_asha_steps"] for p in found["seeds"]] == [20, None]
    json.dumps(found, allow_nan=False)
    words = " ".join(describe({**found, "task": "t", "attention": "a", "data": "x, not LRA"}))
    assert "the median is beyond the budget" in words and "not LRA." in words
    assert "final bests: within the budget it does not" in words
    better = [*_curves()[:3], Curve(method="tpe+asha", seed=1, points=((40, 0.95),))]
    found = summarise(better, 100)
    assert found["median_share_of_budget"] == pytest.approx(0.3)
    assert found["mean_share_of_budget"] == pytest.approx(0.4), "(0.7 + 0.95) / 2 after 40 steps"
    words = " ".join(describe({**found, "task": "t", "attention": "a", "data": "x"}))
    assert "in 2 of 2 seeds, after 30 % of the compute (median of all seeds)" in words


def test_the_benchmarks_tables_by_hand() -> None:
    lines = table(summarise(_curves(), 100), _curves())
    assert lines[2] == "| random | 50.00 | 50.00 | 50.00 | 55.00 | 55.00 | 80.00 |"
    assert lines[3] == "| tpe+asha | 40.00 | 55.00 | 55.00 | 65.00 | 70.00 | 70.00 |"
    assert lines[-2] == "| 0 | 70.00 | 90 | 80.00 | 20 | 20% |"
    assert lines[-1] == "| 1 | 90.00 | 100 | 60.00 | not reached | more than 100 % |"


def test_a_studys_curve_ends_at_the_budget(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s")
    whole = read_curve(folder, "random", 0, 100)
    assert [s for s, _ in whole.points] == [2, 4, 8, 10, 12, 14, 18]
    assert whole.at(100) == 0.5
    assert read_curve(folder, "random", 0, 11).at(100) == 0.4


def test_plot_stands_alone() -> None:
    import xml.etree.ElementTree as ElementTree

    svg = ElementTree.fromstring(plot(_curves(), 100, "a <b> & c"))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    colours = [e.get("style", "") for e in svg.iter() if e.tag.endswith("path")]
    lines = [c for c in colours if "var(--best" in c or "var(--pruned" in c]
    assert len(lines) == 4 + 2
    assert svg.findtext("{*}title") == "Search efficiency (data: a <b> & c)"
