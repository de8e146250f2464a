"""What a session's `settings` event says of a run, and what changed since the last one.

It is the first line of the journal, so that a run that was killed at once is known as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from typing import Any

from dmx.attention.base import attention_label, sized
from dmx.process import command
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
    label = ""  # a curriculum's stages have their own
    if "attention" in settings:
        label = sized(settings["attention"], flatten(settings.get("overrides", {})))
    elif "config" in settings:
        label = attention_label(settings["config"])
    return {
        "event": SETTINGS,
        "kind": kind,
        "settings": json.loads(json.dumps(dict(settings), sort_keys=True)),
        "options": dict(options or {}),
        "environment": environment(),
        "attention": label,
        "argv": command(),
        "time": time.time(),
    }


_WORDS = {
    **{k: "--" + k.replace("_", "-") for k in ("max_steps", "grace_steps", "reduction_factor")},
    **{k: "--" + k for k in ("task", "attention", "scheduler", "sampler", "seed")},
    **{k: f"`{k}` of the search space" for k in ("when", "initial_points")},
    **{"objectives": "--objective", "warm_start": "--warm-start", "num_trials": "--num-trials"},
    **{"data": "the data", "data_checksum": "the data's checksum"},
}
_WORDS_BELOW = {
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
        free: dotted settings that may differ.
    """
    before, after = flatten(old), flatten(json.loads(json.dumps(dict(new))))
    changed = [
        key
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key) and key not in free
    ]
    if "max_steps" in changed:
        changed = [key for key in changed if key not in _FOLLOW]
    said = []
    if "config.init.sha256" in changed:  # two paths are what the user knows them by
        changed = [key for key in changed if not key.startswith("config.init")]
        sources = [found.get("config.init.path", "none") for found in (before, after)]
        said.append(f"--init-from was {sources[0]}, now {sources[1]}")
    for key in changed:
        part, _, rest = key.partition(".")
        words = _WORDS_BELOW[part].format(rest) if rest and part in _WORDS_BELOW else key
        was, now = (repr(f[key]) if key in f else "not given" for f in (before, after))
        said.append(f"{_WORDS.get(key, words)} was {was}, now {now}")
    return said
