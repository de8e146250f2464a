"""The page, and the other formats: complete, self-contained, escaped, and plain about the data."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dmx import cli, report
from dmx.errors import ConfigError
from dmx.reporting.caveats import caveats, comparable
from dmx.reporting.collect import collect
from dmx.reporting.html import render
from dmx.reporting.markdown import escape as markdown_escape
from dmx.reporting.markdown import render as markdown
from dmx.reporting.markup import Markup, el, join
from tests.reporting.makers import TRIALS, make_curriculum, make_run, make_study

VOID = {"meta", "br", "hr", "link"}
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


def test_elements_escape_what_is_no_markup() -> None:
    assert el("p", EVIL, title=EVIL).count("<") == 2
    assert el("p", Markup("<b>x</b>"), "<") == "<p><b>x</b>&lt;</p>"
    assert (
        el("a", class_="x", data_y=None, text_anchor="end") == '<a class="x" text-anchor="end"></a>'
    )
    assert join("a<", None, el("br")) == "a&lt;<br>"
    with pytest.raises(AssertionError):
        el("p onclick=x")


@pytest.mark.parametrize("make", [make_study, make_run, make_curriculum])
def test_page_is_whole_and_loads_nothing(tmp_path: Path, make) -> None:
    page = Page(render(collect(make(tmp_path / "x"))))
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


def test_whatever_a_run_says_is_escaped(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "a<b>&'\"", error=EVIL, data=EVIL + ", not LRA")
    study = json.loads((folder / "study.json").read_text())
    study["environment"] = {"gpus": [EVIL], "argv": [EVIL], "machine": EVIL, "dmx": EVIL}
    study["attention"] = EVIL
    (folder / "study.json").write_text(json.dumps(study))
    text = render(collect(folder))
    page = Page(text)
    assert not page.tags() & {"script", "img", "b<b"} and "\x00" not in text
    assert page.text.count("<script>alert(1)</script>") >= 3, "shown as text"


def test_study_page_says_what_it_found(tmp_path: Path) -> None:
    page = Page(render(collect(make_study(tmp_path / "s"))))
    for words in ("best dev accuracy", "50.00 %", "47.00 %", "optim.learning_rate=0.002"):
        assert words in page.text
    assert "a stand-in for text" in page.text and "not LRA" in page.text
    assert "8 of 20,000 optimizer steps (0.04 %)" in page.text
    assert "Not a comparison" in page.text and "Linear Trans." in page.text
    assert "3 scored trials are too few" in page.text
    charts = [a for t, a in page.elements if t == "svg" and a.get("class") == "chart"]
    assert len(charts) == 4 + 2 + 2 + 1  # curves, slices, fronts, rungs
    points = [a for t, a in page.elements if t == "polyline" and a.get("points")]
    assert all(re.fullmatch(r"[\d., -]+", a["points"] or "") for a in points)


def test_curriculum_page_shows_lineage_and_gates(tmp_path: Path) -> None:
    page = Page(render(collect(make_curriculum(tmp_path / "c"))))
    for words in ("easy", "harder", "waiting", "below 0.8", "refused", "after 2 attempts"):
        assert words in page.text
    arrows = [a for t, a in page.elements if t == "path" and a.get("class") == "arrow"]
    assert len(arrows) == 2


def test_a_study_without_any_trial_has_a_page(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s", [])
    for name in ("study.json", "optuna.journal", "journal.jsonl"):
        (folder / name).unlink()
    page = Page(render(collect(folder)))
    assert "The study has not ended: 0 trials have." in page.text


def test_full_runs_on_whole_data_may_be_compared(tmp_path: Path) -> None:
    full, short = (
        collect(make_run(tmp_path / "a")),
        collect(make_run(tmp_path / "b", train__num_steps=9000)),
    )
    assert comparable(full) and not comparable(short)
    assert "9,000 of 20,000 optimizer steps (45 %)" in caveats(short)[0].text
    part = collect(make_run(tmp_path / "c", data="text (1,000 texts)"))
    assert not comparable(part)
    assert not comparable(collect(make_run(tmp_path / "d", test=None)))


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
    folder = make_study(tmp_path / "s", [("FAILED", 32, 1e-3, {})] * 2, best=None)
    run = collect(folder)
    assert any(
        c.text.startswith("All trials failed, the first because: the loss is not finite.")
        for c in caveats(run)
        if c.level == "severe"
    )
    for text in (Page(render(run)).text, markdown(run)):
        assert "All trials failed" in text and "1 seed" not in text and "no test yet" in text
    assert "Test accuracy:" not in markdown(run)


def test_a_long_table_of_trials_is_folded(tmp_path: Path) -> None:
    trials = [("COMPLETE", 32, 1e-3, {8: 0.3 + n / 1000}) for n in range(60)]
    page = Page(render(collect(make_study(tmp_path / "s", trials))))
    assert "The best 25 of 60." in page.text and "The other 35 trials" in page.text
    shown, _, folded = page.text.partition("The other 35 trials")
    assert "35.90" in shown and "30.00" in folded.partition("Optimisation and learning")[0]


def test_markdown_of_a_curriculum_speaks_of_stages(tmp_path: Path) -> None:
    run = collect(make_curriculum(tmp_path / "c"))
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
    (folder / "study.json").write_text("{")
    assert _code([str(folder)]) == 2 and page.read_text() == "old"
    with pytest.raises(ConfigError, match="is a folder"):
        report.write_whole(tmp_path, "x")
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_the_old_page(tmp_path: Path, monkeypatch) -> None:
    page = tmp_path / "r.html"
    page.write_text("old")
    whole = Path.write_text

    def half(self: Path, text: str, **options) -> None:
        whole(self, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(ConfigError, match="No space left"):
        report.write_whole(page, "new text")
    assert page.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_folder_of_runs_gets_a_page_each(tmp_path: Path, capsys, caplog) -> None:
    root = tmp_path / "runs"
    make_run(root / "a")
    make_study(root / "b")
    make_curriculum(root / "c")
    (root / "b" / "study.json").write_text("{")
    assert report.main([str(root)]) == 0
    pages = [root / name / "report.html" for name in "ac"]
    assert capsys.readouterr().out == "".join(f"{page}\n" for page in pages)
    assert all(page.read_text().startswith("<!doctype html>") for page in pages)
    (text,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "left out" in text and "study.json is damaged" in text
    assert not (root / "b" / "report.html").exists()
