"""The leaderboard: seeds grouped, samples kept apart, costs shown, texts escaped."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmx import leaderboard, report
from dmx.cli import options as cli
from dmx.errors import ConfigError
from dmx.reporting.caveats import caveats, comparable
from dmx.reporting.leaderboard import (
    FORMATS,
    cell_text,
    gather,
    leaderboard_rows,
    leaderboards,
)
from dmx.reporting.report import latex_escape
from dmx.runs.folders import load
from dmx.runs.run import Run
from tests.reporting.makers import (
    config,
    curriculum_events,
    make_curriculum,
    make_run,
    make_study,
    write_curriculum,
)


def _root(tmp_path: Path) -> Path:
    """Three seeds on text, one reduced run, and a search on the sample."""
    root = tmp_path / "runs"
    for seed, test in ((1, 0.60), (2, 0.62), (3, 0.67)):
        make_run(root / f"full-{seed}", test, seed=seed)
    make_run(root / "short", 0.71, dev=0.9, train__num_steps=9000)
    make_study(root / "sample")
    return root


def test_runs_that_differ_in_seeds_share_an_entry(tmp_path: Path) -> None:
    found = leaderboard_rows(gather([_root(tmp_path)]))
    (full,) = [e for e in found if len(e["runs"]) == 3]
    values = [0.60, 0.62, 0.67]
    assert full["test_accuracy_mean"] == pytest.approx(statistics.fmean(values))
    assert full["test_accuracy_std"] == pytest.approx(statistics.stdev(values))
    assert (full["attention"], full["task"], full["how"]) == ("butterfly-64", "text", "fixed")
    assert full["steps"] == 20000 and full["parameters"] == 1000 and full["peak_memory_mb"] == 500
    assert not full["reduced_budget"] and full["complete"]
    (short,) = [e for e in found if e["runs"] == ("short",)]
    assert short["reduced_budget"] and short["steps"] == 9000


def test_the_same_seed_twice_is_one_seed(tmp_path: Path) -> None:
    """Two runs with 0.60 and 0.64 of seed 1 count as 0.62, beside 0.70 of seed 2."""
    for name, seed, test in (("a", 1, 0.60), ("again", 1, 0.64), ("b", 2, 0.70)):
        make_run(tmp_path / "r" / name, test, seed=seed, dev=test - 0.1)
    (entry,) = leaderboard_rows(gather([tmp_path / "r"]))
    assert entry["test"] == pytest.approx((0.62, 0.70))
    assert entry["dev"] == pytest.approx((0.52, 0.60))
    assert cell_text(entry).startswith("66.00 ± 5.66 (2)")
    (alone,) = leaderboard_rows(gather([tmp_path / "r" / "a", tmp_path / "r" / "again"]))
    assert cell_text(alone) == "62.00"


def test_runs_from_other_weights_are_another_entry(tmp_path: Path) -> None:
    """By the weights' content, not by their path; the cell shows the run from fresh weights."""
    made = {"fresh": None, "x": ("/r/A/best", "11"), "moved": ("/s/A/best", "11")}
    made["y"] = ("/r/C/best", "22")
    for seed, (name, start) in enumerate(made.items(), start=1):
        init = {} if start is None else {"init": {"path": start[0], "sha256": start[1]}}
        make_run(tmp_path / "r" / name, 0.5 + seed / 100, seed=seed, dev=seed / 10, **init)
    found = leaderboard_rows(gather([tmp_path / "r"]))
    assert sorted(e["runs"] for e in found) == [("fresh",), ("moved", "x"), ("y",)]
    assert {e["runs"]: e["init_from"] for e in found}["moved", "x"] == "A/best"
    (board,) = leaderboards(found)
    assert board.cells().rows == [("butterfly-64", "51.00")], "the run from fresh weights"
    text = FORMATS["md"]([board])
    assert "fixed, from A/best" in text and "53.50 ± 0.71" not in text.split("| task")[0]
    alone = leaderboards([e for e in found if e["init_from"] == "C/best"])
    only = FORMATS["md"](alone)
    assert "54.00§" in only and "§ started from the weights of another run." in only
    assert r"$^\S$" in FORMATS["latex"](
        leaderboards([e for e in found if e["init_from"] == "C/best"])
    )


def test_what_else_decides_a_result_parts_entries(tmp_path: Path) -> None:
    """The data's checksum and the precision used; another version of the code is marked."""
    made = (("a", "x", "fp32", "1a"), ("b", "x", "fp32", "2b"), ("c", "y", "fp32", "1a"))
    for seed, (name, data, precision, code) in enumerate(
        (*made, ("d", "x", "bf16", "1a+12345678"))
    ):
        folder = make_run(tmp_path / "r" / name, 0.6, seed=seed)
        path = folder / "best" / "metrics.json"
        environment = {"precision": precision, "code": code}
        more = {"data_checksum": data, "environment": environment}
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    found = {e["runs"]: e for e in leaderboard_rows(gather([tmp_path / "r"]))}
    assert sorted(found) == [("a", "b"), ("c",), ("d",)]
    assert found["a", "b"]["code"] == ["1a", "2b"] and "¶" in cell_text(found["a", "b"])
    assert "¶" not in cell_text(found["c",]) and "¶" in cell_text(found["d",])


def test_samples_never_share_a_table_with_lra(tmp_path: Path) -> None:
    found = leaderboards(leaderboard_rows(gather([_root(tmp_path)])))
    assert [b.is_sample for b in found] == [False, True]
    assert "not LRA" in found[1].title
    assert all(e["data"] == "text" for e in found[0].rows)
    text = FORMATS["md"](found)
    lra, sample = text.split("## Sample data")
    assert "47.00" in sample and "47.00" not in lra and "63.00" not in sample
    assert "**Not LRA" in sample and "Not LRA" not in lra


def test_part_of_the_data_is_another_table(tmp_path: Path) -> None:
    make_run(tmp_path / "r" / "a", 0.9)
    make_run(tmp_path / "r" / "b", 0.8, data="text (1,000 texts)")
    found = leaderboards(leaderboard_rows(gather([tmp_path / "r"])))
    assert [b.title for b in found] == ["LRA data", "generated or partial data"]
    assert found[1].cells().columns == ("attention", "text (1,000 texts)")


def test_a_task_of_ones_own_is_no_lra_data(tmp_path: Path) -> None:
    task = "pathfinder16-cl3-d1"
    own = config("butterfly-64", task)
    folder = make_run(tmp_path / "r" / "own", 0.9, data=task)
    (folder / "best" / "config.yaml").write_text(yaml.safe_dump(own))
    make_run(tmp_path / "r" / "lra", 0.8)
    found = gather([tmp_path / "r"])
    assert [b.title for b in leaderboards(leaderboard_rows(found))] == [
        "LRA data",
        "tasks that are not published",
    ]
    assert {run.name: comparable(run) for run in found} == {"lra": True, "own": False}
    (run,) = [run for run in found if run.name == "own"]
    assert f"{task} is no published task" in caveats(run)[0].text
    # A task of a plug-in that is not loaded here is nobody's published set either.
    unknown = load(tmp_path / "r" / "own")
    unknown.__class__ = type("Unknown", (Run,), {"task": "parity", "data": "parity"})
    assert not comparable(unknown) and caveats(unknown)[0].text.startswith("parity is no published")
    assert [b.title for b in leaderboards(leaderboard_rows([unknown]))] == [
        "tasks that are not published"
    ]


def test_a_full_run_is_shown_rather_than_a_better_short_one(tmp_path: Path) -> None:
    (board, _) = leaderboards(leaderboard_rows(gather([_root(tmp_path)])))
    assert board.cells().rows == [("butterfly-64", "63.00 ± 3.61 (3)")]
    assert cell_text(None) == "–"


def test_final_seeds_of_a_search_count_as_its_seeds(tmp_path: Path) -> None:
    seeds = {"seeds": [1, 2], "dev_accuracies": [0.5, 0.6], "test_accuracies": [0.4, 0.5]}
    make_study(tmp_path / "s", final=seeds)
    (entry,) = leaderboard_rows(gather([tmp_path / "s"]))
    assert entry["test"] == (0.4, 0.5) and entry["how"] == "search"
    assert cell_text(entry) == "45.00 ± 7.07 (2)†"
    make_study(tmp_path / "t")
    (single,) = leaderboard_rows(gather([tmp_path / "t"]))
    assert cell_text(single) == "47.00†*", "one seed, chosen by the search itself"


def test_order_of_tasks_and_sizes(tmp_path: Path) -> None:
    for name, attention, task in (
        ("a", "butterfly-256", "text"),
        ("b", "butterfly-64", "text"),
        ("c", "softmax", "listops"),
    ):
        make_run(tmp_path / name, data=task, attention=attention, task=task)
    (board,) = leaderboards(leaderboard_rows(gather([tmp_path])))
    assert board.cells().columns == ("attention", "listops", "text")
    assert [a for a, *_ in board.cells().rows] == ["butterfly-64", "butterfly-256", "softmax"]


def test_latex_is_escaped() -> None:
    assert latex_escape(r"50% of a_b & {c} \d ~ ^ #1 $2") == (
        r"50\% of a\_b \& \{c\} \textbackslash{}d \textasciitilde{} \textasciicircum{} \#1 \$2"
    )
    assert latex_escape("1 ± 2† –\n3*") == r"1 $\pm$ 2$^\dagger$ -- 3$^\ast$"


def test_latex_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaderboard.main([str(_root(tmp_path)), "--format", "latex"]) == 0
    text = capsys.readouterr().out
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    assert r"butterfly-64 & 63.00 $\pm$ 3.61 (3) \\" in text
    assert text.count("{") == text.count("}")
    assert r"\caption{Not LRA. Sample data: sample-bbc, not LRA. Test accuracy" in text


def test_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaderboard.main([str(_root(tmp_path)), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {(r["runs"], r["seeds"], r["is_sample"]) for r in rows} == {
        ("full-1 full-2 full-3", "3", "False"),
        ("short", "1", "False"),
        ("sample", "1", "True"),
    }


def test_html_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(_root(tmp_path))
    assert leaderboard.main([root, "--format", "html"]) == 0
    page = capsys.readouterr().out
    assert "<h2>LRA data</h2>" in page and "63.00 ± 3.61 (3)" in page and "<script" not in page
    assert "Not LRA: these numbers compare only with each other." in page.split("Sample data")[-1]
    assert leaderboard.main([root, "--format", "json"]) == 0
    full, *_ = json.loads(capsys.readouterr().out)
    assert full["test"] == [0.60, 0.62, 0.67] and full["test_accuracy_mean"] == pytest.approx(0.63)


def test_curriculum_is_an_entry(tmp_path: Path) -> None:
    (entry,) = leaderboard_rows(gather([make_curriculum(tmp_path / "c")]))
    assert entry["how"] == "curriculum" and entry["attention"] == "butterfly-32"
    assert not entry["complete"]
    assert cell_text(entry) == "–‡", "its last stage is not tested yet"


def _curriculum(folder: Path, seed: int, test: float, **more: Any) -> Path:
    events = curriculum_events(("a", None, [0.6, 0.7]), ("b", "a", [0.8]), last="b", seed=seed)
    for event in events:
        if event["event"] == "started":
            event["spec"].update(more)
    tested = {"event": "tested", "stage": "b", "on": "b", "accuracy": test, "time": 300.0}
    return write_curriculum(folder, [*events, tested])


def test_curricula_that_differ_in_seeds_alone_share_an_entry(tmp_path: Path) -> None:
    _curriculum(tmp_path / "one", 1, 0.70)
    _curriculum(tmp_path / "two", 2, 0.74)
    _curriculum(tmp_path / "other", 3, 0.90, gate={"name": "budget"})
    both, other = sorted(
        leaderboard_rows(gather([tmp_path])), key=lambda e: len(e["runs"]), reverse=True
    )
    assert both["runs"] == ("one", "two") and both["test_accuracy_mean"] == pytest.approx(0.72)
    assert cell_text(both).startswith("72.00 ± 2.83 (2)")
    assert other["runs"] == ("other",) and other["test_accuracy_mean"] == 0.90
    assert both["steps"] == 300, "200 of the first stage and 100 of the second, in each run"


def test_a_bad_run_never_hides_the_others(tmp_path: Path, capsys) -> None:
    root = _root(tmp_path)
    (root / "sample" / "best" / "metrics.json").write_text("{")
    make_curriculum(root / "torn")
    with (root / "torn" / "journal.jsonl").open("r+b") as file:
        file.write(b"junk")
    assert leaderboard.main([str(root)]) == 0
    assert "63.00 ± 3.61 (3)" in capsys.readouterr().out
    unread: list[str] = []
    gather([root], unread)
    assert len(unread) == 2 and "metrics.json is damaged" in unread[0] and "torn" in unread[1]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _root(tmp_path)
    (root / "sample" / "best" / "metrics.json").write_text("{")
    only = str(root / "sample")
    bad = [["--format", "x"], [str(tmp_path / "none")], [only], [str(root / "short" / "best")]]
    for argv in bad:
        with pytest.raises(SystemExit) as caught:
            cli.run("dmx.leaderboard", leaderboard.main, argv)
        assert caught.value.code == 2
        out = capsys.readouterr()
        assert out.err.count("\n") == 1 and not out.out
    target = tmp_path / "no" / "x.md"
    with pytest.raises(SystemExit) as caught:
        cli.run("x", leaderboard.main, [str(root / "short"), "--out", str(target)])
    assert caught.value.code == 2 and not target.parent.exists()


@pytest.mark.parametrize("command", [report.main, leaderboard.main])
def test_a_run_in_object_storage_is_told_apart(command) -> None:
    with pytest.raises(ConfigError, match=r"RUN s3://b/run is in object storage; copy it here"):
        command(["s3://b/run"])
