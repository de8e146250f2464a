"""What waits for room in a cluster is spoken of, and what can never have room is refused."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import pytest
import yaml

from dmx import train, tune
from dmx.cluster import capacity, connection, gang
from dmx.cluster.capacity import Resources, RoomWatch, Snapshot, Work, amount, check_request
from dmx.curriculum import __main__ as curriculum
from dmx.errors import ConfigError
from dmx.training.job import Workers
from tests.tiny import TASK, one_sentence

WANTED = Work("worker of a run", 1, 0)
OURS = Work("trial", 1, 0, "this command")
OTHER = Work("run", 3, 1, "job 02000000 (python -m dmx.train, pid 7)")
TWO_NODES = Resources(6, 2, ((2.0, 1.0), (4.0, 1.0)))


def seen(*waits: str, free: float = 0, largest: float = 0) -> Snapshot:
    pieces = dict.fromkeys(waits, WANTED)
    return Snapshot(pieces, (OURS, OURS, OTHER), (free, 0), (5, 1), (largest, 0))


def said(*moments: tuple[float, Snapshot]) -> list[str | None]:
    """What a watch says at these times, with a patience of 3 s, and again after 10."""
    now = [0.0, seen()]
    watch = RoomWatch(lambda: now[1], after=3, again=10, clock=lambda: now[0])
    found = []
    for now[:] in moments:
        found.append(watch.check())
    return found


def test_what_waits_for_long_is_spoken_of():
    first, early, text, quiet, again = said(
        (0, seen("a")), (2, seen("a", "b")), (4, seen("a", "b")), (9, seen("a")), (14, seen("a"))
    )
    assert (first, early, quiet) == (None, None, None)
    assert text == (
        "waiting for room in the cluster for 4 s: 1 x worker of a run of 1 CPU. Free: 0 of 5 CPUs "
        "and 0 of 1 GPUs. Held by: 1 x run of job 02000000 (python -m dmx.train, pid 7) with 3 "
        "CPUs and 1 GPU; 2 x trial of this command with 2 CPUs. It starts when some of these end, "
        "or when nodes are added."
    )
    assert again is not None and again.startswith("waiting for room in the cluster for 14 s")


def test_what_had_room_in_between_waits_anew():
    assert said((0, seen("a")), (2, seen()), (4, seen("a")), (6, seen("a"))) == [None] * 4


def test_room_that_lies_on_several_nodes():
    """Two CPUs are free in all, and each node has one less than is asked for."""
    wide = {"a": Work("trial", 2, 0)}
    text = capacity.describe(Snapshot(wide, (OURS,), (2, 0), (4, 0), (1, 0)), 31)
    assert "1 x trial of 2 CPUs. Free: 2 of 4 CPUs (at most 1 CPU on one node)." in text


def test_amounts():
    assert [amount(1, 0), amount(0, 1), amount(2, 0.5), amount(0, 0)] == [
        *("1 CPU", "1 GPU", "2 CPUs and 0.5 GPUs", "0 CPUs"),
    ]


@pytest.mark.parametrize(
    ("asked", "slots"),
    [
        ({"cpus": 2, "gpus": 0}, 3),  # one on the small node, two on the large one
        ({"cpus": 4, "gpus": 0}, 1),
        ({"cpus": 3, "gpus": 0}, 1),  # 6 CPUs in all would be two
        ({"cpus": 6, "gpus": 0, "workers": 3}, 1),
        ({"cpus": 2, "gpus": 2, "workers": 2}, 1),
        ({"cpus": 1, "gpus": 0.3}, 5),  # three on a GPU, but two CPUs beside the first
    ],
)
def test_slots_are_counted_by_nodes(asked, slots):
    assert check_request(TWO_NODES, **asked) == slots


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"cpus": 5, "gpus": 0}, "a trial asks for 5 CPUs, each on one node"),
        ({"cpus": 1, "gpus": 2}, "a trial asks for 1 CPU and 2 GPUs"),
        ({"cpus": 6, "gpus": 0, "workers": 2}, "2 workers of a trial ask for 3 CPUs each"),
        ({"cpus": 7, "gpus": 0}, "7 CPUs, but the cluster has 6"),
        ({"cpus": 1, "gpus": 3, "workers": 3}, "3 GPUs, but the cluster has 2"),
    ],
)
def test_what_no_node_has_is_refused(asked, what):
    with pytest.raises(ConfigError) as refused:
        check_request(TWO_NODES, **asked)
    assert what in one_sentence(refused.value)
    grows = Resources(TWO_NODES.num_cpus, TWO_NODES.num_gpus, TWO_NODES.nodes, grows=True)
    assert check_request(grows, **asked) == 1, "an autoscaler may add a node that has"
    if "workers" in asked:
        each = asked["cpus"] / asked["workers"], asked["gpus"] / asked["workers"]
        with pytest.raises(ConfigError):
            capacity.check_room(
                Workers(count=asked["workers"], cpus=each[0], gpus=each[1]), TWO_NODES
            )


TUNE = ["--attention", "butterfly", "--task", TASK, "--cpus-per-trial"]
TRAIN = ["--attention", "butterfly", "--task", TASK, "--workers-per-trial", "2", "--threads"]
STAGES = {"defaults": {"attention": "butterfly"}, "stages": [{"name": "a", "task": TASK}]}


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (tune.main, [*TUNE, "5"]),
        (tune.main, [*TUNE, "6", "--workers-per-trial", "2"]),
        (tune.main, [*TUNE, "5", "--dry-run"]),
        (train.main, [*TRAIN, "12"]),
        (curriculum.main, ["mine.yaml", "--cpus-per-trial", "5"]),
    ],
    ids=["tune", "tune-workers", "tune-dry", "train", "curriculum"],
)
def test_a_cluster_without_such_a_node_refuses_before_anything_is_written(
    monkeypatch, tmp_path, tiny_root, main, words
):
    """Nodes of two and of four CPUs; only when the cluster answers is that known."""

    @contextlib.contextmanager
    def connect(address):
        assert address == "HEAD:1"
        yield Resources(6, 0, ((2.0, 0.0), (4.0, 0.0)))

    monkeypatch.setattr(connection, "connect", connect)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(STAGES))
    places = ["--address", "HEAD:1", "--data-root", str(tiny_root), "--storage", "runs"]
    with pytest.raises(ConfigError, match="the cluster") as refused:
        main([*words, *places, "--name", "run"])
    one_sentence(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_table_that_is_not_there_ends_no_work(monkeypatch):
    """Ray's tables are not public."""
    monkeypatch.setattr(capacity, "_LOOK_SECONDS", 0.01)

    def broken():
        raise AttributeError("get_actor_table")

    monkeypatch.setattr(capacity, "snapshot", broken)
    with capacity.watched():
        time.sleep(0.05)
    monkeypatch.setattr(capacity.importlib, "import_module", lambda name: SimpleNamespace())
    assert capacity._may_grow() is False


def test_a_cluster_whose_autoscaler_may_add_nodes_says_so(monkeypatch):
    """Then what no node has now is not refused."""
    state = SimpleNamespace(get_max_resources_from_cluster_config=lambda: {"CPU": 64})
    monkeypatch.setattr(capacity.importlib, "import_module", lambda n: SimpleNamespace(state=state))
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {}}]
    monkeypatch.setattr(capacity, "ray", SimpleNamespace(nodes=lambda: nodes))
    found = capacity.resources()
    assert found == Resources(2, 0, ((2.0, 0.0),), grows=True)
    assert check_request(found, cpus=8, gpus=1) == 1


@pytest.mark.slow
def test_rays_tables_say_it():
    """An actor, a trial's group and a task that wait; an actor and a group that hold the room."""
    import ray
    from ray.util.placement_group import placement_group

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=3, **options)
    try:
        with connection.connect(None):
            holder = ray.remote(num_cpus=1)(Holder).remote()
            ray.get(holder.hold.remote())
            group = placement_group([{"CPU": 1}, {"CPU": 1}])
            ray.get(group.ready())
            kept = [
                gang._RemoteMember.options(num_cpus=2).remote(),
                placement_group([{"CPU": 3}]),
                ray.remote(num_cpus=2)(_evaluate).remote(),
            ]
            deadline = time.monotonic() + 60
            with capacity.for_task():
                while len(capacity.snapshot().waiting) < len(kept):
                    assert time.monotonic() < deadline, f"not all is seen: {capacity.snapshot()}"
                    time.sleep(0.2)
                found = capacity.snapshot()
            assert sorted((p.what, p.cpus) for p in found.waiting.values()) == [
                *(("evaluation", 2), ("trial", 3), ("worker of a run", 2)),
            ]
            assert sorted((p.what, p.cpus, p.job) for p in found.holding) == [
                *(("actor Holder", 1, "this command"), ("trial", 2, "this command")),
            ]
            assert (found.free, found.total, found.largest) == ((0, 0), (3, 0), (0, 0))
            assert not capacity.resources().grows
    finally:
        ray.shutdown()


class Holder:
    def hold(self) -> bool:
        return True


def _evaluate() -> None:
    """Named as what evaluates a checkpoint."""
