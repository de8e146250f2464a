"""Hostile files: journals, manifests, checkpoints, settings, archives and pickles."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmx.data.sources import open_source
from dmx.data.store import _digest, open_store
from dmx.errors import DmxError, StageError
from dmx.reporting.leaderboard import FORMATS as LEADERBOARD
from dmx.reporting.leaderboard import gather, leaderboard_rows, leaderboards
from dmx.runs.curriculum import Curriculum
from dmx.storage.journal import Journal, encode, read_journal
from dmx.study.folder import check_same, settings_event
from dmx.training.checkpoint import open_checkpoint
from scripts.convert_pickles import load_pickle
from tests.fuzz.guard import held, share
from tests.fuzz.hostile import VALUES, WORDS, changed, torn
from tests.reporting.makers import make_curriculum, make_run, make_study
from tests.study.helpers import next_trial, open_log, space
from tests.tiny import TASK, trainer, write_tiny

METRICS = {"steps": 2, "dev_accuracy": 0.5, "best_dev_accuracy": 0.5, "train_loss": 1.0}
POINT = {
    "attention.block_size": 16,
    "attention.inner": "softmax",
    "optim.learning_rate": 5e-3,
    "model.dropout": 0.0,
}
EVENTS: list[dict[str, Any]] = [
    {"event": "started", "trial": 0, "params": POINT, "time": 0.5},
    {"event": "started", "trial": 1, "params": POINT, "time": 0.6},
    {"event": "report", "trial": 0, "step": 2, "metrics": METRICS, "time": 1.0},
    {"event": "outcome", "trial": 0, "status": "COMPLETE", "value": 0.5, "error": "", "time": 2.0},
    {"event": "report", "trial": 1, "step": 2, "metrics": METRICS, "time": 3.0},
    {
        **{"event": "compared", "step": 2, "time": 4.0},
        "exploits": [{"trial": 1, "source": 0, "params": {"optim.learning_rate": 1e-3}}],
    },
]
STAGES: list[dict[str, Any]] = [
    {
        **{"event": "session", "host": "h", "pid": 1, "time": 1.0, "last_stage": "a"},
        "stages": [{"name": "a", "task": TASK, "attention": "butterfly-16"}],
    },
    {
        **{"event": "started", "stage": "a", "attempt": 0, "retry": 0, "time": 2.0},
        **{"config": {"model": {"num_classes": 2}}, "source": {}, "spec": {}, "data": {}},
    },
    {"event": "report", "stage": "a", "attempt": 0, "step": 2, "metrics": METRICS},
    {
        **{"event": "decided", "stage": "a", "attempt": 0, "next": "promote", "passed": True},
        "checkpoint": {"attempt": 0, "path": "stages/a/attempt-0/best", "dev_accuracy": 0.5},
    },
    {"event": "tested", "stage": "a", "on": "a", "accuracy": None},
]


def lines(events: Any) -> bytes:
    """A journal whose checksums are right, whatever the events are."""
    return b"".join(encode(e if isinstance(e, dict) else {"event": e}) for e in events)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def study(room: Path) -> Path:
    """A study with one finished and one running trial."""
    folder = room / "study"
    with_space = space(room)
    ledger = open_log(folder, space=with_space, num_trials=4, seed=1)
    for _ in range(2):
        number, _point = next_trial(ledger) or (0, {})
        ledger.report(number, 2, METRICS)
        if number == 0:
            ledger.finish(number, "COMPLETE")
    ledger.close()
    return folder


def as_list(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) else [tree]


@share(0.09)
@given(st.one_of(torn(lines(EVENTS)), changed(EVENTS).map(as_list).map(lines)))
def test_journals_of_studies(room, study, content):
    """A damaged line in the middle is refused and stays; the rest is a study that goes on."""
    folder = room / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(study, folder)
    (folder / "journal.jsonl").write_bytes(content)
    with held(room):
        try:
            ledger = open_log(folder, space=space(room), num_trials=4, seed=1)
        except StageError:
            kept = (folder / "journal.jsonl").read_bytes()
            lost = content[len(kept) :]
            assert content.startswith(kept) and lost.count(b"\n") <= 1, "refused and changed"
            raise
        try:
            assert ledger.trials is not None
            next_trial(ledger)
        finally:
            ledger.close()


@share(0.03)
@given(st.data())
def test_optunas_file(room, study, data):
    folder = room / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(study, folder)
    file = folder / "optuna.journal"
    file.write_bytes(data.draw(torn(file.read_bytes())))
    with held(room):
        ledger = open_log(folder, space=space(room), num_trials=4, seed=1)
        try:
            assert ledger.trials is not None
        finally:
            ledger.close()


@share(0.04)
@given(st.one_of(torn(lines(STAGES)), changed(STAGES).map(as_list).map(lines)))
def test_journals_of_curricula(room, content):
    file = room / "curriculum" / "journal.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with held(room):
        events, _ = read_journal(file)
        Curriculum.read(file.parent)
        with Journal(file) as journal:
            assert journal.events == events


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of every kind, and a good one."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "run")
    make_study(folder / "study")
    make_curriculum(folder / "curriculum")
    make_run(folder / "good", 0.7)
    return folder


@share(0.02)
@given(st.data())
def test_a_bad_run_folder_hides_no_other(runs, room, data):
    kind = data.draw(st.sampled_from(["run", "study", "curriculum"]))
    file = data.draw(st.sampled_from(sorted(f for f in (runs / kind).rglob("*") if f.is_file())))
    root = room / "runs"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(runs / "good", root / "good")
    shutil.copytree(runs / kind, root / "bad")
    target, content = root / "bad" / file.relative_to(runs / kind), file.read_bytes()
    how = data.draw(st.sampled_from(["torn", "changed", "gone", "a folder", "a dead link"]))
    if how == "changed" and file.name == "journal.jsonl":
        target.write_bytes(data.draw(changed(read_journal(file)[0]).map(as_list).map(lines)))
    elif how == "changed" and file.suffix == ".json":
        target.write_text(data.draw(changed(json.loads(content)).map(json.dumps)))
    elif how in ("torn", "changed"):
        target.write_bytes(data.draw(torn(content)))
    else:
        target.unlink()
        if how == "a folder":
            target.mkdir()
        elif how == "a dead link":
            target.symlink_to(room / "nowhere")
    found = gather([root], unread := [])
    assert "good" in [run.name for run in found] and len(found) + len(unread) in (1, 2)
    assert "good" in LEADERBOARD["md"](leaderboards(leaderboard_rows(found)))


SETTINGS = {"task": TASK, "seed": 0, "overrides": {"model.num_layers": 1}}


@share(0.03)
@given(changed(settings_event("study", SETTINGS)))
def test_settings(room, event):
    folder = room / "settings"
    folder.mkdir(exist_ok=True)
    (folder / "journal.jsonl").write_bytes(encode(event if isinstance(event, dict) else {}))
    with held(room):
        check_same(folder, SETTINGS)


@pytest.fixture(scope="module")
def store(room: Path) -> Path:
    return write_tiny(room / "data").folder


def signed(body: Any) -> bytes:
    """A manifest whose own checksum is right, whatever it says."""
    if isinstance(body, dict):
        body.pop("manifest_sha256", None)
        body["manifest_sha256"] = _digest(body)
    return json.dumps(body).encode()


@share(0.07)
@given(st.data())
def test_manifests(room, store, data):
    folder = room / "broken-data"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(store, folder)
    file = folder / "manifest.json"
    body = json.loads(file.read_bytes())
    file.write_bytes(data.draw(st.one_of(torn(file.read_bytes()), changed(body).map(signed))))
    with held(room):
        found = open_store(folder)
        for split in found.manifest.splits:
            found.split(split).tokens(0)


@pytest.fixture(scope="module")
def checkpoint(room: Path, store: Path) -> Path:
    with trainer(open_store(store)) as made:
        made.advance()
        made.save(room / "checkpoint")
    return room / "checkpoint"


@share(0.07)
@given(st.data())
def test_checkpoints(room, checkpoint, data):
    folder = room / "broken-checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder)
    names = ["config.yaml", "metrics.json", "model.safetensors", "training_state.pt"]
    file = folder / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    choices = [torn(content), st.binary(max_size=60)]
    if file.suffix == ".json":
        choices.append(changed(json.loads(content)).map(lambda t: json.dumps(t).encode()))
    file.write_bytes(data.draw(st.one_of(choices)))
    with held(room):
        found = open_checkpoint(folder)
        found.model_state()
        found.training_state()
        with trainer(open_store(room / "data" / TASK)) as made:
            made.load(found)


KINDS = [
    *(tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE),
    *(tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE),
]
NAMES = st.one_of(
    st.sampled_from(["a/b.txt", "a", "a/../../x", "/abs", "..", "./a", "C:\\x", "a//b", *WORDS]),
    st.text(max_size=20).filter(lambda t: "\x00" not in t),
)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """A tar of up to five members of any kind and name; packed, and perhaps torn."""
    buffer = io.BytesIO()
    kind = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=kind, errors="surrogateescape") as archive:
        for _ in range(draw(st.integers(0, 5))):
            member = tarfile.TarInfo(draw(NAMES).replace("\x00", "0"))
            member.type = draw(st.sampled_from(KINDS))
            member.linkname = draw(st.sampled_from(["", "a", "../../x", "/etc/passwd"]))
            content = draw(st.binary(max_size=200))
            member.size = len(content) if member.type == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()
    if draw(st.booleans()):
        content = content[: tarfile.BLOCKSIZE * draw(st.integers(1, 8))]
    pack = draw(st.sampled_from([bytes, bytes, gzip.compress, bz2.compress, lzma.compress]))
    packed = pack(content)
    return draw(torn(packed)) if draw(st.booleans()) else packed


@share(0.09)
@given(st.one_of(archives(), st.binary(max_size=700)))
def test_archives(room, content):
    file = room / "source.tar"
    file.write_bytes(content)
    with held(room):
        source = open_source(file)
        source.locate(("a", ""), "b")
        for folder in ("", *source.folders("")):
            names = [f"{folder}/{name}" if folder else name for name in source.files(folder)]
            for _, stream in source.read_small(names):
                assert len(stream) <= 1 << 20


ARRAYS = {b"data": np.arange(12, dtype=np.uint8).reshape(3, 4), b"labels": [0, 1, 2]}


class Evil:
    """A pickle that would write a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))


@share(0.05)
@given(st.data())
def test_pickles(room, data):
    protocol = data.draw(st.integers(0, pickle.HIGHEST_PROTOCOL))
    odd = data.draw(st.one_of(st.just(ARRAYS), st.just(Evil("/tmp/evil")), VALUES))
    content = pickle.dumps(odd, protocol)
    if data.draw(st.booleans()):
        content = data.draw(torn(content))
    with held(room):
        load_pickle(io.BytesIO(content), "batch")
    if isinstance(odd, Evil) and content == pickle.dumps(odd, protocol):
        with pytest.raises(DmxError, match="not allowed"):
            load_pickle(io.BytesIO(content), "batch")
    assert not Path("/tmp/evil").exists()


def test_a_bomb_is_listed_in_little_memory(tmp_path):
    """A gigabyte of zeros in a megabyte of gzip: its listing streams; reading it is refused."""
    file = tmp_path / "bomb.tar.gz"
    size = 1 << 30
    with gzip.open(file, "wb", compresslevel=1) as out:
        member = tarfile.TarInfo("big")
        member.size = size
        out.write(member.tobuf())
        for _ in range(size >> 24):
            out.write(bytes(1 << 24))
    before = peak_mb()
    with held(tmp_path):
        source = open_source(file)
        assert source.size("big") == size
        with pytest.raises(DmxError, match="larger than 256 MiB"):
            next(iter(source.read_small(["big"])))
    assert peak_mb() - before < 100


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
