"""Samplers: as good as Optuna's own, the same after any restart, and never unpickled from disk."""

from __future__ import annotations

import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from dmx.errors import ConfigError
from dmx.runs.study import SamplerKind
from dmx.runs.trial import directions, pareto_front
from dmx.search import samplers
from dmx.search.samplers import SAMPLERS, _Seeded, check_sampler, independent, make_sampler
from dmx.search.space import SearchSpace, load_space
from dmx.search.study_log import StudyLog
from dmx.study.study import StudyConfig
from tests.search.test_space import WAYS
from tests.study.helpers import next_trial, open_log, remaining, space
from tests.tiny import TASK, one_sentence

KINDS = [(kind, ("accuracy",)) for kind in SAMPLERS] + [
    (kind, ("accuracy", "latency", "parameters")) for kind in ("tpe", "nsga2", "random")
]


def ids(case: tuple[str, tuple[str, ...]]) -> str:
    return f"{case[0]}-{len(case[1])}"


def open_ledger(folder: Path, kind: str, objectives: tuple[str, ...], count: int) -> StudyLog:
    return open_log(
        folder,
        space=space(folder.parent),
        num_trials=count,
        seed=3,
        sampler=kind,
        objectives=objectives,
    )


def finish(ledger: StudyLog, number: int, point: dict[str, Any]) -> None:
    """A made-up training: a rate near 1e-2 and little dropout are good, large blocks are fast."""
    far = abs(math.log10(point["optim.learning_rate"]) + 2)
    value = round(0.9 - 0.1 * far - point["model.dropout"], 6)
    cost = 100.0 * (1 + point["attention.block_size"] / 16) + number % 3
    report = {"steps": 2, "dev_accuracy": value, "best_dev_accuracy": value}
    report |= {"samples_per_second": cost, "parameters": 1000 + point["attention.block_size"]}
    if number % 7 == 5:  # one that dies
        ledger.finish(number, "FAILED", "it broke")
        return
    ledger.report(number, 2, report)
    stopped = number % 7 == 3 and len(ledger.objectives) == 1
    ledger.finish(number, "PRUNED" if stopped else "COMPLETE")


def play(folder: Path, case: tuple[str, tuple[str, ...]], restarts: set[int], count: int = 26):
    """Points in the order of proposal, with up to three trials at once that end in any order."""
    draw = random.Random(11)
    ledger = open_ledger(folder, *case, count)
    running: dict[int, dict[str, Any]] = {}
    seen: dict[int, dict[str, Any]] = {}
    moment = 0
    while True:
        moment += 1
        if moment in restarts:
            ledger.close()
            ledger = open_ledger(folder, *case, count)
            for number, point in running.items():
                assert next_trial(ledger) == (number, point), "the interrupted ones come first"
        if len(running) < 3 and len(seen) < count and draw.random() < 0.7:
            number, point = next_trial(ledger) or (-1, {})
            assert number == len(seen)
            running[number] = seen[number] = point
        elif running:
            number = draw.choice(sorted(running))
            finish(ledger, number, running.pop(number))
        elif len(seen) == count:
            break
    assert next_trial(ledger) is None and remaining(ledger) == 0
    ledger.close()
    return list(seen.values())


@pytest.mark.parametrize("case", KINDS, ids=ids)
def test_restarts_change_no_proposal(tmp_path, monkeypatch, case):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    count = 11 if case[0] == "gp" else 26  # its proposals take half a second each
    whole = play(tmp_path / "a", case, set(), count)
    every = set(range(2, 60)) if case[0] != "gp" else {15, 19}
    assert play(tmp_path / "b", case, every, count) == whole
    assert len({json.dumps(p) for p in whole}) > count // 2
    if case[0] not in ("random", "gp"):
        assert whole != play(tmp_path / "c", ("random", case[1]), set(), count)


def live_points(kind: SamplerKind, objectives: tuple[str, ...], folder: Path, count: int):
    """The same samplers in one Optuna study that lives on, as Optuna means them to be used."""
    chosen = space(folder)
    study = optuna.create_study(directions=directions(objectives))
    config = StudyConfig(
        name="s",
        task=TASK,
        space=chosen,
        num_trials=count,
        max_steps=2,
        grace_steps=2,
        sampler=kind,
        seed=3,
    )
    points = []
    for number in range(count):
        study.sampler = _Seeded(config, number)
        if number < len(chosen.initial_points):
            study.enqueue_trial(dict(chosen.initial_points[number]))
        trial = study.ask()
        _ = trial.relative_params
        point = chosen.suggest(trial)
        points.append(point)
        far = abs(math.log10(point["optim.learning_rate"]) + 2)
        value = round(0.9 - 0.1 * far - point["model.dropout"], 6)
        block = point["attention.block_size"]
        values = [value, 1000 / (100.0 * (1 + block / 16) + number % 3), 1000.0 + block]
        if number % 7 == 5:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, values[: len(objectives)])
    return points, study


@pytest.mark.parametrize(
    "case", [("cmaes", ("accuracy",)), ("nsga2", ("accuracy", "latency", "parameters"))], ids=ids
)
def test_a_replay_is_the_sampler_that_lived_on(tmp_path, case):
    """What is rebuilt for each proposal has gone through the same generations."""
    count = 40
    expected, study = live_points(*case, tmp_path, count)
    ledger = open_ledger(tmp_path / "a", *case, count)
    found = []
    while (asked := next_trial(ledger)) is not None:
        found.append(asked[1])
        finish(ledger, *asked)
    ledger.close()
    assert found == expected
    key = {"cmaes": "cmawm:generation", "nsga2": "NSGAIISampler:generation"}[case[0]]
    generations = [t.system_attrs.get(key, 0) for t in study.trials]
    assert max(generations) >= 2, "there were several generations"


def test_cmaes_converges(tmp_path):
    """Its two numbers end near the optimum; random search's do not."""

    def last_errors(kind: str) -> float:
        ledger = open_ledger(tmp_path / kind, kind, ("accuracy",), 40)
        errors = []
        while (asked := next_trial(ledger)) is not None:
            point = asked[1]
            errors.append(
                abs(math.log10(point["optim.learning_rate"]) + 2) + point["model.dropout"]
            )
            finish(ledger, *asked)
        ledger.close()
        return sum(errors[-10:]) / 10

    assert last_errors("cmaes") < 0.5 * last_errors("random")


class Trap:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_is_pickled_into_or_out_of_the_folder(tmp_path):
    folder = tmp_path / "s"
    ledger = open_ledger(folder, "cmaes", ("accuracy",), 20)
    for _ in range(14):
        asked = next_trial(ledger)
        assert asked is not None
        finish(ledger, *asked)
    ledger.close()
    log = folder / "optuna.journal"
    assert b"optimizer" not in log.read_bytes()
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(log)))
    study = optuna.load_study(study_name=None, storage=storage)
    assert {k for t in study.trials for k in t.system_attrs} == set()
    sprung = tmp_path / "sprung"
    poison = pickle.dumps(Trap(sprung)).hex()
    # As somebody who gives the folder away might: where Optuna's sampler would look for it.
    trial = study.ask()
    for prefix in ("cma", "cmawm"):
        storage.set_trial_system_attr(trial._trial_id, f"{prefix}:optimizer:0", poison)
        storage.set_trial_system_attr(trial._trial_id, f"{prefix}:generation", 0)
    ledger = open_ledger(folder, "cmaes", ("accuracy",), 20)
    while (asked := next_trial(ledger)) is not None:
        finish(ledger, *asked)
    ledger.close()
    assert not sprung.exists(), "a pickle from the folder was loaded"
    pickle.loads(bytes.fromhex(poison))
    assert sprung.exists(), "the trap works"


NO_NUMBERS = """
attention: butterfly
space: {attention.block_size: {choice: [16, 32]}}
when:
  - if: {attention.block_size: 16}
    then: {optim.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}}
"""


def test_what_a_sampler_cannot_do(tmp_path, monkeypatch):
    chosen = space(tmp_path)
    names = ("attention.block_size", "attention.inner", "model.mlp_dropout")
    assert independent("cmaes", chosen) == names
    assert independent("gp", chosen) == independent("nsga2", chosen) == ("model.mlp_dropout",)
    assert independent("tpe", chosen) == independent("random", chosen) == ()
    for kind in SAMPLERS:
        check_sampler(kind, chosen)
    with pytest.raises(ConfigError, match="one objective only") as caught:
        check_sampler("cmaes", chosen, ("accuracy", "memory"))
    one_sentence(caught.value)
    path = tmp_path / "none.yaml"
    path.write_text(NO_NUMBERS)
    bare: SearchSpace = load_space(str(path), TASK)
    with pytest.raises(ConfigError, match="moves numbers") as caught:
        check_sampler("cmaes", bare)
    one_sentence(caught.value)
    real = samplers.importlib.util.find_spec
    monkeypatch.setattr(
        samplers.importlib.util, "find_spec", lambda n: None if n in ("cmaes", "scipy") else real(n)
    )
    for kind, package in (("cmaes", "cmaes"), ("gp", "scipy")):
        with pytest.raises(ConfigError, match=f"needs {package}; run: pip install 'dmx") as caught:
            check_sampler(kind, chosen)
        one_sentence(caught.value)
    assert {type(make_sampler(k, 1, 40)).__name__ for k in SAMPLERS} == {
        *("TPESampler", "RandomSampler", "CmaEsSampler", "GPSampler", "NSGAIISampler")
    }


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_sampler_searches_a_setting_with_several_distributions(tmp_path, kind, monkeypatch):
    """A new session in the middle changes nothing; results know the setting by its one name."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    path = tmp_path / "ways.yaml"
    path.write_text(WAYS)
    chosen = load_space(str(path), TASK)
    count = 12

    def points(name: str, restarts: set[int]) -> list[dict[str, Any]]:
        make = {"space": chosen, "num_trials": count, "seed": 2, "sampler": kind}
        ledger, found = open_log(tmp_path / name, **make), []
        while (asked := next_trial(ledger)) is not None:
            number, point = asked
            found.append(point)
            if number in restarts:
                ledger.close()
                ledger = open_log(tmp_path / name, **make)
                assert next_trial(ledger) == asked
            value = point.get("model.dropout", 0.0) + number / 100
            ledger.report(number, 2, {"steps": 2, "dev_accuracy": value})
            ledger.finish(number, "COMPLETE")
        assert [dict(r.params) for r in ledger.trials] == found
        ledger.close()
        return found

    found = points("once", set())
    assert points("again", {1, 6, 9}) == found
    assert found[0]["attention.block_size"] == 32 and found[0]["model.dropout"] == 0.4
    ranges = {16: (0.0, 0.1), 32: (0.0, 0.5), 64: (0.2, 0.3)}
    for point in found:
        low, high = ranges[point["attention.block_size"]]
        assert low <= point["model.dropout"] <= high
    assert len({p["attention.block_size"] for p in found}) == 3


def test_a_study_of_several_objectives_is_one_for_optuna(tmp_path):
    objectives = ("accuracy", "latency", "parameters")
    ledger = open_ledger(tmp_path / "s", "tpe", objectives, 9)
    lost = 2
    while (asked := next_trial(ledger)) is not None:
        if asked[0] == lost:  # it never measured its speed
            found = {"steps": 2, "dev_accuracy": 0.9, "best_dev_accuracy": 0.9, "parameters": 9}
            ledger.report(lost, 2, found)
            ledger.finish(lost, "COMPLETE")
        else:
            finish(ledger, *asked)
    results = ledger.trials
    ledger.close()
    assert results[lost].status == "FAILED" and results[lost].error == "it reported no latency"
    storage = optuna.storages.JournalStorage(
        JournalFileBackend(str(tmp_path / "s" / "optuna.journal"))
    )
    study = optuna.load_study(study_name=None, storage=storage)
    assert study.metric_names == ["dev accuracy", "latency, ms per sample", "parameters"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    points = {r.number: list(r.values.values()) for r in results if r.status == "COMPLETE"}
    assert {t.number: t.values for t in study.trials if t.values} == points
    assert pareto_front(objectives, points) == tuple(sorted(t.number for t in study.best_trials))
