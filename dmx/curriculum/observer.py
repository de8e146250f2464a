"""Who watches a curriculum's controller, and how a gate's verdict reads in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from dmx.curriculum.history import History
from dmx.curriculum.planner import Verdict

logger = logging.getLogger("dmx.curriculum")


class Observer(Protocol):
    """Whoever shows a run; called with each event after it is in the journal."""

    def event(self, history: History, event: Mapping[str, Any]) -> None:
        """One more event; `history` includes it."""


def say(verdict: Verdict) -> None:
    """Log what a gate found and what follows from it."""
    words = {
        "promote": "promoted" if verdict.passed else "promoted all the same (on_fail: continue)",
        "retry": "not passed; trying again with new seeds (on_fail: retry)",
        "longer": "not passed; training longer (on_fail: longer)",
        "stop": "not passed; this branch ends here (on_fail: stop)",
    }
    level = logging.INFO if verdict.passed else logging.WARNING
    logger.log(level, "gate: %s -> %s", verdict.reason, words[verdict.next])
