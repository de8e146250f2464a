"""Every event of a journal with its fields, and the one check that readers and writers rely on.

A field that is not named here is kept as it is; an event that is not named here is skipped. Each
event also has `event`, its name, and `time`, seconds since 1970, where that is known.
"""

# Postponed annotations would hide from TypedDict which keys are required.
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

from dmx.errors import StageError
from dmx.runs.layout import Kind

Plain = dict[str, Any]
"""What JSON calls an object."""


class Settings(TypedDict):
    """What decides the results, and what a session was started with; the latest one counts.

    The first line of a study's and of a single run's journal. `options`: of the command, as
    `--resume RUN` repeats them. `attention`: its label, such as `butterfly-64`.
    """

    kind: Kind
    settings: Plain
    options: Plain
    environment: Plain
    attention: NotRequired[str]
    argv: NotRequired[list[str]]
    time: NotRequired[float]


class StudySettings(TypedDict, total=False):
    """`settings` of a study."""

    task: str
    attention: str
    overrides: Plain
    searched: dict[str, list[Any]]
    num_trials: int
    max_steps: int
    grace_steps: int
    reduction_factor: float
    scheduler: str
    sampler: str
    seed: int
    objectives: list[str]
    warm_start: Plain
    data: str
    data_checksum: str


class Session(TypedDict):
    """A session begins; of a curriculum, with the stages of its file."""

    time: float


class Metrics(TypedDict):
    """Flat metrics at an evaluation (see dmx.runs.layout), as far as a reader relies on them."""

    steps: int
    dev_accuracy: NotRequired[float]
    best_dev_accuracy: NotRequired[float]


BRANCH = " if "
"""Between a setting and the condition under which a search space has it, in Optuna's names."""


def setting_of(label: str) -> str:
    """The setting's name in a name that Optuna knows (see SearchSpace.label)."""
    return label.partition(BRANCH)[0]


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's parameters of one trial under the settings' own names."""
    return {setting_of(label): value for label, value in params.items()}


def base_name(label: str) -> str:
    """`butterfly` of an attention's label `butterfly-64`."""
    name, dash, size = label.rpartition("-")
    return name if dash and size.isdecimal() else label


# -- a study --------------------------------------------------------------------------------


class TrialStarted(TypedDict):
    """A trial was proposed. `params`: its searched values by SearchSpace's labels."""

    trial: int
    params: Plain


class TrialReport(TypedDict):
    """A trial's evaluation."""

    trial: int
    step: int
    metrics: Metrics


class Outcome(TypedDict):
    """How a trial ended. `value`: its best dev accuracy; `values`: of several objectives."""

    trial: int
    status: Literal["COMPLETE", "PRUNED", "FAILED"]
    value: float | None
    error: str
    values: NotRequired[list[float]]


class Exploit(TypedDict):
    """`trial` goes on from the weights of `source`, with the searched values `params`."""

    trial: int
    source: int
    params: Plain


class Compared(TypedDict):
    """A population was compared at a step."""

    step: int
    exploits: list[Exploit]


class Final(TypedDict):
    """The best trial's checkpoint was tested, and trained again from other seeds."""

    trial: int
    step: int
    test_accuracy: float | None
    test_loss: float | None
    seeds: list[int]
    dev_accuracies: list[float]
    test_accuracies: list[float]


STUDY: Mapping[str, type] = {
    "settings": Settings,
    "session": Session,
    "started": TrialStarted,
    "report": TrialReport,
    "outcome": Outcome,
    "compared": Compared,
    "final": Final,
}

# -- a curriculum ---------------------------------------------------------------------------


class PlannedStage(TypedDict):
    """A stage of the curriculum's file. `attention`: its label. `parent`: the stage before it."""

    name: str
    task: str
    attention: str
    parent: NotRequired[str | None]


class CurriculumSession(TypedDict):
    """A session begins. `last_stage`: that which all stages are measured on."""

    time: float
    host: str
    pid: int
    stages: NotRequired[list[PlannedStage]]
    last_stage: NotRequired[str]
    argv: NotRequired[list[str]]


class Created(TypedDict):
    """The first session."""

    time: float


class Reset(TypedDict):
    """These stages begin anew (--from-stage)."""

    stages: list[str]


class AttemptStarted(TypedDict):
    """An attempt at a stage was launched.

    `retry` counts since the stage was last begun. `source`: where its weights come from; {} for
    fresh ones. `spec`: what the stage said. `attention`: its label.
    """

    stage: str
    attempt: int
    retry: int
    config: Plain
    source: Plain
    spec: Plain
    data: Plain
    time: float
    attention: NotRequired[str]


class AttemptReport(TypedDict):
    """An attempt's evaluation; of a search, of its best trial."""

    stage: str
    attempt: int
    step: int
    metrics: Metrics


class Promoted(TypedDict):
    """The checkpoint that the next stage gets; `path` from the run's folder."""

    attempt: int
    path: str


class Found(TypedDict):
    """What a stage that is a search found; steps and seconds are those of all its trials."""

    trial: int
    num_trials: int
    params: Plain
    config: Plain
    steps: int
    train_seconds: float
    attention: NotRequired[str]


class Decided(TypedDict):
    """A gate judged an attempt. `next`: promote, retry, longer or stop."""

    stage: str
    attempt: int
    next: str
    passed: NotRequired[bool]
    reason: NotRequired[str]
    checkpoint: NotRequired[Promoted | None]
    search: NotRequired[Found | None]


class Tested(TypedDict):
    """A stage's checkpoint was tested on a stage's data; null where the weights do not fit."""

    stage: str
    on: str
    accuracy: float | None


CURRICULUM: Mapping[str, type] = {
    "settings": Settings,
    "created": Created,
    "session": CurriculumSession,
    "reset": Reset,
    "started": AttemptStarted,
    "report": AttemptReport,
    "decided": Decided,
    "tested": Tested,
}

# -- the check ------------------------------------------------------------------------------


def check(event: Mapping[str, Any], known: Mapping[str, type]) -> str:
    """The event's name, its fields checked; "" for an event that is not among the known.

    Raises:
        StageError: a field is missing or of another type.
    """
    name = event.get("event")
    if not isinstance(name, str) or name not in known:
        return ""
    wrong = unsound(event, known[name])
    if wrong:
        raise foreign(name, wrong)
    return name


def foreign(name: str, field: str) -> StageError:
    """What to say of an event that dmx cannot have written."""
    return StageError(
        f"the journal's event {name!r} has no sound {field}, so dmx did not write it; restore the "
        "journal from a backup, or start under a new name."
    )


def unsound(value: Any, hint: Any) -> str:
    """The dotted place of the first value that is missing or of another type; "" if there is none.

    Args:
        value: from JSON. hint: a TypedDict, or a type of one of its fields. An int is a float.
    """
    found = _unsound(value, hint)
    return "" if found is None else found or "value"


def _unsound(value: Any, hint: Any) -> str | None:
    """None for a sound value; "" where the value itself is of another type."""
    if hint is Any:
        return None
    if typing.is_typeddict(hint):
        return _unsound_mapping(value, hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return None if value in args else ""
    if origin in (types.UnionType, typing.Union):
        found = [_unsound(value, kind) for kind in args]
        return None if None in found else max(f or "" for f in found)
    if origin is list:
        if not isinstance(value, list):
            return ""
        found = [_unsound(item, args[0]) for item in value]
        return next((f for f in found if f is not None), None)
    if origin is dict:
        if not isinstance(value, dict):
            return ""
        found = [_unsound(item, args[1]) for item in value.values()]
        return next((f for f in found if f is not None), None)
    if isinstance(value, bool):
        return None if hint is bool else ""
    return None if isinstance(value, (int, float) if hint is float else hint) else ""


def _unsound_mapping(value: Any, hint: Any) -> str | None:
    if not isinstance(value, dict):
        return ""
    hints, required = _fields(hint)
    for key, kind in hints.items():
        if key in value:
            inner = _unsound(value[key], kind)
            if inner is not None:
                return f"{key}.{inner}" if inner else key
        elif key in required:
            return key
    return None


@functools.cache
def _fields(hint: Any) -> tuple[dict[str, Any], frozenset[str]]:
    return typing.get_type_hints(hint), hint.__required_keys__
