"""A study's record without Ray: fresh, restarted at any write, torn, and what Optuna sees."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from dmx.errors import DmxError, StageError
from dmx.runs.layout import trial_folder
from dmx.search.optuna_view import _ViewFile
from dmx.search.samplers import make_sampler
from dmx.search.study_log import StudyLog
from dmx.storage.journal import Journal, encode
from tests.study.helpers import next_trial, open_log, remaining
from tests.tiny import one_sentence

NUM_TRIALS = 14


@contextmanager
def opened(folder: Path, **changes: Any) -> Iterator[StudyLog]:
    settings = {"num_trials": NUM_TRIALS, "seed": 7, **changes}
    made = open_log(folder, **settings)
    try:
        yield made
    finally:
        made.close()


def accuracy(point: dict[str, Any], step: int) -> float:
    """A made-up training: better near a rate of 1e-2, with less dropout, and with more steps."""
    far = abs(math.log10(point["optim.learning_rate"]) + 2)
    inner = 0.05 if point["attention.inner"] == "linear" else 0.0
    return round(0.9 - 0.1 * far - point["model.dropout"] + inner + 0.01 * step, 6)


def report(ledger: StudyLog, number: int, step: int, value: float) -> bool:
    best = max([value, *(m["best_dev_accuracy"] for m in ledger.by_number[number].reports)])
    metrics = {"steps": step, "dev_accuracy": value, "best_dev_accuracy": best, "train_loss": 1.0}
    return ledger.report(number, step, {**metrics, "not_a_report_key": 1})


def work(ledger: StudyLog, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Run what is left: trials report steps 2, 4, 6; every third is pruned, every fifth fails."""
    seen = []
    while (found := next_trial(ledger)) is not None:
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
    study = optuna.load_study(study_name=None, storage=storage)
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
        assert remaining(ledger) == NUM_TRIALS
        assert ledger.trials == ()
        number, point = next_trial(ledger) or (None, {})
        assert number == 0
        assert point == dict(ledger.study_config.space.initial_points[0]), "start points come first"
        assert ledger.trials[0].status == "RUNNING"
    with opened(uninterrupted) as ledger:
        assert next_trial(ledger) is None and remaining(ledger) == 0
        results = ledger.trials
    assert [r.number for r in results] == list(range(NUM_TRIALS))


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
        number, point = next_trial(ledger) or (0, {})
        for step, value in ((2, 0.5), (4, 0.9), (6, 0.7)):
            assert report(ledger, number, step, value)
        folder = trial_folder(tmp_path / "a", number) / "best"
        folder.mkdir(parents=True)
        ledger.finish(number, "COMPLETE")
        (result,) = ledger.trials
        assert result.best == 0.9 and result.last_report["dev_accuracy"] == 0.7
        assert result.steps == 6 and result.params == point and result.checkpoint == folder
        assert "not_a_report_key" not in result.last_report
        assert ledger.best_trial is result
    assert picture(tmp_path / "a")[0][1:4:2] == ("COMPLETE", [0.9]), "Optuna is told the best"


def test_a_repeated_report_counts_once(tmp_path):
    with opened(tmp_path / "a") as ledger:
        number, _ = next_trial(ledger) or (0, {})
        assert report(ledger, number, 2, 0.5) is True
        assert report(ledger, number, 2, 0.6) is False
        assert ledger.by_number[number].curve[2]["dev_accuracy"] == 0.5
        ledger.finish(number, "COMPLETE")
        ledger.finish(number, "FAILED", "late")
        assert ledger.trials[0].status == "COMPLETE"
    assert len(journal_lines(tmp_path / "a", "report")) == 1
    assert len(journal_lines(tmp_path / "a", "outcome")) == 1
    assert picture(tmp_path / "a")[0][1:4:2] == ("COMPLETE", [0.5])


@pytest.mark.parametrize(
    ("event", "part"),
    [
        ({"event": "outcome", "trial": 0, "status": "LOST", "value": 0.5, "error": ""}, "status"),
        ({"event": "compared", "step": 2, "exploits": ["x"]}, "exploits"),
        ({"event": "compared", "step": 2, "exploits": [{"trial": 1}]}, "exploits.source"),
    ],
)
def test_what_dmx_did_not_write_is_refused_with_a_remedy(tmp_path, event, part):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "journal.jsonl").write_bytes(encode(event))
    with pytest.raises(StageError) as caught:
        open_log(tmp_path / "a")
    assert part in str(caught.value) and "restore the journal from a backup" in str(caught.value)
    one_sentence(caught.value)


@pytest.mark.parametrize("value", [math.nan, None])
def test_no_accuracy_is_a_failure(tmp_path, value):
    with opened(tmp_path / "a") as ledger:
        number, _ = next_trial(ledger) or (0, {})
        if value is not None:
            ledger.report(number, 2, {"steps": 2, "dev_accuracy": value})
        ledger.finish(number, "COMPLETE")
        (result,) = ledger.trials
        assert result.status == "FAILED" and result.error == "it reported no dev accuracy"
        assert ledger.best_trial is None
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
        first, second = next_trial(ledger), next_trial(ledger)
        assert first and second
        report(ledger, first[0], 2, accuracy(first[1], 2))
    with opened(tmp_path / "b") as ledger:
        assert remaining(ledger) == NUM_TRIALS - 5
        assert next_trial(ledger) == first and next_trial(ledger) == second
        assert ledger.by_number[first[0]].curve[2]["dev_accuracy"] == accuracy(first[1], 2)
        assert report(ledger, first[0], 2, 0.0) is False


class Killed(BaseException):
    """Stands for kill -9 at a write: what runs after it must not write."""


def test_killed_at_any_write_it_ends_the_same(uninterrupted, tmp_path, monkeypatch):
    """Each write to either file is a moment: before it, half of it, and after it.

    After the kill a new ledger goes on; the study must end as if nothing had happened. The writes
    of one trial are met at three places of the study: at its start, among random proposals, and
    among the sampler's own.
    """
    real_optuna, real_journal = _ViewFile.append_logs, Journal.append
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
            with self._path.open("a") as file:
                file.write(text[: len(text) // 2])

        moment(write_half, lambda: real_optuna(self, logs))

    def append(self, **event):
        def write_half():
            line = encode(event)
            with self.path.open("ab") as file:
                file.write(line[: len(line) // 2])

        moment(write_half, lambda: real_journal(self, **event))

    monkeypatch.setattr(_ViewFile, "append_logs", append_logs)
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
            assert remaining(ledger) == 0
        assert picture(folder) == expected, f"killed at write {kill} of {total}"


@pytest.mark.parametrize("harm", ["gone", "torn", "junk", "another"])
def test_optunas_file_is_a_view(uninterrupted, tmp_path, harm):
    """Nothing is decided by it, and each session writes it anew."""
    with opened(tmp_path / "a") as ledger:
        work(ledger, limit=6)
    path = tmp_path / "a" / "optuna.journal"
    if harm == "gone":
        path.unlink()
    elif harm == "torn":
        path.write_bytes(path.read_bytes() + b'{"op_code":4,"worker_id":"x","stud')
    elif harm == "junk":
        path.write_bytes(b"junk" + path.read_bytes())
    else:
        shutil.copy(uninterrupted / "optuna.journal", path)
    with opened(tmp_path / "a") as ledger:
        assert picture(tmp_path / "a") == picture(uninterrupted)[:6]
        work(ledger)
    assert picture(tmp_path / "a") == picture(uninterrupted)
    with opened(tmp_path / "a"):
        assert picture(tmp_path / "a") == picture(uninterrupted), "as it is rebuilt at the end"


def test_a_folder_in_the_place_of_the_view_ends_the_view_and_not_the_study(tmp_path, caplog):
    (tmp_path / "a" / "optuna.journal").mkdir(parents=True)
    with opened(tmp_path / "a") as ledger:
        work(ledger)
        assert remaining(ledger) == 0
    assert caplog.text.count("optuna.journal cannot be written (Is a directory)") == 1
    assert not list((tmp_path / "a").glob(".optuna*"))


def test_a_full_disk_ends_the_view_and_not_the_study(tmp_path, caplog, monkeypatch):
    class Full:
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    with opened(tmp_path / "a") as ledger:
        work(ledger, limit=2)
        monkeypatch.setattr(ledger._optuna._file, "_file", Full())
        work(ledger)
        assert remaining(ledger) == 0
    assert caplog.text.count("optuna.journal cannot be written (No space left") == 1
    with opened(tmp_path / "a"):
        assert len(picture(tmp_path / "a")) == NUM_TRIALS


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
        assert remaining(ledger) == 1 and [n for n, _ in work(ledger)] == [2]
