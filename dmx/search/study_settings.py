"""What a run's journal says of its settings: one `settings` event a session, the last one counts.

It is the first line of the journal, so that a run that was killed at once is known as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any

from dmx.attention.base import attention_label, sized
from dmx.registry import environment
from dmx.runs.layout import Kind
from dmx.schema import flatten

SETTINGS = "settings"


def settings_event(
    kind: Kind, settings: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The event.

    Args:
        settings: what decides the results; equal for all sessions (see changes).
        options: of the command, as `--resume RUN` repeats them.
    """
    return {
        "event": SETTINGS,
        "kind": kind,
        "settings": json.loads(json.dumps(dict(settings), sort_keys=True)),
        "options": dict(options or {}),
        "environment": environment(),
        "attention": _label(settings),
        "argv": sys.argv,
        "time": time.time(),
    }


def _label(settings: Mapping[str, Any]) -> str:
    """The attention with its size, where that is fixed; a curriculum's stages have their own."""
    if "attention" in settings:
        return sized(settings["attention"], flatten(settings.get("overrides", {})))
    return attention_label(settings["config"]) if "config" in settings else ""


# -- what changed ---------------------------------------------------------------------------

_OPTIONS = {
    **{k: "--" + k.replace("_", "-") for k in ("max_steps", "num_trials", "grace_steps")},
    **{k: "--" + k for k in ("task", "attention", "scheduler", "sampler", "seed")},
    **{"reduction_factor": "--reduction-factor", "objectives": "--objective"},
    **{"warm_start": "--warm-start", "data": "the data", "data_checksum": "the data's checksum"},
    **{k: f"`{k}` of the search space" for k in ("when", "initial_points")},
}
_PARTS = {
    "overrides": "--set {}",
    "searched": "{} in the search space's `space`",
    "defaults": "{} in the search space's `defaults`",
    "config": "{}",
    "warm_start": "--warm-start ({})",
}
_FOLLOW = (
    *("overrides.train.num_steps", "overrides.train.eval_every_steps"),
    *("overrides.optim.warmup_steps", "grace_steps"),
)
"""Settings that --max-steps brings along."""


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()
) -> list[str]:
    """`--max-steps was 100, now 200`: what differs, in the words by which a user says it.

    Args:
        free: dotted settings that may differ. What an earlier dmx did not record cannot differ.
    """
    before, after = flatten(old), flatten(json.loads(json.dumps(dict(new))))
    left_out = {key for key in _WHOLE if key not in old}
    changed = [
        key
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
        and key not in free
        and key.partition(".")[0] not in left_out
    ]
    if "max_steps" in changed:
        changed = [key for key in changed if key not in _FOLLOW]
    if "config.init.sha256" in changed:  # two paths are what the user knows them by
        changed = [key for key in changed if not key.startswith("config.init")]
        sources = [f.get("config.init.path", "none") for f in (before, after)]
        return [f"--init-from was {sources[0]}, now {sources[1]}", *_said(changed, before, after)]
    return _said(changed, before, after)


_WHOLE = ("when", "initial_points", "defaults")


def _said(
    changed: Collection[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[str]:
    return [f"{_words(key)} was {_value(before, key)}, now {_value(after, key)}" for key in changed]


def _words(key: str) -> str:
    part, _, rest = key.partition(".")
    return _PARTS[part].format(rest) if rest and part in _PARTS else _OPTIONS.get(key, key)


def _value(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not given"
