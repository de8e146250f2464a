"""Shards: equal for any workers, only the missing ones are made, dead workers are reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dmx.data import shards
from dmx.data.shards import ShardPlan, make_shards, read_shards
from dmx.errors import DataError
from tests.data import makers


def plan(folder: Path, maker: str = "squares", total: int = 25, **arguments: int) -> ShardPlan:
    return ShardPlan(
        store=folder / "set",
        maker=f"tests.data.makers:{maker}",
        arguments=arguments,
        total=total,
        size=10,
    )


def content(p: ShardPlan) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(p.folder.iterdir())}


@pytest.mark.parametrize("maker", ["squares", "noisy"])
def test_bytes_do_not_depend_on_workers(tmp_path: Path, maker: str) -> None:
    made = []
    for workers in (1, 3):
        p = plan(tmp_path / str(workers), maker)
        make_shards(p, workers=workers)
        made.append(content(p))
        values = np.concatenate([arrays["values"] for _, arrays in read_shards(p)])
        assert values.tolist() == [n * n for n in range(25)]
        assert [start for start, _ in read_shards(p)] == [0, 10, 20]
    assert made[0] == made[1]
    assert len(made[0]) == 3


def test_only_missing_shards_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = plan(tmp_path)
    make_shards(p, workers=1)
    whole = content(p)
    p.path(p.shards[1]).unlink()
    (p.folder / ".x.1.partial").write_bytes(b"torn by kill -9")
    asked = []

    def counted(start: int, stop: int) -> dict[str, np.ndarray]:
        asked.append((start, stop))
        return {"values": np.arange(start, stop) ** 2}

    monkeypatch.setattr(makers, "squares", counted)
    make_shards(p, workers=1)
    assert asked == [(10, 20)]
    assert content(p) == whole


def test_other_arguments_never_share_shards(tmp_path: Path) -> None:
    assert plan(tmp_path).folder != plan(tmp_path, offset=1).folder
    make_shards(plan(tmp_path), workers=1)
    make_shards(plan(tmp_path, offset=1), workers=1)
    assert next(read_shards(plan(tmp_path, offset=1)))[1]["values"][0] == 1


def test_a_larger_set_reuses_full_shards_only(tmp_path: Path) -> None:
    make_shards(plan(tmp_path, total=25), workers=1)
    make_shards(plan(tmp_path, total=40), workers=1)
    larger = plan(tmp_path, total=40)
    assert sum(len(arrays["values"]) for _, arrays in read_shards(larger)) == 40


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.95])
def test_damaged_shard_is_removed_and_made_again(tmp_path: Path, where: float) -> None:
    p = plan(tmp_path, total=400)
    p = ShardPlan(**{**p.__dict__, "size": 200})
    make_shards(p, workers=1)
    whole = content(p)
    broken = bytearray(p.path(p.shards[1]).read_bytes())
    place = int(where * len(broken))
    broken[place : place + 8] = bytes(b ^ 0xFF for b in broken[place : place + 8])
    p.path(p.shards[1]).write_bytes(bytes(broken))
    with pytest.raises(DataError, match=r"is damaged .* run the same command again"):
        list(read_shards(p))
    make_shards(p, workers=1)
    assert content(p) == whole


def test_dead_worker_is_one_sentence_and_finished_shards_stay(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"worker process died \(signal 9\)"):
        make_shards(plan(tmp_path, "suicide"), workers=2)
    assert list(plan(tmp_path, "suicide").folder.iterdir()) == []


def test_a_worker_whose_part_is_done_ends_in_order(tmp_path: Path) -> None:
    p = plan(tmp_path)
    p.folder.mkdir(parents=True)
    worker = shards._start_worker(p, p.shards[::2])
    assert worker.wait(60) == 0, "its standard input is open, as while others work"
    shards._check(worker, p)
    assert [path.name[:8] for path in sorted(p.folder.iterdir())] == ["00000000", "00000020"]
    worker.communicate()


@pytest.mark.parametrize("workers", [1, 2])
def test_makers_own_errors_come_through(tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match="No room for"):
        make_shards(plan(tmp_path, "refused"), workers=workers)


def test_a_bug_in_a_worker_shows_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
        make_shards(plan(tmp_path, "broken"), workers=2)


@pytest.mark.slow
def test_ray_makes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    make_shards(plan(tmp_path / "here"), workers=1)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        make_shards(plan(tmp_path / "ray"), workers=1, on_cluster=True)
    finally:
        ray.shutdown()
    assert content(plan(tmp_path / "ray")) == content(plan(tmp_path / "here"))
