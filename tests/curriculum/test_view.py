"""TensorBoard: every evaluation once, global steps that only rise, boundaries; and the picture."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dmx.curriculum.config import CurriculumConfig
from dmx.curriculum.controller import Key, Message
from dmx.curriculum.run import run_curriculum
from dmx.curriculum.views import (
    STAGE_NUMBER,
    TENSORBOARD_DIR,
    TensorBoardView,
    show_status,
    write_lineage,
)
from dmx.data.store import open_store
from dmx.reporting.leaderboard import cell_text, leaderboard_rows
from dmx.reporting.report import write_report
from dmx.runs import layout
from dmx.runs.curriculum import Curriculum
from dmx.runs.folders import load
from dmx.runs.layout import DEV_ACCURACY
from dmx.storage.files import sha256_file
from dmx.storage.journal import Journal, read_journal
from dmx.training.evaluation import EvaluationJob
from tests import tiny
from tests.curriculum.fakes import (
    LATE_TASK,
    OTHER_TASK,
    FakeBackend,
    chain,
    chain_file,
    curriculum,
    run,
)
from tests.tiny import TASK, write_tiny

GOOD = [0.5, 0.7, 0.8, 0.75]


def read(folder: Path, name: str) -> EventAccumulator:
    found = EventAccumulator(str(folder / TENSORBOARD_DIR / name))
    found.Reload()
    return found


def points(folder: Path, name: str, tag: str) -> list[tuple[int, float]]:
    return [(e.step, round(e.value, 6)) for e in read(folder, name).Scalars(tag)]


def session(config: CurriculumConfig, folder: Path, backend: FakeBackend, **more: Any) -> None:
    events = read_journal(folder / layout.JOURNAL_FILE)[0]
    view = TensorBoardView(config, folder, events)
    run(
        config,
        folder,
        backend,
        observers=(view.event, lambda record, event: write_lineage(config, record)),
        **more,
    )
    view.close()


def prepared(root: Path) -> Path:
    for task in (TASK, OTHER_TASK, LATE_TASK):
        write_tiny(root, task)
    return root


def test_one_curve_over_all_stages(tmp_path: Path) -> None:
    root, folder = prepared(tmp_path / "data"), tmp_path / "run"
    config = chain(b={"gate": {"name": "threshold", "at_least": 0.9}, "on_fail": "retry"})
    backend = FakeBackend({"a": [GOOD], "b": [GOOD, [0.9] * 4], "c": [GOOD]}, root)
    session(config, folder, backend, selected=["a", "b"])
    session(config, folder, backend)  # another session continues the same files
    curve = points(folder, "curriculum", DEV_ACCURACY)
    # Four attempts of 8 steps, one of them in vain, evaluated every 2: nothing missing or twice.
    assert [step for step, _ in curve] == list(range(2, 33, 2))
    assert [value for _, value in curve] == [*GOOD, *GOOD, *[0.9] * 4, *GOOD]
    numbers = dict(points(folder, "curriculum", STAGE_NUMBER))
    assert [numbers[s] for s in (2, 10, 18, 32)] == [1, 2, 2, 3]
    rows = {
        stage: read(folder, f"stages/{stage}").PluginTagToContent("hparams")
        for stage in ("a", "b-attempt-1")
    }
    for stage, found in rows.items():
        started = HParamsPluginData.FromString(found["_hparams_/session_start_info"])
        assert started.session_start_info.group_name == f"run/{stage}"
        assert started.session_start_info.hparams["data"].string_value.endswith("(tiny)")
    boundaries = read(folder, "curriculum").Tensors("stage/text_summary")
    assert [e.step for e in boundaries] == [0, 8, 16, 24]
    assert points(folder, "stages/b-attempt-1", DEV_ACCURACY)[0] == (2, 0.9)
    assert points(folder, "curriculum", "test_accuracy_on_last_stage")[-1] == (32, 0.25)


def test_a_branch_has_its_own_curve(tmp_path: Path) -> None:
    root, folder = prepared(tmp_path / "data"), tmp_path / "run"
    tree = curriculum(
        {"name": "a"}, {"name": "b", "init_from": "a"}, {"name": "c", "init_from": "a"}
    )
    session(tree, folder, FakeBackend({n: [GOOD] for n in "abc"}, root))
    for name in ("curriculum", "curriculum-c"):
        assert [s for s, _ in points(folder, name, DEV_ACCURACY)] == list(range(2, 17, 2))


def test_what_was_reset_leaves_the_curve(tmp_path: Path) -> None:
    root, folder = prepared(tmp_path / "data"), tmp_path / "run"
    session(chain(), folder, FakeBackend({n: [GOOD] for n in "abc"}, root))
    with Journal(folder / layout.JOURNAL_FILE) as journal:
        journal.append(event="reset", stages=["b", "c"], time=0.0)
    session(chain(), folder, FakeBackend({n: [GOOD, [0.6] * 4] for n in "abc"}, root))
    curve = points(folder, "curriculum", DEV_ACCURACY)
    assert [s for s, _ in curve] == list(range(2, 25, 2))
    assert [v for _, v in curve] == [*GOOD, *[0.6] * 8]


def test_the_picture_shows_every_stage(tmp_path: Path) -> None:
    root, folder = prepared(tmp_path / "data"), tmp_path / "run"
    stop = {"gate": {"name": "threshold", "at_least": 0.9}}
    session(chain(b=stop), folder, FakeBackend({n: [GOOD] for n in "abc"}, root))
    text = (folder / "lineage.md").read_text()
    assert text.count("```") == 2 and "s0 --> s1" in text and "s1 --> s2" in text
    assert "| b | failed | a |" in text and "| c | waiting |" in text
    assert Curriculum.read(folder).stage("b").status == "failed"


def branched(*more: dict[str, Any]) -> CurriculumConfig:
    """A -> b, then stages that start from a."""
    return curriculum({"name": "a"}, {"name": "b"}, *({**m, "init_from": "a"} for m in more))


def test_an_appended_branch_is_not_the_last_stage(tmp_path: Path) -> None:
    root, folder = prepared(tmp_path / "data"), tmp_path / "run"
    session(branched(), folder, FakeBackend({n: [GOOD] for n in "ab"}, root))
    backend = FakeBackend({"side": [GOOD]}, root)
    session(branched({"name": "side"}), folder, backend)
    assert backend.tested == [("side", "side"), ("side", "b")], "no other stage is tested again"
    lineage = json.loads((folder / layout.LINEAGE_FILE).read_text())
    assert lineage["last_stage"] == "b"
    assert [s["name"] for s in lineage["stages"]] == ["a", "b", "side"]
    assert (
        curriculum({"name": "a"}, {"name": "b", "init_from": "none"}, {"name": "c"}).last.name
        == "c"
    )


def test_the_lineage_tells_attentions_and_what_each_cost(tmp_path: Path) -> None:
    root, folder = prepared(tmp_path / "data"), tmp_path / "run"
    gate = {"gate": {"name": "threshold", "at_least": 0.9}, "on_fail": "retry"}
    config = chain(b={**gate, "attention": {"block_size": 8}})
    session(config, folder, FakeBackend({"a": [GOOD], "b": [GOOD, [0.9] * 4], "c": [GOOD]}, root))
    text = (folder / "lineage.md").read_text()
    assert "<br/>butterfly-8<br/>" in text and "| b | passed | a | butterfly-8 |" in text
    stages = json.loads((folder / layout.LINEAGE_FILE).read_text())["stages"]
    # A fake attempt has 8 steps and says 4 seconds; b had two.
    assert [s["all_attempts"] for s in stages] == [
        {"steps": 8, "train_seconds": 4.0},
        {"steps": 16, "train_seconds": 8.0},
        {"steps": 8, "train_seconds": 4.0},
    ]


def test_weights_that_do_not_fit_the_last_stage_are_healthy_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their test accuracy there is null, in the journal and in what is read from it."""

    class Unfit(FakeBackend):
        def test(self, key: Key, wanted: EvaluationJob, worker: Any) -> None:
            value = 0.25 if key.detail == key.stage else None
            self.queue.append(Message(key=key, done=True, value=value))

    root, folder = prepared(tmp_path / "data"), tmp_path / "run"
    session(chain(), folder, Unfit({n: [GOOD] for n in "abc"}, root))
    again = Unfit({}, root)
    session(chain(), folder, again)  # nothing is measured once more
    lineage = json.loads((folder / layout.LINEAGE_FILE).read_text())
    shown = [(s["test_accuracy"], s["test_accuracy_on_last_stage"]) for s in lineage["stages"]]
    assert shown == [(0.25, None), (0.25, None), (0.25, 0.25)]
    show_status(chain(), folder)
    assert capsys.readouterr().out.count("0.2500") == 4
    found = load(folder)
    assert found.complete and [s.test_accuracy for s in found.stages] == [0.25] * 3
    assert [math.isnan(s.test_on_last) for s in found.stages] == [True, True, False]
    (row,) = leaderboard_rows([found])
    assert row["test"] == (0.25,) and not row["init_from"]
    write_report(folder)


def test_weights_on_disk_that_start_a_curriculum_are_on_the_leaderboard(tmp_path: Path) -> None:
    root, folder = prepared(tmp_path / "data"), tmp_path / "run"
    with tiny.trainer(open_store(root / TASK), train__num_steps=4) as trainer:
        trainer.advance()
        trainer.save(tmp_path / "weights" / "best")
    config = chain(a={"init_from": str(tmp_path / "weights" / "best")})
    session(config, folder, FakeBackend({n: [GOOD] for n in "abc"}, root))
    found = load(folder)
    assert found.init["path"] == str(tmp_path / "weights" / "best")
    assert found.init["sha256"] == sha256_file(tmp_path / "weights" / "best" / layout.MODEL_FILE)
    (row,) = leaderboard_rows([found])
    assert row["init_from"] == "weights/best" and "§" in cell_text(row)
    lineage = json.loads((folder / layout.LINEAGE_FILE).read_text())["stages"][0]
    assert lineage["init_from"]["sha256"] == found.init["sha256"]


def test_views_that_were_removed_come_back_from_the_journal(tmp_path: Path) -> None:
    """A session in which nothing is left to do writes them, without Ray."""
    root, folder = prepared(tmp_path / "data"), tmp_path / "run"
    session(chain(), folder, FakeBackend({n: [GOOD] for n in "abc"}, root))
    pages = ["lineage.json", "lineage.md"]
    before = {name: (folder / name).read_text() for name in pages}
    curve = points(folder, "curriculum", DEV_ACCURACY)
    for name in pages:
        (folder / name).unlink()
    shutil.rmtree(folder / TENSORBOARD_DIR)
    outcome = run_curriculum(chain_file(), name="run", storage=str(tmp_path), data_root=str(root))
    assert outcome.passed and not outcome.broken and not ray.is_initialized()
    assert {name: (folder / name).read_text() for name in pages} == before
    assert points(folder, "curriculum", DEV_ACCURACY) == curve
    assert (folder / "curriculum.yaml").exists()
