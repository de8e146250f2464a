"""The ledger without Ray: fresh, restarted at any write, torn, and what Optuna is told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from dmx.errors import DmxError, StageError
from dmx.runs.study import best_trial
from dmx.search import trial_results
from dmx.search.ledger import Ledger, trial_folder
from dmx.search.samplers import make_sampler
from dmx.search.study_record import StudyRecord
from dmx.storage.journal import Journal, encode
from tests.study.helpers import space
from tests.tiny import one_sentence

NUM_TRIALS = 14


@contextmanager
def opened(folder: Path, **changes: Any) -> Iterator[Ledger]:
    settings = {"name": "s", "num_trials": NUM_TRIALS, "seed": 7, **changes}
    made = Ledger(folder, space=settings.pop("space", None) or space(folder.parent), **settings)
    try:
        yield made
    finally:
        made.close()


def accuracy(point: dict[str, Any], step: int) -> float:
    """A made-up training: better near a rate of 1e-2, with less dropout, and with more steps."""
    far = abs(math.log10(point["optim.learning_rate"]) + 2)
    inner = 0.05 if point["attention.inner"] == "linear" else 0.0
    return round(0.9 - 0.1 * far - point["model.dropout"] + inner + 0.01 * step, 6)


def report(ledger: Ledger, number: int, step: int, value: float) -> bool:
    best = max([value, *(m["best_dev_accuracy"] for m in ledger.reports.get(number, {}).values())])
    metrics = {"steps": step, "dev_accuracy": value, "best_dev_accuracy": best, "train_loss": 1.0}
    return ledger.report(number, step, {**metrics, "not_a_report_key": 1})


def work(ledger: Ledger, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Run what is left: trials report steps 2, 4, 6; every third is pruned, every fifth fails."""
    seen = []
    while (found := ledger.next_trial()) is not None:
        number, point = found
        seen.append(found)
        ends = 4 if number % 3 == 2 else 6
        for step in range(2, ends + 1, 2):
            report(ledger, number, step, accuracy(point, step))
        status = "PRUNED" if number % 3 == 2 else "FAILED" if number % 5 == 4 else "COMPLETE"
        ledger.finish(number, status, "it broke" if status == "FAILED" else "")
        if limit is not None and len(seen) == limit:
            break
    return seen


def picture(folder: Path) -> list[tuple[Any, ...]]:
    """All that matters of a study, as Optuna has it."""
    path = str(folder / "optuna.journal")
    storage = optuna.storages.JournalStorage(JournalFileBackend(path))
    study = optuna.load_study(study_name="s", storage=storage)
    assert study.metric_names == ["dev accuracy"], "what optuna-dashboard writes at its axes"
    return [
        (t.number, t.state.name, t.params, t.values, t.intermediate_values, t.user_attrs)
        for t in study.get_trials()
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "study"
    with opened(folder) as ledger:
        work(ledger)
    return folder


def test_a_fresh_study(uninterrupted, tmp_path):
    with opened(tmp_path / "a") as ledger:
        assert ledger.remaining() == NUM_TRIALS and ledger.num_interrupted == 0
        assert ledger.results() == ()
        number, point = ledger.next_trial() or (None, {})
        assert number == 0
        assert point == dict(ledger.space.start[0]), "start points come first"
        assert ledger.results()[0].status == "RUNNING"
    with opened(uninterrupted) as ledger:
        assert ledger.next_trial() is None and ledger.remaining() == 0
        results = ledger.results()
    assert [r.number for r in results] == list(range(NUM_TRIALS))
    assert [r.trial_id for r in results][:2] == ["0000", "0001"]


def test_what_optuna_is_told(uninterrupted):
    told = picture(uninterrupted)
    reports = json.loads("[" + ",".join(journal_lines(uninterrupted, "report")) + "]")
    for number, state, params, values, steps, attributes in told:
        own = {r["step"]: r["metrics"]["dev_accuracy"] for r in reports if r["trial"] == number}
        assert steps == own == {s: accuracy(params, s) for s in own}
        if number % 3 == 2:
            assert state == "PRUNED" and set(own) == {2, 4}
            assert values == [own[4]], "the last value: TPE ranks pruned trials by their last step"
        elif number % 5 == 4:
            assert state == "FAIL" and values is None and attributes == {"error": "it broke"}
        else:
            assert state == "COMPLETE" and values == [max(own.values())]
        assert ("model.mlp_dropout" in params) == (params["attention.inner"] == "linear")


def journal_lines(folder: Path, event: str) -> list[str]:
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["event"] == event]


def test_results_say_the_best_and_the_last(tmp_path):
    with opened(tmp_path / "a") as ledger:
        number, point = ledger.next_trial() or (0, {})
        for step, value in ((2, 0.5), (4, 0.9), (6, 0.7)):
            assert report(ledger, number, step, value)
        folder = trial_folder(tmp_path / "a", number) / "best"
        folder.mkdir(parents=True)
        ledger.finish(number, "COMPLETE")
        (result,) = ledger.results()
        assert result.best_dev_accuracy == 0.9 and result.metrics["dev_accuracy"] == 0.7
        assert result.steps == 6 and result.params == point and result.checkpoint is not None
        assert result.checkpoint.path == folder and result.checkpoint.dev_accuracy == 0.9
        assert "not_a_report_key" not in result.metrics
        folder.rename(folder.with_name(".best.old"))  # a kill between two renames
        (again,) = ledger.results()
        assert again.checkpoint is not None and folder.is_dir()
        assert best_trial(ledger.results()) == again
    assert picture(tmp_path / "a")[0][1:4:2] == ("COMPLETE", [0.9]), "Optuna is told the best"


def test_a_repeated_report_counts_once(tmp_path):
    with opened(tmp_path / "a") as ledger:
        number, _ = ledger.next_trial() or (0, {})
        assert report(ledger, number, 2, 0.5) is True
        assert report(ledger, number, 2, 0.6) is False
        assert ledger.reports[number][2]["dev_accuracy"] == 0.5
        ledger.finish(number, "COMPLETE")
        ledger.finish(number, "FAILED", "late")
        assert ledger.results()[0].status == "COMPLETE"
    assert len(journal_lines(tmp_path / "a", "report")) == 1
    assert len(journal_lines(tmp_path / "a", "outcome")) == 1
    assert picture(tmp_path / "a")[0][1:4:2] == ("COMPLETE", [0.5])


@pytest.mark.parametrize(
    ("event", "part"),
    [
        ({"event": "outcome", "trial": 0, "status": "LOST", "value": 0.5, "error": ""}, "'LOST'"),
        ({"event": "compared", "step": 2, "exploits": ["x"]}, "a takeover 'x'"),
        ({"event": "compared", "step": 2, "exploits": [{"trial": 1}]}, "no sound source"),
    ],
)
def test_what_dmx_did_not_write_is_refused_with_a_remedy(tmp_path, event, part):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "journal.jsonl").write_bytes(encode(event))
    with pytest.raises(StageError) as caught:
        StudyRecord(tmp_path / "a" / "journal.jsonl")
    assert part in str(caught.value) and "restore the journal from a backup" in str(caught.value)
    one_sentence(caught.value)


@pytest.mark.parametrize("value", [math.nan, None])
def test_no_accuracy_is_a_failure(tmp_path, value):
    with opened(tmp_path / "a") as ledger:
        number, _ = ledger.next_trial() or (0, {})
        if value is not None:
            ledger.report(number, 2, {"steps": 2, "dev_accuracy": value})
        ledger.finish(number, "COMPLETE")
        (result,) = ledger.results()
        assert result.status == "FAILED" and result.error == "it reported no dev accuracy"
        assert best_trial(ledger.results()) is None
    assert picture(tmp_path / "a")[0][1] == "FAIL", "and does not stay RUNNING for ever"


def test_a_restart_between_trials_changes_no_proposal(uninterrupted, tmp_path):
    """Twice: after every trial, and with two in flight, which are handed out first."""
    seen = []
    for _ in range(NUM_TRIALS):
        with opened(tmp_path / "a") as ledger:
            seen += work(ledger, limit=1)
    assert picture(tmp_path / "a") == picture(uninterrupted)
    with opened(tmp_path / "b") as ledger:
        work(ledger, limit=5)
        first, second = ledger.next_trial(), ledger.next_trial()
        assert first and second
        report(ledger, first[0], 2, accuracy(first[1], 2))
    with opened(tmp_path / "b") as ledger:
        assert ledger.num_interrupted == 2 and ledger.remaining() == NUM_TRIALS - 5
        assert ledger.next_trial() == first and ledger.next_trial() == second
        assert ledger.reports[first[0]][2]["dev_accuracy"] == accuracy(first[1], 2)
        assert report(ledger, first[0], 2, 0.0) is False


class Killed(BaseException):
    """Stands for kill -9 at a write: what runs after it must not write."""


def test_killed_at_any_write_it_ends_the_same(uninterrupted, tmp_path, monkeypatch):
    """Each write to either file is a moment: before it, half of it, and after it.

    After the kill a new ledger goes on; the study must end as if nothing had happened. The writes
    of one trial are met at three places of the study: at its start, among random proposals, and
    among the sampler's own.
    """
    real_optuna, real_journal = JournalFileBackend.append_logs, Journal.append
    count, at, half, dead = [0], [0], [False], [False]

    def moment(write_half, write):
        if dead[0]:
            raise Killed
        count[0] += 1
        if count[0] == at[0]:
            dead[0] = True
            if half[0]:
                write_half()
            raise Killed
        write()

    def append_logs(self, logs):
        def write_half():
            text = "\n".join(json.dumps(log) for log in logs)
            with Path(self._file_path).open("a") as file:
                file.write(text[: len(text) // 2])

        moment(write_half, lambda: real_optuna(self, logs))

    def append(self, **event):
        def write_half():
            line = encode(event)
            with self.path.open("ab") as file:
                file.write(line[: len(line) // 2])

        moment(write_half, lambda: real_journal(self, **event))

    monkeypatch.setattr(JournalFileBackend, "append_logs", append_logs)
    monkeypatch.setattr(Journal, "append", append)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # a process dies here, not a machine
    with opened(tmp_path / "count") as ledger:
        work(ledger)
    total = count[0]
    expected = picture(uninterrupted)
    assert picture(tmp_path / "count") == expected
    moments = [*range(1, 22), *range(total // 2, total // 2 + 16), *range(total - 15, total + 1)]
    for kill in moments:
        folder = tmp_path / f"kill-{kill}"
        count[0], at[0], half[0], dead[0] = 0, kill, kill % 2 == 0, False
        with pytest.raises(Killed), opened(folder) as ledger:
            work(ledger)
        count[0], at[0], dead[0] = 0, 0, False
        with opened(folder) as ledger:
            work(ledger)
            assert ledger.remaining() == 0
        assert picture(folder) == expected, f"killed at write {kill} of {total}"


def test_a_torn_line_of_optunas_file_is_cut(uninterrupted, tmp_path):
    with opened(tmp_path / "a") as ledger:
        work(ledger, limit=6)
    path = tmp_path / "a" / "optuna.journal"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"worker_id":"x","stud')
    (tmp_path / "a" / "optuna.journal.lock").touch()  # its lock was never released either
    with opened(tmp_path / "a") as ledger:
        work(ledger)
    assert picture(tmp_path / "a") == picture(uninterrupted)


def test_a_damaged_line_of_optunas_file_is_refused(tmp_path):
    with opened(tmp_path / "a") as ledger:
        work(ledger, limit=2)
    path = tmp_path / "a" / "optuna.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b'{"op_code": rubbish\n', *lines[1:]]))
    for _ in range(2):  # the second time as well: nothing stays locked
        with pytest.raises(StageError) as caught, opened(tmp_path / "a"):
            pass
        assert "is damaged" in one_sentence(caught.value)


def test_two_at_once(tmp_path):
    with (
        opened(tmp_path / "a"),
        pytest.raises(StageError, match="in use by another dmx process"),
        opened(tmp_path / "a"),
    ):
        pass


def test_other_seeds_and_samplers_propose_other_points(tmp_path):
    def points(name: str, **changes: Any) -> list[dict[str, Any]]:
        with opened(tmp_path / name, **changes) as ledger:
            return [point for _, point in work(ledger, limit=4)]

    base = points("a")
    assert points("b") == base
    assert points("c", seed=8)[1:] != base[1:]
    assert points("d", sampler="random")[0] == base[0]
    with pytest.raises(DmxError, match="sampler 'grid' is unknown"):
        make_sampler("grid", 0, 5)


def test_the_sampler_learns(tmp_path):
    """Its later proposals beat its random ones on the made-up training."""
    with opened(tmp_path / "a", num_trials=40) as ledger:
        values = [accuracy(point, 6) for _, point in work(ledger)]
    assert sum(values[25:]) / 15 > sum(values[1:10]) / 9 + 0.05


def test_more_trials_may_be_asked_for_later(tmp_path):
    with opened(tmp_path / "a", num_trials=2) as ledger:
        assert len(work(ledger)) == 2
    with opened(tmp_path / "a", num_trials=3) as ledger:
        assert ledger.remaining() == 1 and [n for n, _ in work(ledger)] == [2]


def test_states_are_the_four(tmp_path):
    assert set(trial_results.STATUS) == set(TrialState)


def test_proposals_do_not_scan_for_waiting_trials(tmp_path, monkeypatch):
    """Once the start points are used up, Optuna's search for waiting trials costs nothing."""
    from optuna.storages.journal._storage import JournalStorageReplayResult

    scans = []
    real = JournalStorageReplayResult.get_all_trials

    def get_all_trials(self, study_id, states):
        scans.append(states)
        return real(self, study_id, states)

    monkeypatch.setattr(JournalStorageReplayResult, "get_all_trials", get_all_trials)
    with opened(tmp_path / "a", sampler="random", num_trials=30) as ledger:
        assert (ledger.next_trial() or (0, {}))[1] == dict(ledger.space.start[0])
        ledger.next_trial()
        scans.clear()
        assert [(ledger.next_trial() or (0,))[0] for _ in range(28)] == list(range(2, 30))
        assert scans == []
        ledger.study.enqueue_trial({"model.dropout": 0.125})
        ledger.num_trials = 31
        assert (ledger.next_trial() or (0, {}))[1]["model.dropout"] == 0.125


def test_a_session_in_the_journal_changes_nothing_of_a_study(tmp_path: Path) -> None:
    record = StudyRecord(tmp_path / "journal.jsonl")
    record.begin()
    record.report(0, 2, {"steps": 2, "dev_accuracy": 0.5})
    record.close()
    again = StudyRecord(tmp_path / "journal.jsonl")
    again.begin()
    assert list(again.reports) == [0] and not again.outcomes
    assert again.history() == [(0, 2, {"steps": 2, "dev_accuracy": 0.5})]
    assert [e["event"] for e in again.journal.events] == ["session", "report", "session"]
    again.close()
