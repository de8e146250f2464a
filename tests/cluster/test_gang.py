"""Who is in a gang, and when: its members are made up, and no Ray is needed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dmx.cluster import capacity, gang
from dmx.cluster.capacity import Resources
from dmx.runs.layout import FAILURE, RESUMABLE, STEPS, UNDER_WAY
from dmx.training.job import Job, Workers

Report = dict[str, Any]


class FakeRay:
    """Answers are there at once, but for those of members without room.

    Attributes:
        room: how many members have room. dies: whether the member dies in this step.
        alive: numbers of the living members, in the order of their start. groups: sizes of the
            groups that met, and whether each took over.
    """

    def __init__(self) -> None:
        self.room = 2
        self.step = 0
        self.repeats = False
        self.started = 0
        self.alive: dict[int, SimpleNamespace] = {}
        self.groups: list[tuple[int, bool]] = []
        self.dies: Callable[[int], bool] = lambda member: False
        self.fails: Callable[[int], bool] = lambda member: False

    def options(self, **resources: Any) -> Any:
        assert (resources["num_cpus"], resources["num_gpus"]) == (1, 0)
        assert resources["scheduling_strategy"] is not None, "never its trial's placement group"
        return SimpleNamespace(remote=self.start)

    def start(self) -> Any:
        number, self.started = self.started, self.started + 1
        made = SimpleNamespace(number=number)
        for name in ("node", "listen", "join", "step", "close"):
            call = SimpleNamespace(remote=lambda *a, name=name: (number, name, *a))
            setattr(made, name, call)
        self.alive[number] = made
        return made

    def kill(self, member: Any) -> None:
        del self.alive[member.number]

    def wait(self, calls: list[Any], *, num_returns: int = 1, timeout: Any = None) -> Any:
        with_room = sorted(self.alive)[: self.room]
        ready = [c for c in calls if c[1] != "node" or c[0] in with_room][:num_returns]
        return ready, [c for c in calls if c not in ready]

    def get(self, calls: Any, timeout: Any = None) -> Any:
        return [self.answer(*c) for c in calls] if isinstance(calls, list) else self.answer(*calls)

    def answer(self, number: int, name: str, *arguments: Any) -> Any:
        if name == "join":
            job, _, rank, size = arguments
            if rank == 0:
                self.groups.append((size, job.takes_over))
        if name != "step":
            return f"{number:056x}"  # a node of its own
        if self.dies(number):
            raise gang.RayError("a heading\nits process was killed")
        if self.fails(number):
            return {STEPS: self.step, FAILURE: "no memory", "done": True}
        if number == min(self.alive):
            self.step += 0 if self.repeats else 2
            self.repeats = False
        return {STEPS: self.step, "done": False}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    monkeypatch.setattr(gang, "ray", made)
    monkeypatch.setattr(gang, "_RemoteMember", made)
    monkeypatch.setattr(capacity, "resources", lambda: Resources(4, 0, ((4.0, 0.0),)))
    return made


def members(ray: FakeRay, workers: int = 2, form_seconds: float = 0.0) -> gang.Gang:
    job = Job(run_config={}, data_folder="", folder="", workers=Workers(count=workers))
    return gang.Gang(job, form_seconds=form_seconds)


def test_all_are_started_again_when_one_dies(ray):
    """From the last checkpoint, whose report is known: it is not given twice."""
    run = members(ray)
    assert run.step()[STEPS] == 2
    dead = []

    def dies(number: int) -> bool:
        if number == 1 and not dead:
            dead.append(number)
            ray.step, ray.repeats = 2, True  # what the leader did meanwhile was not kept
        return dead == [number]

    ray.dies = dies
    assert run.step()[STEPS] == 4
    assert ray.groups == [(2, False), (2, True)] and sorted(ray.alive) == [2, 3]
    run.close()
    assert not ray.alive


def test_four_deaths_without_a_report_are_the_end(ray):
    run = members(ray)
    run.step()
    ray.dies = lambda number: True
    report = run.step()
    assert report[RESUMABLE] and report["done"] and report[STEPS] == 2
    assert report[FAILURE] == (
        "its workers died 4 times without getting any further, last: its process was killed"
    )
    assert len(ray.groups) == 1 + 3 and not ray.alive


def test_a_failure_of_one_ends_all(ray):
    """The others may be waiting for it."""
    run = members(ray)
    ray.fails = lambda number: number == 1
    assert run.step()[FAILURE] == "no memory"
    assert not ray.alive


def test_who_finds_no_room_joins_later(ray):
    """A gang of one of three; then there is room for two, and for all."""
    run = members(ray, workers=3)
    steps = []
    for ray.room in (1, 1, 2, 3):
        steps.append(run.step()[STEPS])
    assert steps == [2, 4, 6, 8]
    assert [size for size, _ in ray.groups] == [1, 2, 3]
    run.close()
    assert not ray.alive


def test_no_more_are_waited_for_than_the_cluster_can_hold(ray, monkeypatch):
    """Of a node that is gone nobody waits for room; the patience here would be an hour."""
    monkeypatch.setattr(capacity, "resources", lambda: Resources(1, 0, ((1.0, 0.0),)))
    ray.room = 1
    run = members(ray, form_seconds=3600)
    run.step()
    assert ray.groups == [(1, False)]


def test_waiting_for_room_comes_back_after_a_slice_and_waits_on(ray):
    """So that whoever runs the gang hears a signal meanwhile."""
    two = Workers(count=2)
    job = Job(run_config={}, data_folder="", folder="", workers=two, slice_seconds=0.01)
    run = gang.Gang(job, form_seconds=60.0)
    for room, started in ((0, 1), (0, 1), (1, 2), (1, 2)):
        ray.room = room
        report = run.step()
        assert report[UNDER_WAY] and not report["done"]
        assert ray.started == started and ray.groups == []
    ray.room = 2
    assert run.step()[STEPS] == 2
    assert ray.groups == [(2, False)] and ray.started == 2
    run.close()
    assert not ray.alive
