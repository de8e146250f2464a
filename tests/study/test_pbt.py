"""Population based training: its decisions, its schedule, and kill -9 at every write."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.nn.optim import build_optimizer
from dmx.runs.layout import trial_folder
from dmx.runs.trial import Trial
from dmx.search.schedulers import (
    DONE,
    FACTORS,
    Idle,
    changeable,
    check_population,
    choose_takeovers,
    comparison_steps,
    explore,
)
from dmx.search.space import SearchSpace, load_space
from dmx.search.study_log import StudyLog
from dmx.storage.journal import Journal
from dmx.storage.remote import SHARED_FILESYSTEM, StorageLayout
from dmx.study.study import SegmentQueue, StudyConfig, adopted
from dmx.training.checkpoint import open_checkpoint
from dmx.training.job import Job
from dmx.training.runner import Runner
from tests.study.helpers import FIXED, space
from tests.tiny import TASK, config, one_sentence, trainer

MEMBERS, MAX_STEPS = 5, 12
SPACE = """
attention: butterfly
defaults: {attention.block_size: 16}
space:
  optim.learning_rate: {loguniform: [1.0e-4, 3.0e-2]}
  optim.weight_decay: {choice: [0.0, 1.0e-3, 1.0e-2]}
  model.dropout: {uniform: [0.0, 0.3]}
"""


def rates(folder: Path) -> SearchSpace:
    path = folder / "rates.yaml"
    path.write_text(SPACE)
    return load_space(str(path), TASK)


# -- decisions ----------------------------------------------------------------------------------


def test_when():
    assert comparison_steps(every=3, eval_every_steps=2, max_steps=12) == (4, 8, 12)
    assert comparison_steps(every=2, eval_every_steps=2, max_steps=7) == (2, 4, 6, 7)
    assert comparison_steps(every=50, eval_every_steps=2, max_steps=12) == (12,)


def test_the_worst_fifth_copies_the_best(tmp_path):
    chosen = rates(tmp_path)
    point = {"optim.learning_rate": 1e-3, "optim.weight_decay": 1e-3, "model.dropout": 0.1}
    points = {n: {**point, "model.dropout": 0.01 * n} for n in range(10)}
    scores = {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.6, 4: 0.6, 5: 0.7, 6: 0.8, 7: 0.2, 8: 0.6, 9: 0.3}
    common = {"step": 40, "scores": scores, "params": points, "space": chosen}
    found = choose_takeovers(seed=1, **common)
    assert [e.trial for e in found] == [2, 7] and {e.source for e in found} <= {1, 6}
    assert choose_takeovers(seed=1, **common) == found, "a function of its arguments"
    assert choose_takeovers(seed=2, **common) != found
    assert choose_takeovers(seed=1, **{**common, "step": 80}) != found
    level = dict.fromkeys(range(10), 0.5)
    assert choose_takeovers(seed=1, **{**common, "scores": level}) == (), (
        "nobody is better than another"
    )
    assert choose_takeovers(seed=1, **{**common, "scores": {3: 0.5}}) == ()


def test_what_changes_stays_in_the_space(tmp_path):
    chosen = rates(tmp_path)
    point = {"optim.learning_rate": 2e-2, "optim.weight_decay": 1e-2, "model.dropout": 0.2}
    moved = fresh = 0
    for seed in range(400):
        found = explore(point, chosen, random.Random(seed))
        assert all(chosen.space[k].holds(v) for k, v in found.items())
        near = [min(0.2 * f, 0.3) for f in FACTORS]
        if found["model.dropout"] in near:
            moved += 1
        else:
            fresh += 1
        rate = found["optim.learning_rate"]
        assert isinstance(rate, float) and 1e-4 <= rate <= 3e-2
    assert 0.18 < fresh / 400 < 0.32, "a quarter is drawn anew"
    choices = {explore(point, chosen, random.Random(s))["optim.weight_decay"] for s in range(40)}
    assert choices == {0.0, 1e-3, 1e-2}


def test_settings_over_time():
    trial = Trial(number=0, drawn={"a": 1, "b": 0}, changes={4: {"a": 2}, 8: {"a": 3}})
    assert [trial.params_at(s)["a"] for s in (2, 4, 6, 8, 9, 12)] == [1, 1, 2, 2, 3, 3]


def test_what_it_cannot_search(tmp_path):
    check_population(rates(tmp_path), 4)
    assert changeable("attention.dropout") and not changeable("attention.block_size")
    with pytest.raises(ConfigError, match=r"attention\.block_size, attention\.inner") as caught:
        check_population(space(tmp_path), 8)
    one_sentence(caught.value)
    with pytest.raises(ConfigError, match="needs at least 4") as caught:
        check_population(rates(tmp_path), 3)
    one_sentence(caught.value)
    fixed = rates(tmp_path).without(
        {"optim.learning_rate": 1e-3, "optim.weight_decay": 0.0, "model.dropout": 0.0}
    )
    with pytest.raises(ConfigError, match="nothing to change") as caught:
        check_population(fixed, 8)
    one_sentence(caught.value)


# -- taking over --------------------------------------------------------------------------------


def test_a_new_rate_rescales_the_whole_schedule(tiny_store: Store, tmp_path):
    """Weights and moments of the source; from there the rates of a run that always had the new."""
    new = {"optim__learning_rate": 2e-3, "optim__weight_decay": 0.01, "model__dropout": 0.2}
    with trainer(tiny_store, optim__learning_rate=5e-3) as source:
        source.advance()
        source.advance()
        source.save(tmp_path / "source")
    with trainer(tiny_store, **new) as own:
        own.advance()
        own.advance()
        own.save(tmp_path / "own")
        best = own.best_accuracy, own.best_step
    taken = open_checkpoint(tmp_path / "source")
    wanted = config(**new)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, schedule = build_optimizer([weight], wanted.optim, wanted.train.num_steps)
    curve = []
    for _ in range(wanted.train.num_steps):
        curve.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    with trainer(tiny_store, **new) as made:
        made.adopt(taken, open_checkpoint(tmp_path / "own"))
        state = made.model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in taken.model_state().items())
        moments = taken.training_state()["optimizer"]["state"]
        ours = made.optimizer.state_dict()["state"]
        assert all(torch.equal(ours[i]["exp_avg"], moments[i]["exp_avg"]) for i in moments)
        assert made.step == 4 and (made.best_accuracy, made.best_step) == best
        assert {g["weight_decay"] for g in made.optimizer.param_groups} == {0.01}
        seen = []
        for step in range(4, wanted.train.num_steps):
            made._optimizer_step(made.batches(step))
            seen.append(made.learning_rate)
    assert seen == pytest.approx(curve[4:], rel=1e-9)


# -- the population without Ray -----------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: what runs after it must not write."""


def population(folder: Path, places: StorageLayout = SHARED_FILESYSTEM) -> StudyConfig:
    return StudyConfig(
        name="s",
        task=TASK,
        space=rates(folder.parent),
        overrides={**FIXED, "train.num_steps": MAX_STEPS},
        num_trials=MEMBERS,
        max_steps=MAX_STEPS,
        grace_steps=4,
        scheduler="pbt",
        sampler="random",
        seed=5,
        places=places,
    )


def train(
    folder: Path,
    store: Store,
    slots: int = 1,
    places: StorageLayout = SHARED_FILESYSTEM,
    cut: Cut | None = None,
) -> None:
    """What Ray does: `slots` segments are handed out, and end in another order than they began."""
    study = population(folder, places)
    log = StudyLog(folder, study)
    segments = SegmentQueue(log, study.make_scheduler(), store)
    try:
        while True:
            jobs: list[tuple[int, dict[str, Any]]] = []
            while len(jobs) < slots and not isinstance(found := segments.next(), Idle):
                jobs.append(found)
            if not jobs:
                assert found is DONE, "some member can always go on"
                return
            for number, job in reversed(jobs):
                run_segment(log, number, job, cut)
                log.in_flight.discard(number)
    finally:
        log.close()


class Cut(BaseException):
    """The end of a session in the middle of a segment, after the report of a trial at a step."""

    def __init__(self, trial: int, step: int, *, kill: bool) -> None:
        super().__init__()
        self.at, self.kill = (trial, step), kill


def run_segment(log: StudyLog, number: int, fields: dict[str, Any], cut: Cut | None) -> None:
    job = Job(**fields)
    runner = Runner(job)
    killed = False
    try:
        result: dict[str, Any] = {"done": False}
        while not result["done"]:
            result = runner.step()
            assert "failure" not in result, result
            if "under_way" in result:
                continue
            log.report(number, result["steps"], result)
            if cut is not None and (number, result["steps"]) == cut.at:
                assert not result["done"], "in the middle of a segment"
                runner._trainer.advance(0)  # a step further than the report
                killed = cut.kill
                raise cut
        if not result.get("segment_ended"):
            log.finish(number, "COMPLETE")
    finally:
        if killed:
            assert runner._claim is not None
            runner._claim.release()  # as the end of a process does
        else:
            runner.close()
        if job.places.run_url is not None:  # the next segment, and the comparison, are elsewhere
            shutil.rmtree(job.folder)


def picture(folder: Path) -> tuple[Any, ...]:
    """All that matters: generations, curves, and the weights and settings everybody ended with."""
    log = StudyLog(folder, population(folder))
    generations = [
        {k: v for k, v in e.items() if k != "time"}
        for e in log.journal.events
        if e["event"] == "compared"
    ]
    curves = {t.number: {s: m["dev_accuracy"] for s, m in t.curve.items()} for t in log.trials}
    results = [(t.status, t.params, dict(t.changes)) for t in log.trials]
    log.close()
    ends = []
    for number in range(MEMBERS):
        for name in ("best", "last"):
            found = open_checkpoint(trial_folder(folder, number) / name)
            weights = sum(v.double().abs().sum().item() for v in found.model_state().values())
            ends.append((number, name, found.metrics["steps"], weights, found.config.optim))
    return generations, curves, results, ends


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_store: Store) -> Path:
    folder = tmp_path_factory.mktemp("pbt") / "study"
    train(folder, tiny_store)
    return folder


def test_a_population(undisturbed):
    """Two comparisons; whoever copied goes on from the source's weights with its own settings."""
    generations, curves, results, ends = picture(undisturbed)
    assert [g["step"] for g in generations] == [4, 8]
    assert sum(len(g["exploits"]) for g in generations) == 2
    assert all(list(curve) == [2, 4, 6, 8, 10, 12] for curve in curves.values())
    for generation in generations:
        step = generation["step"]
        scores = {n: curve[step] for n, curve in curves.items()}
        for exploit in generation["exploits"]:
            trial, source = exploit["trial"], exploit["source"]
            assert scores[source] == max(scores.values()) > scores[trial] == min(scores.values())
            taken = open_checkpoint(adopted(undisturbed, trial, step))
            assert taken.metrics["steps"] == step
            assert taken.metrics["dev_accuracy"] == scores[source]
    for number, (status, params, changes) in enumerate(results):
        assert status == "COMPLETE"
        last = next(e for e in ends if e[:2] == (number, "last"))
        now = Trial(number=number, drawn=params, changes=changes).params_at(MAX_STEPS)
        assert last[4].learning_rate == now["optim.learning_rate"]
        assert last[4].weight_decay == now["optim.weight_decay"]


@pytest.mark.slow
def test_slots_and_turns_change_nothing(undisturbed, tiny_store, tmp_path):
    train(tmp_path / "study", tiny_store, slots=3)
    assert picture(tmp_path / "study") == picture(undisturbed)


@pytest.mark.slow
def test_nodes_that_meet_in_object_storage_only(undisturbed, tiny_store, tmp_path):
    folder = tmp_path / "study"
    places = StorageLayout(run=str(folder), run_url=(tmp_path / "bucket").as_uri())
    train(folder, tiny_store, places=places)
    for number in range(MEMBERS):
        for name in ("best", "last"):
            places.pull(trial_folder(folder, number) / name)
    assert picture(folder) == picture(undisturbed)


@pytest.mark.slow
def test_killed_at_any_write_it_ends_the_same(undisturbed, tiny_store, tmp_path, monkeypatch):
    """At journal lines, before and in the middle of copies, and at checkpoints."""
    from dmx.training import trainer as trainer_module

    real_append, real_copy = Journal.append, shutil.copytree
    real_save = trainer_module.save_checkpoint
    count, at, dead = [0], [0], [False]

    def moment() -> bool:
        if dead[0]:
            raise Killed
        count[0] += 1
        dead[0] = count[0] == at[0]
        return dead[0]

    def append(self, **event):
        if moment():
            raise Killed
        real_append(self, **event)

    def copytree(source, target, *args, **more):
        if moment():
            Path(target).mkdir()
            shutil.copy(Path(source) / "model.safetensors", target)
            raise Killed
        return real_copy(source, target, *args, **more)

    def save(folder, **parts):
        if moment():
            raise Killed
        real_save(folder, **parts)

    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(Journal, "append", append)
    monkeypatch.setattr(shutil, "copytree", copytree)
    monkeypatch.setattr(trainer_module, "save_checkpoint", save)
    expected = picture(undisturbed)
    train(tmp_path / "count", tiny_store)
    total = count[0]
    assert picture(tmp_path / "count") == expected
    near = [i for i in range(1, total + 1) if i % 12 == 7]
    for kill in near:
        folder = tmp_path / f"kill-{kill}"
        count[0], at[0], dead[0] = 0, kill, False
        with pytest.raises(Killed):
            train(folder, tiny_store)
        count[0], at[0], dead[0] = 0, 0, False
        train(folder, tiny_store)
        assert picture(folder) == expected, f"killed at write {kill} of {total}"


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["interrupted", "killed"])
@pytest.mark.parametrize("step", [2, 6, 10])
def test_a_segment_that_is_cut_is_continued(undisturbed, tiny_store, tmp_path, step, kill):
    """Of the member that took over another one's weights, and of one that did not."""
    taker = next(e["trial"] for g in picture(undisturbed)[0] for e in g["exploits"])
    for member in {taker, (taker + 1) % MEMBERS}:
        folder = tmp_path / f"study-{member}"
        with pytest.raises(Cut):
            train(folder, tiny_store, cut=Cut(member, step, kill=kill))
        train(folder, tiny_store)
        assert picture(folder) == picture(undisturbed)
