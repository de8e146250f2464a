"""A population on Ray, durably: members train segment by segment and are compared in between.

Between two comparisons a member trains one segment, which is one Ray trial. So members take turns
where there are fewer slots than members, and nothing is ever paused. When the last one has reached
the step, the comparison is made from the journal; the checkpoints to be copied are copied; the
decision is written to the journal; only then does anybody go on. Killed at any moment, the next
session finds either no decision, and makes the same one again (nobody has trained on), or the
decision with its copies.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx.format import short
from dmx.runs import layout
from dmx.runs.metrics import DEV_ACCURACY
from dmx.search.ledger import Ledger, trial_folder
from dmx.search.schedulers import Exploit, apply, decide
from dmx.storage.files import copy_folder, persist, put_back
from dmx.storage.layout import SHARED_FILESYSTEM, StorageLayout

logger = logging.getLogger("dmx.study")


@dataclass(frozen=True)
class Segment:
    """A member's next piece of training.

    Attributes:
        point: its settings. until: train up to this step. adopt: the step at which it takes over
            another member's weights, or None.
    """

    number: int
    point: Mapping[str, Any]
    until: int
    adopt: int | None


def copied(folder: Path, number: int, step: int) -> Path:
    """Where the checkpoint lies that a member takes over at a step."""
    return trial_folder(folder, number) / f"from-{step:08d}"


class Population:
    """Hands out segments.

    Args:
        ledger: the study's memory; it proposes what each member begins with.
        steps: see population.boundaries. seed: of the decisions.
        places: where the checkpoints are that are copied. storage_timeout: how long copying them
            waits for the storage.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        steps: tuple[int, ...],
        seed: int,
        places: StorageLayout = SHARED_FILESYSTEM,
        storage_timeout: float = 0.0,
    ) -> None:
        self._ledger, self._steps, self._seed = ledger, steps, seed
        self._places, self._patience_seconds = places, storage_timeout
        self._points: dict[int, Mapping[str, Any]] = {}
        self._running: set[int] = set()

    def next_segment(self) -> Segment | None:
        """The next piece of training; None while the others must get there first, or at the end."""
        while (found := self._ledger.next_trial()) is not None:  # everybody belongs to it at once
            self._points[found[0]] = found[1]
        self._compare()
        waiting = self._alive() - self._running
        for number in sorted(waiting, key=lambda n: (self._reached(n), n)):
            at = self._reached(number)
            if at in self._steps[:-1] and at not in self._ledger.record.compared:
                continue  # the others must get there first
            until = next((b for b in self._steps if b > at), self._steps[-1])
            own = self._ledger.record.exploits.get(number, {})
            before = max((b for b in self._steps if b < until), default=0)
            self._running.add(number)
            return Segment(
                number=number,
                point=apply(self._points[number], own, until),
                until=until,
                adopt=before if before in own else None,
            )
        return None

    @property
    def finished(self) -> bool:
        """Nobody is left to train."""
        return not self._alive()

    def ended(self, number: int) -> None:
        """A segment has ended, one way or another."""
        self._running.discard(number)

    def _alive(self) -> set[int]:
        return self._points.keys() - self._ledger.outcomes.keys()

    def _reached(self, number: int) -> int:
        return max(self._ledger.reports.get(number, {}), default=0)

    def _compare(self) -> None:
        """Decide at the next step that every member has reached."""
        for step in self._steps[:-1]:
            if step in self._ledger.record.compared:
                continue
            alive = self._alive()
            if not alive or any(step not in self._ledger.reports.get(n, {}) for n in alive):
                return
            reports, changed = self._ledger.reports, self._ledger.record.exploits
            exploits = decide(
                seed=self._seed,
                step=step,
                scores={n: float(reports[n][step][DEV_ACCURACY]) for n in alive},
                points={n: apply(self._points[n], changed.get(n, {}), step) for n in alive},
                space=self._ledger.space,
            )
            for exploit in exploits:
                persist(
                    functools.partial(self._copy, exploit),
                    self._ledger.folder,
                    seconds=self._patience_seconds,
                )
            self._ledger.record.compare(step, exploits)
            for e in exploits:
                settings = ", ".join(f"{k}={short(v)}" for k, v in e.point.items())
                logger.info(
                    "step %d: trial %d takes over trial %d: %s", step, e.trial, e.source, settings
                )

    def _copy(self, exploit: Exploit) -> None:
        source = trial_folder(self._ledger.folder, exploit.source) / layout.LAST_DIR
        self._places.pull(source)
        put_back(source)
        target = copied(self._ledger.folder, exploit.trial, exploit.step)
        copy_folder(source, target)
        self._places.push(target)
