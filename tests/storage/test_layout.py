"""Two nodes with disks of their own that meet in object storage."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import pytest

from dmx.data.store import open_store
from dmx.errors import DataError
from dmx.schema import to_dict
from dmx.storage.remote import StorageLayout, copy_store
from dmx.training.job import Job
from dmx.training.runner import Runner
from tests import tiny


def node(tmp_path: Path, name: str) -> StorageLayout:
    """A node's own disk; the run's path is the same on each, so each lies below its own root."""
    return StorageLayout(run=str(tmp_path / name / "run"), run_url=f"file://{tmp_path}/bucket/run")


def reports(job: Job, count: int) -> list[dict[str, object]]:
    runner = Runner(job)
    found = []
    for _ in range(count):
        found.append(runner.step())
        assert "failure" not in found[-1], found[-1]
        if found[-1]["done"]:
            break
    runner.close()
    return found


def timeless(report: dict[str, object]) -> dict[str, object]:
    measured = ("_seconds", "_per_second", "_mb")
    return {k: v for k, v in report.items() if not any(m in k for m in measured)}


def test_a_trial_continues_on_another_node(tmp_path, tiny_store):
    """Nothing but the URL is shared; the reports are those of an uninterrupted run, bit for bit."""

    def job(places: StorageLayout) -> Job:
        return Job(
            run_config=to_dict(tiny.config()),
            data_folder=str(tiny_store.folder),
            folder=f"{places.run}/trials/0000",
            places=places,
        )

    (tmp_path / "c" / "run" / "trials").mkdir(parents=True)
    whole = reports(Job(**{**vars(job(node(tmp_path, "c"))), "places": StorageLayout()}), 99)
    assert len(whole) >= 3
    first = reports(job(node(tmp_path, "a")), 2)
    second = reports(job(node(tmp_path, "b")), 99)
    assert timeless(second[0]) == timeless(first[-1])  # the last report is repeated
    assert [timeless(r) for r in first + second[1:]] == [timeless(r) for r in whole]


def test_an_older_copy_is_replaced_and_a_current_one_is_kept(tmp_path):
    here, there = node(tmp_path, "a"), node(tmp_path, "b")
    ours, theirs = Path(here.run or "") / "best", Path(there.run or "") / "best"
    ours.mkdir(parents=True)
    (ours / "metrics.json").write_text("1")
    here.push(ours)
    there.pull(theirs)
    assert (theirs / "metrics.json").read_text() == "1"
    (theirs / "metrics.json").write_text("2")
    there.push(theirs)
    here.pull(ours)
    assert (ours / "metrics.json").read_text() == "2"
    before = (ours / "metrics.json").stat().st_ino
    here.pull(ours)
    assert (ours / "metrics.json").stat().st_ino == before


def test_what_lies_outside_the_run_is_left_alone(tmp_path):
    places = node(tmp_path, "a")
    places.pull(tmp_path / "elsewhere")
    places.push(tmp_path / "elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_below(tmp_path):
    places = node(tmp_path, "a")
    inner = places.below(Path(places.run or "") / "stages" / "one")
    assert inner.run_url == f"file://{tmp_path}/bucket/run/stages/one"
    assert places.below(tmp_path) == places


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_data_are_copied_to_the_node_once(tmp_path, tiny_store, scheme):
    source, name = tiny_store.folder.parent, tiny_store.folder.name
    places = StorageLayout(data_source=f"{scheme}{source}", node_data=str(tmp_path / "node"))
    folder = places.data(str(tmp_path / "node" / name))
    assert folder == tmp_path / "node" / name
    copied = open_store(folder, verify=True)
    assert copied.manifest == tiny_store.manifest
    before = (folder / "manifest.json").stat().st_ino
    assert places.data(str(folder)) == folder
    assert (folder / "manifest.json").stat().st_ino == before


def test_new_data_under_the_old_name_replace_the_copy(tmp_path, tiny_store):
    source, name = tiny_store.folder.parent, tiny_store.folder.name
    other = tmp_path / "source" / name
    copy_store(str(source), name, tmp_path / "source")
    manifest = other / "manifest.json"
    copy_store(str(tmp_path / "source"), name, tmp_path / "node")
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    copied = copy_store(str(tmp_path / "source"), name, tmp_path / "node")
    assert (copied / "manifest.json").read_bytes() == manifest.read_bytes()


def test_processes_of_one_node_copy_together(tmp_path, tiny_store):
    source, name = str(tiny_store.folder.parent), tiny_store.folder.name
    context = multiprocessing.get_context("fork")
    arguments = (source, name, tmp_path / "node")
    workers = [context.Process(target=copy_store, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 4
    open_store(tmp_path / "node" / name, verify=True)


def test_data_that_are_not_there(tmp_path):
    for source in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(DataError, match=r"has no prepared data for text; prepare them with"):
            copy_store(source, "text", tmp_path / "node")
    assert not (tmp_path / "node").exists()


def test_places_travel_as_plain_values():
    assert all(isinstance(v, str | None) for v in dataclasses.asdict(StorageLayout()).values())
