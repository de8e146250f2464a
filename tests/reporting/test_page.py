"""The page, and the other formats: complete, self-contained, escaped, and plain about the data."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dmx import report
from dmx.cli import options as cli
from dmx.errors import ConfigError
from dmx.reporting.caveats import caveats, comparable
from dmx.reporting.importance import importances
from dmx.reporting.report import markdown_escape, write_file
from dmx.reporting.report import to_html as render
from dmx.reporting.report import to_markdown as markdown
from dmx.runs.folders import load
from dmx.runs.run import Run
from dmx.runs.trial import Trial, describe_failures
from tests.reporting.makers import TRIALS, make_curriculum, make_run, make_study
from tests.tiny import one_sentence

VOID = {"meta", "br", "hr", "link", "img"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&\x00"


class Page(HTMLParser):
    """Checks nesting while it collects elements, attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data) -> None:
        self.text += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


@pytest.mark.parametrize("make", [make_study, make_run, make_curriculum])
def test_page_is_whole_and_loads_nothing(tmp_path: Path, make) -> None:
    page = Page(render(load(make(tmp_path / "x"))))
    assert not page.tags() & {"script", "link", "img", "iframe", "object", "form", "base"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert "src" not in attributes and "srcset" not in attributes
        target = attributes.get("href") or "#"
        assert target.startswith("#") or (tag == "a" and target.startswith("https://"))
    ids = {a.get("id") for _, a in page.elements}
    for tag, attributes in page.elements:
        if tag == "a" and (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids
    assert "url(http" not in page.text and "@import" not in page.text
    assert "NaN" not in page.text.replace("NaN becomes", "") and "nan" not in page.text.split()


@pytest.mark.parametrize("make", [make_study, make_run, make_curriculum])
def test_the_same_run_gives_the_same_bytes(tmp_path: Path, make) -> None:
    folder = make(tmp_path / "x")
    assert render(load(folder)) == render(load(folder))


def test_samples_and_attention_maps_are_on_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x")
    samples = {"indices": [7, 9], "labels": [1, 0], "predictions": [1, 1]}
    samples["probabilities"] = [[0.25, 0.75], [0.4, 0.6]]
    (folder / "best" / "samples.json").write_text(json.dumps(samples))
    (folder / "attention_maps").mkdir()
    (folder / "attention_maps" / "example-7-layer-0.png").write_bytes(b"not looked into")
    page = Page(render(load(folder)))
    assert "What the model says" in page.text and "75.0" in page.text
    (picture,) = [a for t, a in page.elements if t == "img"]
    assert (picture["src"] or "").startswith("data:image/png;base64,")
    assert picture["alt"] == "attention map: example-7-layer-0"
    (folder / "best" / "samples.json").write_text("{")
    assert "75.0" not in render(load(folder)), "a view that is damaged is left out"


def test_whatever_a_run_says_is_escaped(tmp_path: Path) -> None:
    environment = {"gpus": [EVIL], "code": EVIL, "machine": EVIL, "dmx": EVIL}
    folder = make_study(
        tmp_path / "a<b>&'\"",
        **{"error": EVIL, "data": EVIL + ", not LRA", "attention": EVIL},
        environment=environment,
    )
    text = render(load(folder))
    page = Page(text)
    assert not page.tags() & {"script", "img", "b<b"} and "\x00" not in text
    assert page.text.count("<script>alert(1)</script>") >= 3, "shown as text"


def test_study_page_says_what_it_found(tmp_path: Path) -> None:
    page = Page(render(load(make_study(tmp_path / "s"))))
    for words in ("best dev accuracy", "50.00 %", "47.00 %", "optim.learning_rate=0.002"):
        assert words in page.text
    assert "a stand-in for text" in page.text and "not LRA" in page.text
    assert "8 of 20,000 optimizer steps (0.04 %)" in page.text
    assert "Not a comparison" in page.text and "Linear Trans." in page.text
    assert "3 scored trials are too few" in page.text
    charts = [a for t, a in page.elements if t == "svg" and a.get("class") == "chart"]
    assert len(charts) == 4 + 2 + 1 + 2 + 1  # curves, slices, parallel view, fronts, rungs
    assert "trial 2: 50.00 %, 8 steps; block_size=64, learning_rate=0.002" in page.text


def test_curriculum_page_shows_lineage_and_gates(tmp_path: Path) -> None:
    page = Page(render(load(make_curriculum(tmp_path / "c"))))
    for words in ("easy", "harder", "waiting", "below 0.8", "refused", "after 2 attempts"):
        assert words in page.text
    stages = [a["class"] for t, a in page.elements if t == "li"]
    assert stages == ["stage passed", "stage passed", "stage waiting"]
    assert sum(t == "ol" for t, _ in page.elements) == 1, "one chain: each stands after its parent"


def test_a_study_without_any_trial_has_a_page(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s", [], num_trials=0)
    page = Page(render(load(folder)))
    assert "The study has not ended: 0 trials have." in page.text


def test_full_runs_on_whole_data_may_be_compared(tmp_path: Path) -> None:
    full, short = (
        load(make_run(tmp_path / "a")),
        load(make_run(tmp_path / "b", train__num_steps=9000)),
    )
    assert comparable(full) and not comparable(short)
    assert "9,000 of 20,000 optimizer steps (45 %)" in caveats(short)[0].text
    part = load(make_run(tmp_path / "c", data="text (1,000 texts)"))
    assert not comparable(part)
    assert not comparable(load(make_run(tmp_path / "d", test=None)))


def test_json_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_study(tmp_path / "s")
    assert report.main([str(folder), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"] == 2 and found["comparable_with_published"] is False
    assert found["pareto"]["peak_memory_mb"][0]["trial"] == 2
    assert [t["status"] for t in found["trials"]] == [t[0] for t in TRIALS]
    assert report.main([str(folder), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [r["best_dev_accuracy"] for r in rows] == ["0.4", "0.2", "0.5", ""]
    assert rows[0]["attention.block_size"] == "32" and rows[3]["error"]


def test_a_study_of_failures_says_so(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s", [("FAILED", 32, 1e-3, {})] * 2)
    run = load(folder)
    assert (
        "All trials failed as trial 0: the loss is not finite; search smaller learning rates, or "
        "set train.clip_gradient_norm=1.0."
    ) in [c.text for c in caveats(run) if c.level == "severe"]
    for text in (Page(render(run)).text, markdown(run)):
        assert "All trials failed" in text and "1 seed" not in text and "no test yet" in text
    assert "Test accuracy:" not in markdown(run)


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        (["the loss is not finite at step 3", "", "the loss is not finite at step 12"],
         "3 of 4 trials failed, 2 of them as trial 0: the loss is not finite at step 3; search "),
        (["x is 3.5e-2, y", "x is 7, y", "other"], "3 of 4 trials failed, 2 of them as trial 0: x"),
        (["out of memory with one sequence at a time (64 positions); take a smaller model."],
         "1 of 4 trials failed as trial 0: out of memory with one sequence at a time (64 positions"
         "); take a smaller model; a smaller model or train.micro_batch_size needs less memory"),
        (["RuntimeError: odd"], "RuntimeError: odd; trials/0000/error.txt may tell more."),
        (["", "", "", ""], "All trials failed as trial 0: it left no message; "),
    ],
)  # fmt: skip
def test_what_failed_most_in_one_sentence(errors, words) -> None:
    """Errors that differ in a number are one kind."""
    whole = [Trial(number=n, status="COMPLETE") for n in range(len(errors), 4)]
    failed = [Trial(number=n, status="FAILED", error=e) for n, e in enumerate(errors)]
    assert words in one_sentence(describe_failures([*failed, *whole]))
    assert describe_failures(whole) == "" and describe_failures([]) == ""


def _notes(run: Run) -> str:
    return " ".join(c.text for c in caveats(run) if c.level == "note")


def test_the_dev_splits_noise_is_told(tmp_path: Path) -> None:
    """400 examples at 50 %: 1.96 * sqrt(0.25 / 400) = 4.9 points; 46 % lies within, 40 % not."""
    trials = [("COMPLETE", 32, 1e-3, {8: a}) for a in (0.40, 0.46, 0.50)]
    told = _notes(load(make_study(tmp_path / "s", trials, dev=(400, 0.2))))
    assert "has 400 examples: an accuracy of 50.00 % on it is uncertain by ±4.90 points" in told
    assert "1 other trial lies within that of the best, whose lead may be luck." in told
    assert "uncertain" not in _notes(load(make_study(tmp_path / "old", trials)))


def test_values_at_the_end_of_what_was_searched_are_told(tmp_path: Path) -> None:
    """9.9e-3 is 0.998 of the way from 1e-4 to 1e-2 by its logarithm, 5e-3 is 0.85."""
    rest = [("COMPLETE", 32, 1e-3, {8: 0.3})] * 5
    at = make_study(tmp_path / "at", [*rest, ("COMPLETE", 64, 9.9e-3, {8: 0.5})])
    told = _notes(load(at))
    assert (
        "The best trial's optim.learning_rate of 0.0099 lies at the upper end of what was" in told
    )
    assert "block_size of" not in told, "of two choices one is always at an end"
    inside = make_study(tmp_path / "in", [*rest, ("COMPLETE", 64, 5e-3, {8: 0.5})])
    assert "lies at the" not in _notes(load(inside))
    few = make_study(tmp_path / "few", [("COMPLETE", 64, 9.9e-3, {8: 0.5})])
    assert "lies at the" not in _notes(load(few))
    three = {
        "attention.block_size": ["choice", 16, 32, 64],
        "optim.learning_rate": ["uniform", 0, 1],
    }
    choices = make_study(
        tmp_path / "three", [*rest, ("COMPLETE", 64, 1e-4, {8: 0.5})], searched=three
    )
    told = _notes(load(choices))
    assert "attention.block_size of 64 lies at the upper end" in told
    assert "learning_rate of" not in told, "below 0 there is nothing"


def test_at_chance_nothing_is_said_of_what_mattered(tmp_path: Path, monkeypatch) -> None:
    """60 looks: p < 0.05/60 is 3.14 deviations of sqrt(0.25/400) = 2.5 points: 57.8 %."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    draw = random.Random(0)

    def study(name: str, best: float, **more: Any) -> Run:
        scores = [draw.uniform(0.45, 0.55) for _ in range(59)] + [best]
        rates = [10 ** draw.uniform(-4, -2) for _ in scores]
        trials = [("COMPLETE", 32, r, {8: a}) for r, a in zip(rates, scores, strict=True)]
        return load(make_study(tmp_path / name, trials, **more))

    run = study("noise", 0.575, dev=(400, 0.5))
    assert run.at_chance and importances(run).values == {}
    assert "Within 8 steps, which all trials took, none is above chance" in importances(run).note
    assert "it sits at chance" in _notes(run) and "lies at the" not in _notes(run)
    found = study("found", 0.58, dev=(400, 0.5))
    assert not found.at_chance and importances(found).values
    assert not study("unknown", 0.575).at_chance


def test_a_long_table_of_trials_is_folded(tmp_path: Path) -> None:
    trials = [("COMPLETE", 32, 1e-3, {8: 0.3 + n / 1000}) for n in range(60)]
    page = Page(render(load(make_study(tmp_path / "s", trials))))
    assert "The best 25 of 60." in page.text and "The other 35 trials" in page.text
    shown, _, folded = page.text.partition("The other 35 trials")
    assert "35.90" in shown and "30.00" in folded.partition("Optimisation and learning")[0]


def test_markdown_of_a_curriculum_speaks_of_stages(tmp_path: Path) -> None:
    run = load(make_curriculum(tmp_path / "c"))
    assert run.data_checksum == "ab" * 32
    text = markdown(run)
    assert "## Configuration of stage harder" in text and "(stage harder)" in text
    assert "(trial" not in text


def test_markdown_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert markdown_escape("a|b\n<c> *d*") == r"a\|b \<c\> \*d\*"
    folder = make_study(tmp_path / "s", error="x | y\n# z <b>")
    assert report.main([str(folder), "--format", "md"]) == 0
    text = capsys.readouterr().out
    assert "x \\| y \\# z \\<b\\>" in text and "\n# z" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def _code(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run("dmx.report", report.main, argv)
    return int(caught.value.code or 0)


def test_bad_input_is_one_sentence_and_code_2(tmp_path: Path, capsys) -> None:
    folder = make_study(tmp_path / "s")
    before = sorted(p.name for p in folder.iterdir())
    (tmp_path / "file").write_text("x")
    bad = [
        [str(tmp_path / "none")],
        [str(folder), "--format", "pdf"],
        [str(folder), "--out", str(tmp_path / "no" / "r.html")],
        [str(folder), "--out", str(tmp_path / "file" / "r.html")],
        [str(folder), "--out", str(tmp_path)],
        [str(folder), "--out", ""],
        [str(folder), "--out", "/"],
        [""],
        ["--wrong"],
    ]
    for argv in bad:
        assert _code(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("dmx.report: ") and err.count("\n") == 1, err
    assert sorted(p.name for p in folder.iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "s"]


def test_page_is_written_whole_or_not_at_all(tmp_path: Path, capsys) -> None:
    folder = make_study(tmp_path / "s")
    assert report.main([str(folder)]) == 0
    page = folder / "report.html"
    assert capsys.readouterr().out == f"{page}\n" and page.read_text().endswith("</html>\n")
    assert not list(folder.glob(".*.new-*"))
    page.write_text("old")
    (folder / "best" / "metrics.json").write_text("{")
    assert _code([str(folder)]) == 2 and page.read_text() == "old"
    with pytest.raises(ConfigError, match="is a folder"):
        write_file(tmp_path, "x")
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_the_old_page(tmp_path: Path, monkeypatch) -> None:
    page = tmp_path / "r.html"
    page.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_file(page, "new text")
    assert page.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_folder_of_runs_gets_a_page_each(tmp_path: Path, capsys, caplog) -> None:
    root = tmp_path / "runs"
    make_run(root / "a")
    make_study(root / "b")
    make_curriculum(root / "c")
    (root / "b" / "best" / "metrics.json").write_text("{")
    assert report.main([str(root)]) == 0
    pages = [root / name / "report.html" for name in "ac"]
    assert capsys.readouterr().out == "".join(f"{page}\n" for page in pages)
    assert all(page.read_text().startswith("<!doctype html>") for page in pages)
    (text,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "left out" in text and "metrics.json is damaged" in text
    assert not (root / "b" / "report.html").exists()
