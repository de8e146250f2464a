"""Bad input to tune and train: one sentence, exit code 2, no Ray, and nothing written."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmx import __main__ as dmx_main
from dmx import train, tune
from dmx.cli import options as cli
from dmx.cli.completion import PARSERS
from dmx.cluster import capacity, connection
from dmx.costs import estimate as costs
from dmx.errors import ConfigError, DmxError
from dmx.runs.run import Run
from dmx.storage.journal import Journal
from dmx.study.folder import run_folder
from tests.tiny import SETTINGS, TASK, one_sentence, write_tiny

ROOT = Path(__file__).resolve().parents[2]
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]+ ")
TUNE = ["--attention", "butterfly", "--task", TASK, "--data-root", "DATA", "--no-prepare"]
SMALL = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
TRAIN = [*TUNE, *(f"{key}={value}" for key, value in SETTINGS.items())]

TUNE_BAD = {
    "nothing": ([], "give --attention and --task, or --resume RUN"),
    "no-task": (["--attention", "butterfly"], "give --attention and --task"),
    "resume-alone": (["--resume"], "--resume needs the run: --resume runs/NAME, or --name NAME."),
    "resume-path": (["--resume", "runs/x"], "--resume runs/x: there is no run in that folder."),
    "unknown-option": ([*TUNE, "--frobnicate"], "unrecognized arguments: --frobnicate"),
    "no-abbreviation": ([*TUNE, "--num", "3"], "unrecognized arguments: --num 3"),
    "near-option": ([*TUNE, "--num-trial", "3"], "did you mean --num-trials?"),
    "setting-option": (
        [*TUNE, "--learning-rate", "1e-3"],
        "did you mean --set optim.learning_rate=VALUE?",
    ),
    "set-section": ([*TUNE, "--set", "learning_rate=1"], "did you mean optim.learning_rate?"),
    "set-short": ([*TUNE, "--set", "optim.lr=1"], "did you mean optim.learning_rate?"),
    "set-root": ([*TUNE, "--set", "data.root=/x"], "data.root is not possible in a search; use --"),
    "duration": ([*TUNE, "--time-budget", "10x"], "'10x' is no duration; give seconds, or 90s"),
    "not-a-number": ([*TUNE, "--num-trials", "many"], "invalid int value: 'many'"),
    "no-choice": ([*TUNE, "--sampler", "grid"], "invalid choice: 'grid'"),
    "objective": ([*TUNE, "--objective", "accuracy,speed"], "'speed' is unknown; choices: acc"),
    "objective-stop": (
        [*TUNE, "--objective", "accuracy,latency", "--scheduler", "hyperband"],
        "--scheduler hyperband stops trials by accuracy alone",
    ),
    "objective-pbt": (
        [*TUNE, "--objective", "accuracy,latency", "--scheduler", "pbt"],
        "--scheduler pbt copies weights between trials by accuracy alone",
    ),
    "price": ([*TUNE, "--price-per-gpu-hour", "2"], "add --dry-run, or leave it out"),
    "dry-resume": ([*TUNE, "--dry-run", "--resume"], "there is no study to resume in"),
    "dry-warm": ([*TUNE, "--dry-run", "--warm-start", "none"], "its name below --storage"),
    "dry-pbt": (
        [*TUNE, "--dry-run", "--scheduler", "pbt"],
        "attention.block_size, model.num_layers cannot be searched",
    ),
    "dry-no-prepare": (
        ["--attention", "softmax", "--task", "listops", "--dry-run", "--no-prepare"],
        "python -m dmx.data listops",
    ),
    "storage-empty": ([*TUNE, "--storage", ""], "argument --storage: it is empty"),
    "space-empty": ([*TUNE, "--space", ""], "argument --space: it is empty"),
    "warm-empty": ([*TUNE, "--warm-start", ""], "argument --warm-start: it is empty"),
    "address-empty": ([*TUNE, "--address", ""], "argument --address: it is empty"),
    "pbt-shapes": (
        [*TUNE, "--scheduler", "pbt", "--num-trials", "8"],
        "attention.block_size, model.num_layers cannot be searched",
    ),
    "grace": ([*TUNE, "--grace-steps", "0"], "--grace-steps is 0; it must be at least 1"),
    "grace-none": (
        [*TUNE, "--grace-steps", "3", "--scheduler", "none"],
        "--grace-steps means nothing to --scheduler none",
    ),
    "factor": (
        [*TUNE, "--reduction-factor", "1"],
        "--reduction-factor is 1.0; it must be at least 1.1",
    ),
    "factor-near-1": (
        [*TUNE, "--reduction-factor", "1.0000001"],
        "--reduction-factor is 1.0000001; it must be at least 1.1",
    ),
    "factor-nan": ([*TUNE, "--reduction-factor", "nan"], "--reduction-factor is nan"),
    "factor-pbt": (
        [*TUNE, "--reduction-factor", "4", "--scheduler", "pbt"],
        "--reduction-factor means nothing to --scheduler pbt; leave it out, or choose asha or",
    ),
    "objective-cmaes": (
        [*TUNE, "--objective", "accuracy,memory", "--sampler", "cmaes"],
        "cmaes knows one objective only",
    ),
    "warm-none": ([*TUNE, "--warm-start", "missing"], "missing: there is no study in that folder"),
    "warm-random": (
        [*TUNE, "--warm-start", "missing", "--sampler", "random"],
        "--warm-start is of no use to --sampler random",
    ),
    "attention": (["--attention", "buterfly", "--task", TASK], "did you mean 'butterfly'?"),
    "attention-size": (["--attention", "softmax-4", "--task", TASK], "'softmax' has no size"),
    "size-contradicts": (
        ["--attention", "butterfly-32", "--task", TASK, "--set", "attention.block_size=16"],
        "--attention butterfly-32 and --set attention.block_size contradict",
    ),
    "block": (["--attention", "butterfly-48", "--task", TASK], "block_size is 48"),
    "block-long": (["--attention", "butterfly-512", "--task", TASK], "block_size is 512"),
    "task": (["--attention", "butterfly", "--task", "txt"], "did you mean 'text'?"),
    "task-family": (["--attention", "butterfly", "--task", "pathfinder8"], "names no Pathfinder"),
    "task-alias": (["--attention", "butterfly", "--task", "imdb"], "is called text here"),
    "set-form": ([*TUNE, "--set", "a"], "override 'a' must look like a.b=value"),
    "set-key": ([*TUNE, "--set", "model.num_layer=2"], "did you mean model.num_layers?"),
    "set-type": ([*TUNE, "--set", "model.num_layers=two"], "must be a whole number, not 'two'"),
    "set-twice": ([*TUNE, "--set", "a.b=1", "--set", "a.b=2"], "override a.b is given twice"),
    "set-yaml": ([*TUNE, "--set", "a.b=[1"], "override a.b line 1 is not valid YAML"),
    "set-task": ([*TUNE, "--set", "task=text"], "--set task is not possible"),
    "set-attention": ([*TUNE, "--set", "attention.name=softmax"], "is not possible"),
    "set-steps": ([*TUNE, "--set", "train.num_steps=x"], "train.num_steps must be a whole number"),
    "set-every": ([*TUNE, "--set", "train.eval_every_steps=[1]"], "must be a whole number"),
    "set-value": ([*TUNE, "--set", "optim.learning_rate=-1"], "learning_rate is -1"),
    "set-layers": ([*TUNE, "--set", "model.num_layers=1000000000"], "it must lie in 1..1024"),
    "set-huge": ([*TUNE, "--set", f"optim.learning_rate=1{'0' * 400}"], "too large"),
    "set-warmup": ([*TUNE, "--set", "optim.warmup_steps=999999"], "warmup_steps is 999999"),
    "set-device": ([*TUNE, "--set", "train.device=cuda"], "the cluster has no GPU"),
    "steps-twice": ([*TUNE, "--set", "train.num_steps=9", "--max-steps", "8"], "give one of them"),
    "steps-few": ([*TUNE, "--max-steps", "1"], "warmup_steps is 2"),
    "storage-url": ([*TUNE, "--storage", "nfs://host/runs"], "is no storage URL that pyarrow"),
    "node-data": ([*TUNE, "--node-data", ""], "argument --node-data: it is empty"),
    "node-data-file": ([*TUNE, "--node-data", "/dev/null/x"], "it must be a folder"),
    "scratch-file": ([*TUNE, "--scratch", "/dev/null"], "--scratch is '/dev/null'"),
    "node-data-above": ([*TUNE, "--node-data", "/"], "is or holds the data themselves"),
    "trials": ([*TUNE, "--num-trials", "0"], "--num-trials is 0"),
    "budget": ([*TUNE, "--time-budget", "0"], "--time-budget is 0"),
    "budget-nan": ([*TUNE, "--time-budget", "nan"], "--time-budget is nan"),
    "finals": ([*TUNE, "--final-seeds", "-1"], "--final-seeds is -1"),
    "cpus": ([*TUNE, "--cpus-per-trial", "0"], "--cpus-per-trial is 0"),
    "cpus-many": ([*TUNE, "--cpus-per-trial", "9999"], "asks for 9999 CPUs, but the cluster has"),
    "gpus": ([*TUNE, "--trials-per-gpu", "2"], "the cluster has no GPU"),
    "space-name": ([*TUNE, "--space", "buterfly"], "did you mean 'butterfly'?"),
    "space-file": ([*TUNE, "--space", "missing.yaml"], "missing.yaml does not exist"),
    "space-other": ([*TUNE, "--space", "softmax"], "is for attention 'softmax', not 'butterfly'"),
    "space-yaml": ([*TUNE, "--space", "bad.yaml"], "is not valid YAML"),
    "space-corner": ([*TUNE, "--space", "corner.yaml"], "attention.block_size=48"),
    "name-path": ([*TUNE, "--name", "../x"], "--name is '../x'"),
    "name-absolute": ([*TUNE, "--name", "/x"], "--name is '/x'"),
    "name-empty": ([*TUNE, "--name", ""], "--name is ''"),
    "name-dots": ([*TUNE, "--name", ".."], "--name is '..'"),
    "name-lines": ([*TUNE, "--name", "a\nb"], r"--name is 'a\nb'"),
    "name-long": ([*TUNE, "--name", "x" * 300], "cannot be written (File name too long)"),
    "storage-file": ([*TUNE, "--storage", "bad.yaml"], "cannot be written (Not a directory)"),
    "storage-proc": ([*TUNE, "--storage", "/proc/dmx"], "cannot be written"),
    "resume-nothing": ([*TUNE, "--resume"], "there is no study to resume"),
    "data-none": (
        ["--attention", "butterfly", "--task", "listops", "--data-root", "x", "--no-prepare"],
        "python -m dmx.data listops",
    ),
    "data-empty": ([*TUNE[:5], "EMPTY", "--no-prepare"], "manifest.json is not readable JSON"),
    "data-torn": ([*TUNE[:5], "TORN", "--no-prepare"], "tokens.bin has"),
    "data-edited": ([*TUNE[:5], "EDITED", "--no-prepare"], "labels.npy has another content"),
    "warm-start-url": ([*TUNE, "--warm-start", "s3://b/x"], "--warm-start s3://b/x is in object"),
    "address": ([*TUNE, "--address", "127.0.0.1:1"], "no Ray cluster answers at --address"),
}
TRAIN_BAD = {
    "nothing": ([], "give --attention and --task, --config FILE, or --resume RUN"),
    "no-task": (["--attention", "butterfly"], "give --attention and --task"),
    "word": ([*TRAIN, "hello"], "override 'hello' must look like a.b=value"),
    "unknown-option": ([*TRAIN, "--fast"], "unrecognized arguments: --fast"),
    "key": ([*TRAIN, "train.step=3"], "train.step is not a setting"),
    "key-section": ([*TRAIN, "learning_rate=1"], "did you mean optim.learning_rate?"),
    "key-short": ([*TRAIN, "optim.lr=1"], "did you mean optim.learning_rate?"),
    "key-two": ([*TRAIN, "seed=1"], "did you mean data.seed or train.seed?"),
    "key-option": ([*TRAIN, "--learning-rate", "1"], "did you mean optim.learning_rate=VALUE?"),
    "block": ([*TRAIN[:-7], "attention.block_size=48"], "attention.block_size is 48"),
    "attention": (["--attention", "fancy", "--task", TASK], "attention 'fancy' is unknown"),
    "task": (["--attention", "butterfly", "--task", "imdb"], "task 'imdb' is called text here"),
    "device": ([*TRAIN, "train.device=cuda"], "this machine does not have"),
    "device-name": ([*TRAIN, "train.device=tpu"], "train.device is 'tpu'; allowed:"),
    **{
        f"url{option}": ([*TRAIN, option, "s3://b/x"], f"{option} s3://b/x is in object storage")
        for option in ("--config", "--init-from", "--evaluate", "--storage", "--data-root")
    },
    "threads": ([*TRAIN, "--threads", "-2"], "--threads is -2"),
    "seed": ([*TRAIN, f"train.seed={2**64}"], "train.seed is"),
    "config-none": (["--config", "none.yaml"], "none.yaml cannot be read"),
    "config-yaml": (["--config", "bad.yaml"], "is not valid YAML"),
    "config-list": (["--config", "list.yaml"], "must hold a mapping"),
    "name": ([*TRAIN, "--name", "a/b"], "--name is 'a/b'"),
    "name-long": ([*TRAIN, "--name", "x" * 300], "cannot be written (File name too long)"),
    "storage-file": ([*TRAIN, "--storage", "bad.yaml"], "cannot be written (Not a directory)"),
    "resume-nothing": ([*TRAIN, "--resume"], "there is no run to resume"),
    "price": ([*TRAIN, "--price-per-gpu-hour", "2"], "add --dry-run, or leave it out"),
    "root-empty": ([*TRAIN, "--data-root", ""], "argument --data-root: it is empty"),
    "config-empty": (["--config", ""], "argument --config: it is empty"),
    "evaluate-empty": (["--evaluate", ""], "argument --evaluate: it is empty"),
    "init-dry": ([*TRAIN, "--init-from", "nowhere", "--dry-run"], "nowhere does not exist"),
    "init-none": ([*TRAIN, "--init-from", "nowhere"], "nowhere does not exist"),
    "init-text": ([*TRAIN, "--init-from", "bad.yaml"], "cannot be read: it is damaged, or"),
    "data-none": (
        ["--attention", "softmax", "--task", "listops", "--data-root", "x", "--no-prepare"],
        "python -m dmx.data listops",
    ),
    "data-torn": ([*TRAIN[:5], "TORN", *TRAIN[6:]], "tokens.bin has"),
    "classes": ([*TRAIN, "model.vocab_size=9"], "model.vocab_size is 9; task "),
    "evaluate": (["--evaluate", "nowhere"], "nowhere is not a whole checkpoint"),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sound and damaged data roots."""
    found = {}
    for name in ("DATA", "EMPTY", "TORN", "EDITED"):
        root = tmp_path_factory.mktemp(name)
        store = write_tiny(root)
        found[name] = str(root)
        if name == "EMPTY":
            (store.folder / "manifest.json").write_bytes(b"")
        elif name == "TORN":
            tokens = store.folder / "tokens.bin"
            os.truncate(tokens, tokens.stat().st_size // 2)
        elif name == "EDITED":
            labels = store.folder / "labels.npy"
            content = bytearray(labels.read_bytes())
            content[-1] ^= 1
            labels.write_bytes(bytes(content))
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder but for some bad files; and a Ray that must not start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DMX_DATA_ROOT", raising=False)
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "corner.yaml").write_text(
        "attention: butterfly\nspace: {attention.block_size: {choice: [16, 48]}}\n"
    )
    yield
    logger = logging.getLogger("dmx")
    logger.handlers.clear()
    logger.propagate = True


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"<folder>"
        for p in sorted(folder.rglob("*"))
    }


def refused(prog, main, words, roots, capsys) -> str:
    """The sentence, after exit code 2 and one line that is no log line."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(prog, main, [roots.get(word, word) for word in words])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if not LOG_LINE.match(line)]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"{prog}: ")
    return lines[0]


@pytest.mark.parametrize(("words", "message"), TUNE_BAD.values(), ids=TUNE_BAD)
def test_tune_refuses(words, message, roots, tmp_path, capsys, monkeypatch):
    if words[-2:-1] != ["--address"]:
        monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    before = tree(tmp_path)
    assert message in refused("dmx.tune", tune.main, words, roots, capsys)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("words", "message"), TRAIN_BAD.values(), ids=TRAIN_BAD)
def test_train_refuses(words, message, roots, tmp_path, capsys):
    before = tree(tmp_path)
    assert message in refused("dmx.train", train.main, words, roots, capsys)
    assert tree(tmp_path) == before


def test_an_existing_study_without_resume(roots, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    folder = tmp_path / "runs" / f"butterfly-{TASK}"
    folder.mkdir(parents=True)
    (folder / "something").write_text("x")
    before = tree(tmp_path)
    for prog, main, words in (("dmx.tune", tune.main, TUNE), ("dmx.train", train.main, TRAIN)):
        text = refused(prog, main, words, roots, capsys)
        assert f"{folder} already exists; add --resume to continue it, or give --name." in text
    assert tree(tmp_path) == before


def test_resuming_another_study_is_refused_with_the_difference(
    roots, tmp_path, capsys, monkeypatch
):
    """The first try stops before its first trial; what it wrote is all there is to resume."""
    steps = SMALL.index(f"train.num_steps={SETTINGS['train.num_steps']}")
    small = [*SMALL[: steps - 1], *SMALL[steps + 1 :], "--max-steps", "8"]
    words = [roots.get(word, word) for word in [*TUNE, *small, "--seed", "3"]]
    begin_study(words, monkeypatch)
    run = str(tmp_path / "runs" / f"butterfly-{TASK}")
    before = tree(tmp_path)
    for again in ([*words, "--resume"], ["--resume", run], ["--resume", "--name", Path(run).name]):
        for changed, part in (
            (["--seed", "4"], "--seed was 3, now 4"),
            (["--scheduler", "none"], "--scheduler was 'asha', now 'none'"),
            (["--set", "model.dropout=0.5"], "--set model.dropout was not given, now 0.5"),
            (["--reduction-factor", "4"], "--reduction-factor was 3.0, now 4.0"),
            (["--grace-steps", "5"], "--grace-steps was 2, now 5"),
            (["--max-steps", "40"], "--max-steps was 8, now 40); the learning rate's schedule"),
            (["--objective", "accuracy,latency", "--scheduler", "none"], "--objective was not"),
            (["--attention", "softmax"], "search space" if again[0] != "--resume" else "softmax"),
        ):
            assert part in refused("dmx.tune", tune.main, [*again, *changed], roots, capsys)
    assert tree(tmp_path) == before
    with Journal(tmp_path / "runs" / f"butterfly-{TASK}" / "journal.jsonl") as journal:
        journal.append(event="x")
        text = refused("dmx.tune", tune.main, [*words, "--resume"], roots, capsys)
        assert "is in use by another dmx process" in text
    other = refused("dmx.train", train.main, ["--resume", run], roots, capsys)
    remedy = f"continue it with python -m dmx.tune --resume {run}"
    assert other == f"dmx.train: {run} holds a study; {remedy}"
    log = journal.path.read_bytes()
    journal.path.write_bytes(b"x" + log + log)
    text = refused("dmx.tune", tune.main, [*words, "--resume"], roots, capsys)
    assert "journal.jsonl line 1 is damaged" in text
    assert tree(Path(run) / "trials") == {} and before


def begin_study(words, monkeypatch):
    """Run dmx.tune to where its first trial would start, without Ray."""

    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stop

    resources = contextlib.nullcontext(capacity.local_resources())
    with monkeypatch.context() as patch:
        patch.setattr("dmx.study.run.train_trials", stop)
        patch.setattr(connection, "connect", lambda address: resources)
        with pytest.raises(Stop):
            tune.main(words)


def test_a_study_whose_ray_does_not_start_leaves_nothing(roots, tmp_path, monkeypatch):
    def no_ray(*args, **kwargs):
        raise RuntimeError("Ray did not start")

    words = [roots.get(word, word) for word in [*TUNE, *SMALL]]
    before = tree(tmp_path)
    monkeypatch.setattr("ray.init", no_ray)
    with pytest.raises((RuntimeError, DmxError)):
        tune.main(words)
    assert tree(tmp_path) == before


SPACE = """
attention: butterfly
defaults: {model.dropout: 0.0}
space:
  attention.block_size: {choice: [16, 32]}
  optim.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}
when:
  - if: {attention.block_size: 32}
    then: {optim.weight_decay: {uniform: [0.0, 0.1]}}
initial_points:
  - {attention.block_size: 16, optim.learning_rate: 1.0e-3}
"""


def test_a_space_file_that_was_edited_is_another_study(roots, tmp_path, capsys, monkeypatch):
    """Its fixed values, conditions and start points decide trials as its distributions do."""
    file = tmp_path / "mine.yaml"
    file.write_text(SPACE)
    words = [roots.get(word, word) for word in [*TUNE, "--max-steps", "8", "--space", "mine.yaml"]]
    begin_study([*words, "--name", "s"], monkeypatch)
    before = tree(tmp_path / "runs")
    for old, new, said in (
        ("t: 0.0", "t: 0.9", "model.dropout in the search space's `defaults` was 0.0, now 0.9"),
        (
            "4, 1.0e-2",
            "4, 1.0",
            "in the search space's `space` was ['loguniform', 0.0001, 0.01], n",
        ),
        ("[0.0, 0.1]", "[0.0, 0.2]", "optim.weight_decay in the search space's `space` was"),
        ("{attention.block_size: 32}", "{attention.block_size: 16}", "`when` of the search space"),
        (
            "16, optim.learning_rate",
            "32, optim.learning_rate",
            "`initial_points` of the search space",
        ),
    ):
        file.write_text(SPACE.replace(old, new))
        for again in ([*words, "--name", "s", "--resume"], ["--resume", "runs/s"]):
            assert said in refused("dmx.tune", tune.main, again, roots, capsys)
            assert tree(tmp_path / "runs") == before
    file.write_text("# a comment is no setting\n" + SPACE)
    begin_study(["--resume", "runs/s", "--num-trials", "9"], monkeypatch)
    assert Run.read(tmp_path / "runs" / "s").settings["num_trials"] == 9


def test_dry_run_shows_and_writes_nothing(roots, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    before = tree(tmp_path)
    rungs = ["--max-steps", "90", "--grace-steps", "2", "--reduction-factor", "4"]
    assert tune.main([roots.get(w, w) for w in [*TUNE, *rungs, "--dry-run"]]) == 0
    out = capsys.readouterr().out
    assert "asha, rungs at 2, 8, 32 steps, the best 1/4 go on" in out
    assert "(tiny)" in out and "search optim.learning_rate: loguniform [0.0001, 0.01]" in out
    assert "Nothing was started" in out and tree(tmp_path) == before


@pytest.mark.parametrize("module", [tune, train])
def test_a_dry_run_on_a_sample_leaves_none(module, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("DMX_DATA_ROOT", str(tmp_path / "data"))
    asked = []

    def cost(config, store, **rest):
        asked.append((store.manifest.label, len(store.split("train")), store.folder))
        raise ConfigError("enough")

    monkeypatch.setattr(costs, "run_cost", cost)
    monkeypatch.setattr(costs, "study_cost", cost)
    with pytest.raises(ConfigError, match="enough"):
        module.main(["--attention", "softmax", "--task", "image", "--dry-run"])
    ((label, examples, folder),) = asked
    assert (label, examples) == ("sample-digits, not LRA", 1200)
    assert not (tmp_path / "data").exists() and not folder.exists()


@pytest.mark.parametrize("module", [tune, train])
def test_a_dry_run_generates_no_data(module, tmp_path, capsys, monkeypatch):
    """It measures on a stand-in where the run itself would generate its data, and says so."""
    asked = []

    def cost(config, store, *, num_dev, **rest):
        asked.append((store.manifest.task, num_dev))
        raise ConfigError("enough")

    monkeypatch.setattr(costs, "run_cost", cost)
    monkeypatch.setattr(costs, "study_cost", cost)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="enough"):
        module.main(["--attention", "softmax", "--task", "listops", "--dry-run"])
    assert asked == [("listops", 2000)] and tree(tmp_path) == before


def test_show_is_a_config_that_reads_back(roots, tmp_path, capsys):
    assert train.main([roots.get(w, w) for w in [*TRAIN, "train.seed=77", "--show"]]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert train.main(["--config", "shown.yaml", "--show"]) == 0
    assert "seed: 77" in capsys.readouterr().out


def test_the_package_lists_its_commands(capsys):
    assert dmx_main.main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in listed[:-1]] == list(PARSERS)
    assert "python -m dmx.tune --help" in refused("dmx", dmx_main.main, ["tune"], {}, capsys)


@pytest.mark.parametrize("name", ["ü b", "a.b", "x" * 200])
def test_names_that_are_fine(tmp_path, name):
    assert run_folder(str(tmp_path), name, "d") == tmp_path / name
    assert run_folder(str(tmp_path / "new" / "er"), None, "d") == tmp_path / "new" / "er" / "d"
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError) as caught:
        run_folder(str(tmp_path), f"/{name}", "d")
    one_sentence(caught.value)


@pytest.mark.parametrize("module", ["dmx.tune", "dmx.train"])
def test_as_a_process(module, tmp_path):
    """The real exit code and stderr; and a reader that goes away causes no traceback."""
    words = [sys.executable, "-m", module]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, "--attention", "fancy", "--task", "text"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "attention 'fancy' is unknown" in done.stderr
    if module == "dmx.train":
        show = [*words, "--attention", "butterfly", "--task", "text", "--show"]
        shell = f"{' '.join(show)} | true; echo ${{PIPESTATUS[0]}}"
        bash = shutil.which("bash")
        assert bash
        done = subprocess.run(
            [bash, "-c", shell], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.stderr == "" and done.stdout.strip() in ("0", "1")
