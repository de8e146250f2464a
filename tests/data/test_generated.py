"""Generated sets: the original's images, the reference's split, whole after kill -9 and Ctrl-C."""

from __future__ import annotations

import hashlib
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmx.data.pathfinder import Generator
from dmx.data.prepare import open_data, prepare_data
from dmx.data.readers import pathfinder
from dmx.data.store import open_store
from dmx.errors import ConfigError, DataError
from tests.data.helpers import cli_command, cli_environment


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "manifest.json"}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder, "SHARD_SIZE", 7)


def test_images_stand_in_the_references_split(tmp_path: Path, small_shards: None) -> None:
    store = prepare_data("pathX-cl14_nogap", tmp_path, options={"num_images": 30}, workers=1)
    generator = Generator("pathX-cl14_nogap", 123)
    order = list(range(30))
    random.Random(2222).shuffle(order)
    for split, numbers in (("train", order[:24]), ("dev", order[24:27]), ("test", order[27:])):
        got = store.split(split)
        assert len(got) == len(numbers)
        for place in (0, len(numbers) - 1):
            image, label = generator.image(numbers[place])
            assert (got.tokens(place).reshape(128, 128) == image).all()
            assert got.labels[place] == label
    # Labels of images 0..19 with seed 123, as the original draws them (lra-data.md, 5.8).
    known = [0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    labels = dict(zip(order[:24], store.split("train").labels.tolist(), strict=True))
    assert all(label == known[n] for n, label in labels.items() if n < 20)
    assert store.manifest.label == "pathX-cl14_nogap (partial: 30 of 200,000 examples)"
    assert store.manifest.parameters["generator"]["num_distractors"] == 5
    assert not [p for p in tmp_path.iterdir() if "shards" in p.name]


def test_golden_images_arrive_in_the_store(tmp_path: Path, small_shards: None) -> None:
    store = prepare_data("pathX-cl14_nogap", tmp_path, options={"num_images": 10}, workers=1)
    # SHA-256 of what the original wrote for images 0, 2 and 1 of seed 123 (lra-data.md, 5.8).
    known = {3: "323f1e4ab871cfeb", 4: "286d131057700a8b", 7: "a755b7a783122c86"}
    for place, digest in known.items():  # the order of ten images starts 6 8 9 0 2 5 7 1
        tokens = store.split("train").tokens(place).tobytes()
        assert hashlib.sha256(tokens).hexdigest().startswith(digest)


def test_equal_bytes_for_any_number_of_workers(tmp_path: Path, small_shards: None) -> None:
    task, options = "pathfinder16-cl3-d1", {"num_images": 40, "seed": 5}
    one = prepare_data(task, tmp_path / "1", options=options, workers=1)
    three = prepare_data(task, tmp_path / "3", options=options, workers=3)
    assert content(one.folder) == content(three.folder)
    assert one.manifest.label == f"{task} (generated, 40 images, seed 5)"


def test_render_and_seed_change_the_images(tmp_path: Path, small_shards: None) -> None:
    task = "pathfinder32-curv_baseline"
    sums = {
        prepare_data(
            task, tmp_path, options={"num_images": 10, **more}, workers=1, force=True
        ).manifest.checksum
        for more in ({}, {"seed": 1}, {"render": "lra"})
    }
    assert len(sums) == 3


def test_bad_settings_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    for options, message in (
        ({"num_images": 9}, "--num-images 9 is too small"),
        ({"seed": -1}, "seed -1"),
        ({"render": "pretty"}, "'pretty'"),
        ({"num_train": 5}, "--num-train has no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_data("pathX-cl14_nogap", tmp_path, options=options)
    with pytest.raises(ConfigError, match="alpha"):
        prepare_data("pathX-cl14_alpha9.0", tmp_path)
    with pytest.raises(ConfigError, match="names no Pathfinder set"):
        prepare_data("pathfinder33-curv_baseline", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(pathfinder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"needs 4\.1 GB in .*, but only 1 MB are free"):
        prepare_data("pathX-cl14_nogap", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".pathX-cl14_nogap.lock"]


def test_what_it_needs_is_said_before_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, small_shards: None
) -> None:
    with caplog.at_level("INFO", logger="dmx"):
        open_data(
            "pathfinder16-cl3-d1", tmp_path, workers=1, options={"num_images": 20}, generate=True
        )
    first = next(m for m in caplog.messages if "generating 20 images" in m)
    assert re.search(r"5\.12 kB on disk of the .* that are free", first)
    assert open_data("pathfinder16-cl3-d1", tmp_path, generate=True).manifest.num_bytes > 5000
    with pytest.raises(DataError, match="num_images=20 instead of num_images=30"):
        open_data("pathfinder16-cl3-d1", tmp_path, options={"num_images": 30}, generate=True)


def test_missing_set_that_cannot_be_generated_gives_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"python -m dmx\.data image --source PATH"):
        open_data("image", tmp_path, generate=True)


ARGUMENTS = ("listops", "--num-train", "3900", "--num-dev", "50", "--num-test", "50")
"""Four shards of a thousand; about 0.7 s each on one core."""


def start_and_wait_for_a_shard(root: Path, workers: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        cli_command(*ARGUMENTS, "--data-root", str(root), "--workers", str(workers)),
        env=cli_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(root.glob(".listops.shards-*/0*.npz")):
        assert process.poll() is None, "it ended before its first shard"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("whole")
    options = {"num_train": 3900, "num_dev": 50, "num_test": 50}
    return content(prepare_data("listops", root, options=options, workers=2).folder)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_generation_continues_to_the_same_bytes(
    tmp_path: Path, uninterrupted: dict[str, bytes], workers: int
) -> None:
    process = start_and_wait_for_a_shard(tmp_path, workers)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "listops").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob(".listops.shards-*/0*.npz")}
    assert 1 <= len(kept) < 4, "killed too late to prove anything"
    again = start_and_wait_for_a_shard(tmp_path, workers)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0
    assert re.search(rf"continuing listops: {len(kept)}000 of 4000", errors)
    assert content(tmp_path / "listops") == uninterrupted
    open_store(tmp_path / "listops", verify=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".listops.lock", "listops"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_how_to_continue(
    tmp_path: Path, uninterrupted: dict[str, bytes], number: signal.Signals
) -> None:
    process = start_and_wait_for_a_shard(tmp_path, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "continue with: python -m dmx.data listops --num-train 3900" in errors
    names = [p.name for p in tmp_path.iterdir()]
    assert not [n for n in names if "partial" in n or n == "listops"]
    again = subprocess.run(
        cli_command(*ARGUMENTS, "--data-root", str(tmp_path)), env=cli_environment(), timeout=120
    )
    assert again.returncode == 0
    assert content(tmp_path / "listops") == uninterrupted


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from dmx.data.shards import *\n"
        "p = ShardPlan(store=pathlib.Path(sys.argv[1]) / 'x', maker='tests.data.makers:pids',"
        " arguments={'folder': sys.argv[1]}, total=1000, size=1)\n"
        "make_shards(p, workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], env=cli_environment()
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    workers = [int(p.stem) for p in tmp_path.glob("*.pid")]
    while any(
        Path(f"/proc/{pid}/cmdline").exists()
        and b"dmx.data.shards" in Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in workers
    ):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
