"""Every event of a journal with its fields, and the one check that readers and writers rely on.

A field that is not named here is kept as it is; an event that is not named here is skipped. Each
event also has `event`, its name, and `time`, seconds since 1970, where that is known.

What a field holds is a type (an int is a float, a bool is neither), a set of texts, (kind, None)
for what may be null, [kind] for a list, or {name: kind} for an object, where a name that ends in
`?` may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from dmx.errors import StageError
from dmx.runs.layout import Kind

_SETTINGS = {
    # What decides the results, and what a session was started with; the latest one counts.
    "kind": set(get_args(Kind)),
    "settings": dict,
    "options": dict,  # of the command, as `--resume RUN` repeats them
    "environment": dict,
    "attention?": str,  # its label, such as `butterfly-64`
    "argv?": [str],
    "time?": float,
}
_METRICS = {"steps": int, "dev_accuracy?": float, "best_dev_accuracy?": float}
"""Flat metrics at an evaluation (see dmx.runs.layout), as far as a reader relies on them."""

# -- a study --------------------------------------------------------------------------------

STUDY_SETTINGS = {
    **{f"{name}?": str for name in ("task", "attention", "scheduler", "sampler", "data")},
    **{f"{name}?": int for name in ("num_trials", "max_steps", "grace_steps", "seed")},
    **{f"{name}?": dict for name in ("overrides", "searched", "warm_start")},
    "reduction_factor?": float,
    "objectives?": [str],
    "data_checksum?": str,
}
"""`settings` of a study."""

STUDY: Mapping[str, Mapping[str, Any]] = {
    "settings": _SETTINGS,
    "session": {"time": float},
    # A trial was proposed. `params`: its searched values by SearchSpace's labels.
    "started": {"trial": int, "params": dict},
    "report": {"trial": int, "step": int, "metrics": _METRICS},
    # How a trial ended. `value`: its best dev accuracy; `values`: of several objectives.
    "outcome": {
        "trial": int,
        "status": {"COMPLETE", "PRUNED", "FAILED"},
        "value": (float, None),
        "error": str,
        "values?": [float],
    },
    # A population was compared at a step: `trial` goes on from the weights of `source`.
    "compared": {"step": int, "exploits": [{"trial": int, "source": int, "params": dict}]},
    # The best trial's checkpoint was tested, and trained again from other seeds.
    "final": {
        "trial": int,
        "step": int,
        "test_accuracy": (float, None),
        "test_loss": (float, None),
        "seeds": [int],
        "dev_accuracies": [float],
        "test_accuracies": [float],
    },
}

# -- a curriculum ---------------------------------------------------------------------------

_ATTEMPT = {"stage": str, "attempt": int}

CURRICULUM: Mapping[str, Mapping[str, Any]] = {
    "settings": _SETTINGS,
    # A session came to its end, or was cut off.
    **{name: {"time": float} for name in ("closed", "interrupted")},
    # `stages`: those of the file. `last_stage`: that which all are measured on.
    "session": {
        **{"time": float, "host": str, "pid": int, "argv?": [str], "last_stage?": str},
        "stages?": [{"name": str, "task": str, "attention": str, "parent?": (str, None)}],
    },
    # These stages begin anew (--from-stage).
    "reset": {"stages": [str]},
    # An attempt at a stage was launched. `retry` counts since the stage was last begun. `source`:
    # where its weights come from; {} for fresh ones. `spec`: what the stage said.
    "started": {
        **_ATTEMPT,
        "retry": int,
        **{name: dict for name in ("config", "source", "spec", "data")},
        "time": float,
        "attention?": str,
    },
    # Of a search, an evaluation of its best trial.
    "report": {**_ATTEMPT, "step": int, "metrics": _METRICS},
    # A gate judged an attempt. `next`: promote, retry, longer or stop. `checkpoint`: what the next
    # stage gets; its path is that from the run's folder. `search`: what a stage that is a search
    # found; steps and seconds are those of all its trials.
    "decided": {
        **_ATTEMPT,
        "next": str,
        "passed?": bool,
        "reason?": str,
        "checkpoint?": ({"attempt": int, "path": str}, None),
        "search?": (
            {
                **{"trial": int, "num_trials": int, "params": dict, "config": dict},
                **{"steps": int, "train_seconds": float, "attention?": str},
            },
            None,
        ),
    },
    # A stage's checkpoint was tested on a stage's data; null where the weights do not fit.
    "tested": {"stage": str, "on": str, "accuracy": (float, None)},
}

# -- the check ------------------------------------------------------------------------------


def check(event: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> str:
    """The event's name, its fields checked; "" for an event that is not among the known.

    Raises:
        StageError: a field is missing or of another kind.
    """
    name = event.get("event")
    if not isinstance(name, str) or name not in known:
        return ""
    if wrong := unsound(event, known[name]):
        raise foreign(name, wrong)
    return name


def foreign(name: str, field: str) -> StageError:
    """What to say of an event that dmx cannot have written."""
    return StageError(
        f"the journal's event {name!r} has no sound {field}, so dmx did not write it; restore the "
        "journal from a backup, or start under a new name."
    )


def unsound(value: Any, kind: Any) -> str:
    """The dotted place of the first value, from JSON, that is missing or of another kind, or ""."""
    place = _unsound(value, kind)
    return "" if place is None else place or "value"


def _unsound(value: Any, kind: Any) -> str | None:
    """None for a sound value; "" where the value itself is of another kind."""
    if isinstance(kind, tuple):
        return None if value is None else _unsound(value, kind[0])
    if isinstance(kind, dict):
        return _unsound_object(value, kind) if isinstance(value, dict) else ""
    if isinstance(kind, list):
        places = (_unsound(item, kind[0]) for item in value) if isinstance(value, list) else [""]
        return next((place for place in places if place is not None), None)
    if isinstance(kind, set):
        return None if isinstance(value, str) and value in kind else ""
    if isinstance(value, bool):
        return None if kind is bool else ""
    return None if isinstance(value, (int, float) if kind is float else kind) else ""


def _unsound_object(value: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    for field, kind in fields.items():
        name = field.removesuffix("?")
        if name not in value:
            if name == field:
                return name
        elif (place := _unsound(value[name], kind)) is not None:
            return f"{name}.{place}" if place else name
    return None


# -- names in them --------------------------------------------------------------------------

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
