"""The controller over a scripted backend: order, gates, on_fail, room, data, crashes anywhere."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from dmx.curriculum.checks import check_unchanged
from dmx.curriculum.views import describe
from dmx.errors import StageError
from dmx.runs import layout
from dmx.runs.curriculum import Curriculum
from dmx.storage.files import sha256_file
from dmx.storage.journal import Journal, read_journal
from dmx.training.checkpoint import open_checkpoint
from tests.curriculum.fakes import (
    LATE_TASK,
    OTHER_TASK,
    Crash,
    FakeBackend,
    chain,
    curriculum,
    run,
)
from tests.tiny import TASK, one_sentence, write_tiny

GOOD = [0.5, 0.7, 0.8, 0.75]  # 4 evaluations of 2 steps; the best is the third


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for task in (TASK, OTHER_TASK, LATE_TASK):
        write_tiny(tmp_path / "data", task)
    return tmp_path / "data"


def best_path(folder: Path, stage: str, attempt: int = 0) -> Path:
    return folder / "stages" / stage / f"attempt-{attempt}" / layout.BEST_DIR


def source(backend: FakeBackend, job: str) -> str:
    """The weights that a job starts from."""
    return backend.jobs[job].run_config["init"]["path"]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_journal(folder / layout.JOURNAL_FILE)[0] if e["event"] == kind]


def test_each_stage_starts_from_the_best_of_the_one_before(tmp_path: Path, root: Path) -> None:
    backend = FakeBackend({"a": [GOOD], "b": [GOOD], "c": [GOOD]}, root)
    passed, history = run(chain(), tmp_path / "run", backend)
    assert passed and backend.trained == [("a", 0), ("b", 0), ("c", 0)]
    assert backend.jobs["a-0"].run_config["init"] is None
    assert source(backend, "b-0") == str(best_path(tmp_path / "run", "a"))
    assert source(backend, "c-0") == str(best_path(tmp_path / "run", "b"))
    promoted = history.stage("b").promoted
    assert promoted is not None
    assert (promoted["step"], promoted["dev_accuracy"]) == (6, 0.8)
    assert history.stage("b").current is not None
    assert history.stage("b").current.dev_accuracies == (0.5, 0.7, 0.8, 0.75)  # type: ignore[union-attr]
    assert sorted(backend.tested) == [("a", "a"), ("a", "c"), ("b", "b"), ("b", "c"), ("c", "c")]


def test_a_gate_that_says_no_stops_what_follows(tmp_path: Path, root: Path) -> None:
    gate = {"gate": {"name": "threshold", "at_least": 0.9}}
    backend = FakeBackend({"a": [GOOD], "b": [GOOD]}, root)
    passed, history = run(chain(b=gate), tmp_path / "run", backend)
    assert not passed
    assert [history.stage(n).status for n in "abc"] == ["passed", "failed", "waiting"]
    assert backend.trained == [("a", 0), ("b", 0)]


def test_a_loosened_gate_is_asked_again_without_training(tmp_path: Path, root: Path) -> None:
    strict = chain(a={"gate": {"name": "threshold", "at_least": 0.9}})
    run(strict, tmp_path / "run", FakeBackend({"a": [GOOD]}, root))
    loose = chain(a={"gate": {"name": "threshold", "at_least": 0.8}})
    backend = FakeBackend({"b": [GOOD], "c": [GOOD]}, root)
    passed, _ = run(loose, tmp_path / "run", backend)
    assert passed and backend.trained == [("b", 0), ("c", 0)]


def test_retry_takes_new_seeds_and_promotes_what_passes(tmp_path: Path, root: Path) -> None:
    again = {
        "gate": {"name": "threshold", "at_least": 0.6},
        "on_fail": {"action": "retry", "times": 2},
        "init_from": "none",
    }
    backend = FakeBackend({"a": [[0.5] * 4, ["diverged"], GOOD], "b": [GOOD], "c": [GOOD]}, root)
    passed, _ = run(chain(a=again), tmp_path / "run", backend)
    assert passed and backend.trained[:3] == [("a", 0), ("a", 1), ("a", 2)]
    assert source(backend, "b-0") == str(best_path(tmp_path / "run", "a", 2))
    seeds = [backend.jobs[f"a-{n}"].run_config["train"]["seed"] for n in range(3)]
    orders = [backend.jobs[f"a-{n}"].run_config["data"]["seed"] for n in range(3)]
    assert len(set(seeds)) == 3 and len(set(orders)) == 3
    reasons = [e["reason"] for e in events(tmp_path / "run", "decided") if e["stage"] == "a"]
    assert reasons[0].startswith("threshold") and reasons[1] == "failed: diverged"


def test_retries_run_out(tmp_path: Path, root: Path) -> None:
    again = {"gate": {"name": "above_chance"}, "on_fail": {"action": "retry", "times": 1}}
    backend = FakeBackend({"a": [[0.5] * 4, [0.51] * 4]}, root)
    passed, history = run(chain(a=again), tmp_path / "run", backend)
    assert not passed and history.stage("a").status == "failed"
    # and with `then: continue` the better one of the two goes on
    again["on_fail"] = {"action": "retry", "times": 1, "then": "continue"}
    backend = FakeBackend({"a": [[0.5] * 4, [0.51] * 4], "b": [GOOD], "c": [GOOD]}, root)
    passed, _ = run(chain(a=again), tmp_path / "other", backend)
    assert passed
    assert source(backend, "b-0") == str(best_path(tmp_path / "other", "a", 1))


@pytest.mark.parametrize("afresh", [False, True])
def test_longer_trains_on_with_more_steps(tmp_path: Path, root: Path, afresh: bool) -> None:
    longer = {
        "gate": {"name": "threshold", "at_least": 0.9},
        "on_fail": {"action": "longer", "times": 2, "factor": 2, "afresh": afresh},
    }
    script = {"a": [GOOD], "b": [GOOD, [0.8] * 8, [0.95] * 16], "c": [GOOD]}
    backend = FakeBackend(script, root)
    passed, _ = run(chain(b=longer), tmp_path / "run", backend)
    assert passed
    steps = [backend.jobs[f"b-{n}"].run_config["train"]["num_steps"] for n in range(3)]
    assert steps == [8, 16, 32]
    sources = [source(backend, f"b-{n}") for n in range(3)]
    parent = str(best_path(tmp_path / "run", "a"))
    own = [str(best_path(tmp_path / "run", "b", n)) for n in range(2)]
    assert sources == ([parent] * 3 if afresh else [parent, *own])


def test_continue_promotes_all_the_same(tmp_path: Path, root: Path) -> None:
    go_on = {"gate": {"name": "threshold", "at_least": 0.99}, "on_fail": "continue"}
    backend = FakeBackend({"a": [GOOD], "b": [GOOD], "c": [GOOD]}, root)
    passed, history = run(chain(b=go_on), tmp_path / "run", backend)
    assert passed and history.stage("b").current is not None
    decided = events(tmp_path / "run", "decided")[1]
    assert (decided["passed"], decided["next"]) == (False, "promote")


def test_a_broken_run_without_a_checkpoint_never_continues(tmp_path: Path, root: Path) -> None:
    go_on = {"on_fail": "continue"}
    backend = FakeBackend({"a": [["the loss is not finite at step 1"]]}, root)
    passed, history = run(chain(a=go_on), tmp_path / "run", backend)
    assert not passed and history.stage("a").status == "failed"


def test_a_lost_machine_decides_nothing(tmp_path: Path, root: Path) -> None:
    """Neither the gate nor on_fail is asked; the same command goes on with the same attempt."""
    again = chain(a={"on_fail": "retry"})
    first = FakeBackend({"a": [[0.5, 0.7, "lost"]]}, root)
    passed, history = run(again, tmp_path / "run", first)
    assert not passed and history.stage("a").status == "running"
    second = FakeBackend({n: [GOOD] for n in "abc"}, root)
    passed, history = run(again, tmp_path / "run", second)
    assert passed and second.trained[0] == ("a", 0)
    assert second.steps_trained["a"] == 4  # the last two of four evaluations
    assert history.stage("a").current is not None
    assert history.stage("a").current.dev_accuracies == tuple(GOOD)  # type: ignore[union-attr]


@pytest.mark.parametrize(("cpus", "at_once"), [(1, 1), (2, 2)])
def test_branches_run_at_the_same_time_when_there_is_room(
    tmp_path: Path, root: Path, cpus: int, at_once: int
) -> None:
    tree = curriculum(
        {"name": "a"}, {"name": "b", "init_from": "a"}, {"name": "c", "init_from": "a"}
    )
    backend = FakeBackend({n: [GOOD] for n in "abc"}, root)
    passed, _ = run(tree, tmp_path / "run", backend, cpus=cpus)
    assert passed and backend.at_once == at_once
    assert source(backend, "b-0") == source(backend, "c-0")


def test_one_branch_fails_and_the_other_goes_on(tmp_path: Path, root: Path) -> None:
    tree = curriculum(
        {"name": "a"}, {"name": "b", "init_from": "a"}, {"name": "c", "init_from": "a"}
    )
    backend = FakeBackend({"a": [GOOD], "b": [["died"]], "c": [GOOD]}, root)
    passed, history = run(tree, tmp_path / "run", backend)
    assert not passed
    assert [history.stage(n).status for n in "abc"] == ["passed", "failed", "passed"]


def test_until_and_then_the_rest(tmp_path: Path, root: Path) -> None:
    backend = FakeBackend({n: [GOOD] for n in "abc"}, root)
    passed, _ = run(chain(), tmp_path / "run", backend, selected=["a", "b"])
    assert passed and [s for s, _ in backend.trained] == ["a", "b"]
    backend = FakeBackend({n: [GOOD] for n in "abc"}, root)
    passed, _ = run(chain(), tmp_path / "run", backend)
    assert passed and [s for s, _ in backend.trained] == ["c"]


def test_data_of_later_stages_are_prepared_beside_training(tmp_path: Path) -> None:
    backend = FakeBackend({n: [GOOD] for n in "abc"}, tmp_path / "empty")
    passed, _ = run(chain(), tmp_path / "run", backend)
    assert passed
    tasks, beside, workers, nice = zip(*backend.prepared, strict=True)
    assert tasks == (TASK, OTHER_TASK, LATE_TASK)
    assert beside == (False, True, True)  # the first has to be waited for
    assert workers == (2, 1, 1) and nice[0] == 0 and nice[1] > 0


def test_data_that_break_stop_their_stage_only(tmp_path: Path, root: Path) -> None:
    backend = FakeBackend({n: [GOOD] for n in "abc"}, root)
    config = chain(c={"generate": {"num_images": 77}})
    store = root / LATE_TASK
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["data_name"] == "tiny"
    (store / "labels.npy").write_bytes(b"x")
    passed, history = run(config, tmp_path / "run", backend)
    assert not passed
    assert [history.stage(n).status for n in "abc"] == ["passed", "passed", "waiting"]


def outcome(record: Curriculum, folder: Path) -> dict[str, Any]:
    """What must be equal whatever happened on the way; no times."""
    found: dict[str, Any] = {}
    for state in record.stages:
        promoted = dict(state.promoted or {})
        found[state.name] = {
            "status": state.status,
            "promoted": promoted,
            "curves": [a.dev_accuracies for a in state.attempts],
            "configs": [dict(a.config) for a in state.attempts],
            "tests": dict(state.tests),
            "bytes": sha256_file(folder / promoted["path"] / layout.MODEL_FILE) if promoted else "",
        }
    return found


@pytest.mark.slow
def test_a_crash_after_any_journal_line_changes_nothing(tmp_path: Path, root: Path) -> None:
    """Retry, longer and a plain stage; the controller dies after line n, for every n."""
    config = chain(
        a={"gate": {"name": "above_chance"}, "on_fail": {"action": "retry", "times": 1}},
        b={"gate": {"name": "threshold", "at_least": 0.9}, "on_fail": "longer"},
    )
    script: dict[str, list[list[float | str]]] = {
        "a": [[0.5] * 4, list(GOOD)],
        "b": [list(GOOD), [0.95] * 8],
        "c": [list(GOOD)],
    }
    straight = FakeBackend(script, root)
    passed, history = run(config, tmp_path / "straight", straight)
    assert passed
    wanted = outcome(history, tmp_path / "straight")
    lines = len(read_journal(tmp_path / "straight" / layout.JOURNAL_FILE)[0])
    assert lines > 30
    evaluations = sum(len(a) for attempts in script.values() for a in attempts)
    for n in range(1, lines + 1):
        folder = tmp_path / f"crash-{n}"
        first, second = FakeBackend(script, root), FakeBackend(script, root)
        with pytest.raises(Crash):
            run(config, folder, first, crash_after=n)
        passed, history = run(config, folder, second)
        assert passed and outcome(history, folder) == wanted, n
        steps = sum([*first.steps_trained.values(), *second.steps_trained.values()])
        assert steps == 2 * evaluations, n  # not one evaluation was trained twice
        started = [(e["stage"], e["attempt"]) for e in events(folder, "started")]
        assert len(started) == len(set(started)) == 5, n


def test_an_edited_stage_is_refused_with_its_differences(tmp_path: Path, root: Path) -> None:
    backend = FakeBackend({n: [GOOD] for n in "abc"}, root)
    run(chain(), tmp_path / "run", backend, selected=["a", "b"])
    stages = Curriculum.read(tmp_path / "run").stages
    check_unchanged(chain(), stages)
    check_unchanged(chain(c={"optim.learning_rate": 0.5}), stages)  # not trained yet
    with pytest.raises(StageError) as error:
        check_unchanged(chain(b={"optim.learning_rate": 0.5}), stages)
    text = one_sentence(error.value)
    assert "optim.learning_rate: 0.005 -> 0.5" in text and "--from-stage b" in text
    for change in (
        {"gate": "plateau"},
        {"init_from": "none"},
        {"reinit": ["head."]},
        {"generate": {"num_images": 5}},
    ):
        with pytest.raises(StageError, match="stage b was edited"):
            check_unchanged(chain(b=change), stages)
    with pytest.raises(StageError, match="stage b was trained in this run but is not in the file"):
        check_unchanged(curriculum({"name": "a"}, {"name": "c"}), stages)


def test_cpus_and_gpus_are_no_edit(tmp_path: Path, root: Path) -> None:
    run(chain(), tmp_path / "run", FakeBackend({n: [GOOD] for n in "abc"}, root))
    stages = Curriculum.read(tmp_path / "run").stages
    check_unchanged(chain(b={"cpus": 2, "gpus": 0.5}), stages)


def test_a_reset_trains_the_stage_and_its_children_again(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "run"
    run(chain(), folder, FakeBackend({n: [GOOD] for n in "abc"}, root))
    old = sha256_file(best_path(folder, "b") / layout.MODEL_FILE)
    with Journal(folder / layout.JOURNAL_FILE) as journal:
        journal.append(event="reset", stages=["b", "c"], time=0.0)
    backend = FakeBackend({n: [GOOD, GOOD] for n in "abc"}, root)
    passed, history = run(chain(), folder, backend)
    assert passed and backend.trained == [("b", 1), ("c", 1)]
    assert sha256_file(best_path(folder, "b") / layout.MODEL_FILE) == old  # nothing is lost
    assert history.stage("c").promoted is not None
    assert source(backend, "c-1") == str(best_path(folder, "b", 1))
    assert backend.jobs["b-1"].run_config["train"]["seed"] == 2023  # begun anew, not retried


def test_a_changed_checkpoint_is_not_used(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "run"
    run(chain(), folder, FakeBackend({n: [GOOD] for n in "abc"}, root), selected=["a"])
    model = best_path(folder, "a") / layout.MODEL_FILE
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    backend = FakeBackend({n: [GOOD] for n in "abc"}, root)
    passed, history = run(chain(), folder, backend)
    assert not passed and backend.trained == []
    assert history.stage("b").status == "waiting"


def test_a_second_controller_is_refused(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "run" / layout.JOURNAL_FILE
    with Journal(path):
        caught: list[BaseException] = []

        def second() -> None:
            try:
                run(chain(), tmp_path / "run", FakeBackend({}, root))
            except StageError as error:
                caught.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(caught) == 1 and "in use" in one_sentence(caught[0])


def test_lineage_tells_where_each_stage_came_from(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "run"
    _, history = run(chain(), folder, FakeBackend({n: [GOOD] for n in "abc"}, root))
    lineage = json.loads(json.dumps(describe(chain(), history)))
    a, b, c = lineage["stages"]
    assert [s["name"] for s in (a, b, c)] == ["a", "b", "c"]
    assert b["dev_accuracy"] == 0.8 and b["test_accuracy"] == 0.25
    assert b["test_accuracy_on_last_stage"] == c["test_accuracy_on_last_stage"] == 0.25
    assert open_checkpoint(Path(b["checkpoint"])).metrics["dev_accuracy"] == 0.8
    assert c["init_from"]["path"] == b["checkpoint"] and c["init_from"]["sha256"] == b["sha256"]
    assert a["init_from"] is None and a["data"]["label"] == f"{TASK} (tiny)"
