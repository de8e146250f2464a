"""A study whose storage is a URL: on another node, with nothing but the URL, it continues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dmx.training.checkpoint import open_checkpoint
from tests.study.helpers import NUM_TRIALS, command, journal, next_trial, open_log, rows, run, space
from tests.study.processes import Command


@pytest.mark.slow
def test_a_node_is_lost_and_another_continues(tmp_path: Path, tiny_root: Path):
    """The driver is killed, its whole disk is gone, and a driver elsewhere ends the study."""

    def words(scratch: str, *more: str) -> list[str]:
        found = command(tmp_path, tiny_root, *more, "--scratch", str(tmp_path / scratch))
        found[found.index("--storage") + 1] = f"file://{tmp_path}/bucket"
        return found

    bucket = tmp_path / "bucket" / "study"
    process = Command(words("first"), tmp_path)
    (study,) = _when_there(process, tmp_path / "first")
    process.until_events(study, 5)
    process.terminate()  # a preemption: the last state goes up before the end
    code, _, err = process.end()
    assert code == 130 and "--resume" in err
    known = len(journal(study))
    shutil.rmtree(tmp_path / "first")

    done = run(words("second"), tmp_path)
    assert done.returncode == 2 and "already exists; add --resume" in done.stderr
    done = run(words("second", "--resume"), tmp_path)
    assert done.returncode == 0, done.stderr
    (there,) = (tmp_path / "second").glob("runs/*/study")
    assert len(journal(there)) > known
    assert [r["trial"] for r in rows(there)] == [str(n) for n in range(NUM_TRIALS)]
    assert rows(bucket) == rows(there)
    best = json.loads((bucket / "study.json").read_text())["best"]
    metrics = open_checkpoint(there / "best").metrics
    assert metrics["dev_accuracy"] == best["dev_accuracy"]
    assert open_checkpoint(bucket / "best").metrics == metrics


def _when_there(process: Command, scratch: Path) -> list[Path]:
    from tests.study.processes import wait_until

    wait_until(lambda: list(scratch.glob("runs/*/study/journal.jsonl")), "journal", process.process)
    return [p.parent for p in scratch.glob("runs/*/study/journal.jsonl")]


def test_two_drivers_at_once_are_found_out(tmp_path: Path):
    """Both continue the same stored study, each on its own disk; the later one is refused."""
    import pytest

    from dmx.errors import StageError
    from dmx.runs.folder_sync import FolderSync
    from dmx.storage.remote import StorageLayout

    def places(node: str) -> StorageLayout:
        return StorageLayout(run=str(tmp_path / node), run_url=f"file://{tmp_path}/bucket")

    def work(node: str, value: float) -> None:
        ledger = open_log(tmp_path / node, space=space(tmp_path), num_trials=3, seed=1)
        found = next_trial(ledger)
        assert found is not None
        ledger.report(found[0], 2, {"dev_accuracy": value, "steps": 2})
        ledger.close()

    work("a", 0.5)
    with FolderSync(places("a")):
        pass
    FolderSync(places("b")).restore()
    assert journal(tmp_path / "b") == journal(tmp_path / "a")
    for node, value in (("a", 0.6), ("b", 0.7)):
        ledger = open_log(tmp_path / node, space=space(tmp_path), num_trials=3, seed=1)
        ledger.report(0, 4, {"dev_accuracy": value, "steps": 4})
        ledger.close()
    with FolderSync(places("a")):
        pass
    with pytest.raises(StageError, match="have gone different ways"):
        FolderSync(places("b")).restore()
    FolderSync(places("a")).restore()  # nothing newer is stored: nothing happens
