"""One study that is disturbed, and the table of all: for soak.py and soak_hosts.py; no command."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from soak_study import differences, journal, lost_and_twice, retrained, violations

LIMIT_SECONDS = 600.0
_POLL_SECONDS = 0.02


@dataclass
class Round:
    """What was done to one study, and what came of it."""

    number: int
    place: str
    slots: int
    kills: list[str] = field(default_factory=list)
    restarts: int = 0
    seconds: list[float] = field(default_factory=list)
    disturbed: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    lost: int = 0
    twice: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing was lost, done twice or wrong."""
        return not (self.faults or self.lost or self.twice)


class Study:
    """One study under way: its command, started again and again."""

    def __init__(self, words: list[str], study: Path, log_file: Path) -> None:
        self.words, self.study, self.log_file = words, study, log_file
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command; a second time with --resume."""
        more = ["--resume"] if (self.study / "journal.jsonl").exists() else []
        with self.log_file.open("ab") as out:
            self.process = self._popen([*self.words, *more], out)

    def _popen(self, words: list[str], out: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True)  # type: ignore[call-overload,no-any-return]

    def ended(self) -> bool:
        """Whether the command has ended by itself."""
        assert self.process is not None
        return self.process.poll() is not None

    def until(self, count: int, trial: int | None = None) -> bool:
        """Wait for `count` events (reports of `trial`, if given); False when it ended first."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            events = journal(self.study)
            if trial is not None:
                events = [e for e in events if e["trial"] == trial]
            if len(events) >= count:
                return True
            if self.ended():
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing happens any more; see {self.log_file}")
            time.sleep(_POLL_SECONDS)

    def claims(self) -> list[tuple[int, dict[str, object]]]:
        """(trial, claim) of the trials that have begun and not ended."""
        ended = {e["trial"] for e in journal(self.study) if e["event"] == "outcome"}
        found = []
        for path in sorted(self.study.glob("trials/*/claim.json")):
            number = int(path.parent.name)
            try:
                claim = json.loads(path.read_text())
                int(claim["pid"])
            except (OSError, ValueError, KeyError):
                continue
            if number not in ended:
                found.append((number, claim))
        return found

    def workers(self) -> list[tuple[int, int]]:
        """(trial, process id) of the trials at work on this machine, from their claims."""
        found = []
        for number, claim in self.claims():
            try:
                os.kill(int(str(claim["pid"])), 0)
            except OSError:
                continue
            found.append((number, int(str(claim["pid"]))))
        return found


def judge(done: Round, study: Study, trials: int, folder: Path, whole: Path) -> None:
    """Note all that is wrong with a study that has ended; `whole` is one that was left in peace."""
    assert study.process is not None
    if study.process.returncode != 0:
        done.faults.append(f"exit code {study.process.returncode}, see {study.log_file}")
        return
    if "Traceback" in study.log_file.read_text(errors="replace"):
        done.faults.append(f"a traceback in {study.log_file}")
    done.lost, done.twice = lost_and_twice(study.study, trials)
    done.faults += violations(study.study, trials, folder)
    if done.slots == 1:
        done.faults += differences(study.study, whole)
    for trial in sorted(done.disturbed)[:3]:
        done.faults += retrained(study.study, folder, trial)


def table(rounds: list[Round], what: str, event: str, place: str) -> str:
    """The table in Markdown, and one sentence.

    Args:
        what: the study. event: what disturbs one. place: heading of Round.place.
    """
    lines = [
        f"| round | {place} | at once | {event} (after event) | restarts "
        "| to first new step, s | lost | twice | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rounds:
        waits = ", ".join(f"{s:.1f}" for s in r.seconds)
        verdict = "; ".join(r.faults) or ("equal, bit for bit" if r.slots == 1 else "consistent")
        lines.append(
            f"| {r.number} | {r.place} | {r.slots} | {', '.join(r.kills)} | {r.restarts} | {waits} "
            f"| {r.lost} | {r.twice} | {verdict} |"
        )
    good = sum(r.sound for r in rounds)
    waits = [s for r in rounds for s in r.seconds] or [0.0]
    lines += [
        "",
        f"{good} of {len(rounds)} rounds without loss; {what}; {sum(len(r.kills) for r in rounds)} "
        f"{event}; from then to the first new step {statistics.median(waits):.1f} s (median), "
        f"{max(waits):.1f} s (longest); load {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores.",
    ]
    return "\n".join(lines)
