"""What every run has: settings, trials, its best checkpoint. By itself, a single run."""

from __future__ import annotations

import functools
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dmx.errors import ConfigError, DataError, StageError
from dmx.runs import events, layout
from dmx.runs.layout import DEV_ACCURACY, REPORT_KEYS, STEPS, Kind
from dmx.runs.trial import Trial, TrialStatus, best_of, number
from dmx.schema import read_yaml
from dmx.storage.journal import read_journal

if TYPE_CHECKING:
    from dmx.runs.curriculum import Stage
    from dmx.runs.study import FinalSeeds, Report, Search, Takeover

UNKNOWN = "unknown"
_SAMPLE = ", not LRA"
"""How the label of data ends that stand in for the published ones (see data.store.Manifest)."""
_RESULT = {
    **{"data?": str, "best_step?": (int, None)},
    **{"test_accuracy?": (float, None), "test_loss?": (float, None)},
}
"""result.json of a single run."""
_METRICS = {
    **{"steps?": int, "best_step?": (int, None), "num_dev?": (int, None)},
    **{"dev_majority?": (float, None), "environment?": (dict, None)},
    **{"data?": str, "data_checksum?": (str, None)},
}
"""metrics.json of a checkpoint, as far as it is read here."""


class Run:
    """A run of dmx: what its journal and the files beside it say. By itself, a single run.

    Folding an event costs no file; what lies in files is read when it is asked for, once. A damaged
    one is a DataError that names it.

    Args:
        folder: of the run; its name is the run's.

    Attributes:
        session: the latest `settings` event, or {}. settings, options: its own.
        latest: time of the latest event, or NaN. train_seconds: see Curriculum.
        empty: the journal has no event.
    """

    kind: ClassVar[Kind] = "run"
    known_events: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: events.STUDY[name] for name in ("settings", "session")
    }

    # What only the other kinds have.
    search: Search | None = None
    finals: FinalSeeds | None = None
    history: Sequence[Report] = ()
    takeovers: Sequence[Takeover] = ()
    several: tuple[str, ...] = ()
    is_population: bool = False
    stages: tuple[Stage, ...] = ()
    goal: str = ""
    shown: str = ""
    recipe: str = ""
    shown_stage: Stage | None = None
    train_seconds: float = math.nan

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.empty = True
        self.session: Mapping[str, Any] = {}
        self.settings: Mapping[str, Any] = {}
        self.options: Mapping[str, Any] = {}
        self.latest = math.nan
        self._spans: list[list[float]] = []  # each session's first and last time

    # -- folding ----------------------------------------------------------------------------

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The run as its journal tells it; what lies in files is read when it is asked for.

        Raises:
            StageError: the journal is damaged, or of an earlier dmx; names it.
        """
        run = cls(folder)
        for event in read_journal(folder / layout.JOURNAL_FILE)[0]:
            run.add(event)
        if run.empty and (folder / layout.SETTINGS_FILE).exists():
            raise StageError(
                f"{folder} has no {layout.JOURNAL_FILE}: an earlier dmx wrote it; start the run "
                "under a new name."
            )
        return run

    def add(self, event: Mapping[str, Any]) -> None:
        """Take up one more event of the journal.

        Raises:
            StageError: dmx did not write it; names the journal.
        """
        self.empty = False
        try:
            name = events.check(event, self.known_events)
            time = event.get("time")
            if isinstance(time, int | float):
                self.latest = float(time)
                if name == "session":
                    self._spans.append([self.latest, self.latest])
                elif self._spans and name != "settings":  # which comes before its session
                    self._spans[-1][1] = self.latest
            if name == "settings":
                self.session = event
                self.settings, self.options = event["settings"], event["options"]
            if name:
                self._fold(name, event)
        except StageError as error:
            path = self.folder / layout.JOURNAL_FILE
            raise StageError(f"{path} is damaged: {error}") from None

    def _fold(self, name: str, event: Mapping[str, Any]) -> None:
        """Take up an event of the kind's own; its fields are sound."""

    @property
    def seconds(self) -> float:
        """Wall time of all sessions, without the pauses between them; NaN for a single run."""
        return sum(last - first for first, last in self._spans) if self._spans else math.nan

    # -- what it is -------------------------------------------------------------------------

    @property
    def task(self) -> str:
        return str((self.config or {}).get("task", UNKNOWN))

    @property
    def attention(self) -> str:
        """As the run is called, with its size where that is fixed: `butterfly-64`."""
        return str(self.session.get("attention") or UNKNOWN)

    @property
    def data(self) -> str:
        """The data's label."""
        return self._recorded("data") or UNKNOWN

    @property
    def data_checksum(self) -> str:
        return self._recorded("data_checksum")

    def _recorded(self, key: str) -> str:
        found = (source.get(key) for source in (self._result, self._metrics, self.settings))
        return str(next((value for value in found if value), ""))

    @property
    def is_sample(self) -> bool:
        """Whether its data stand in for the published ones."""
        return self.stands_in(self.data)

    @staticmethod
    def stands_in(data: str) -> bool:
        """`is_sample` of a label."""
        return data.endswith(_SAMPLE)

    @property
    def environment(self) -> Mapping[str, Any]:
        """Versions and devices of its latest session, then of its checkpoint; `argv`."""
        argv = {k: self.session[k] for k in ("argv",) if k in self.session}
        beside = self._metrics.get("environment") or {}
        return {**self.session.get("environment", {}), **argv, **beside}

    # -- what came of it --------------------------------------------------------------------

    @functools.cached_property
    def _result(self) -> Mapping[str, Any]:
        return read_json(self.folder / layout.RESULT_FILE, _RESULT)

    @property
    def complete(self) -> bool:
        """Whether it ran to its end."""
        return bool(self._result)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials by number; of a single run, the run itself."""
        return (self._trial,)

    @functools.cached_property
    def _trial(self) -> Trial:
        scalars = read_scalars(self.folder).items()
        curve: dict[int, Mapping[str, Any]] = {s: r for s, r in scalars if DEV_ACCURACY in r}
        if not curve and STEPS in self._metrics:
            values = {k: v for k, v in self._metrics.items() if k in REPORT_KEYS}
            curve = {self._metrics[STEPS]: values}
        error = _last_line(self.folder / layout.ERROR_FILE)
        ended: TrialStatus = "FAILED" if error else "RUNNING"
        status: TrialStatus = "COMPLETE" if self.complete else ended
        return Trial(number=0, status=status, curve=curve, error=error, folder=self.folder)

    @property
    def best_trial(self) -> Trial | None:
        """The most accurate one on the dev split (the earlier one on a tie), or None."""
        return best_of(self.trials)

    @property
    def best_trials(self) -> tuple[Trial, ...]:
        """Those on the Pareto front; with one objective, the best one."""
        return () if self.best_trial is None else (self.best_trial,)

    @property
    def best(self) -> int | None:
        """The number of the best trial, or None."""
        found = self.best_trial
        return None if found is None else found.number

    @property
    def best_step(self) -> int | None:
        """Of the best checkpoint, or None."""
        return (self._result or self._metrics).get("best_step")

    @property
    def test_accuracy(self) -> float:
        """Of the best checkpoint, in 0..1; NaN where it was not tested."""
        return number(self._tested, "test_accuracy")

    @property
    def test_loss(self) -> float:
        return number(self._tested, "test_loss")

    @property
    def _tested(self) -> Mapping[str, Any]:
        return self._result

    # -- its best checkpoint ----------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        """The folder of its best checkpoint, whether there is one or not."""
        return self.folder / layout.BEST_DIR

    @functools.cached_property
    def _metrics(self) -> Mapping[str, Any]:
        """What was written beside the best checkpoint; before the first best one, the last."""
        places = (self.checkpoint, self.folder / layout.LAST_DIR)
        found = (read_json(place / layout.METRICS_FILE, _METRICS) for place in places)
        return next(filter(None, found), {})

    @functools.cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The plain RunConfig of the best checkpoint, or None."""
        found = _read_config(self.checkpoint) or _read_config(self.folder / layout.LAST_DIR)
        return found or self.settings.get("config") or None

    @property
    def init(self) -> Mapping[str, Any]:
        """The weights that it was started from: `path`, `sha256`, `reinit`; {} for fresh ones."""
        return (self.config or {}).get("init") or {}

    @property
    def num_dev(self) -> int:
        """Examples of the dev split, 0 where unknown."""
        return self._metrics.get("num_dev") or 0

    @property
    def dev_majority(self) -> float:
        """The share of the dev split's largest class: what a model that learnt nothing reaches."""
        return number(self._metrics, "dev_majority")

    # -- what follows from it ---------------------------------------------------------------

    @property
    def whole(self) -> list[Trial]:
        """The trials whose costs and accuracies compare: those that ran their full budget."""
        return [t for t in self.trials if t.status == "COMPLETE"]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages of a curriculum."""
        return sum(s.all_steps for s in self.stages)

    def count(self, status: str) -> int:
        return sum(t.status == status for t in self.trials)

    def dev_error(self, accuracy: float) -> float:
        """Half of the 95 % interval of an accuracy on the dev split, in 0..1; NaN where unknown."""
        if not self.num_dev or not math.isfinite(accuracy):
            return math.nan
        return 1.96 * math.sqrt(accuracy * (1 - accuracy) / self.num_dev)

    def by_luck(self, evaluations: int) -> float:
        """The highest of so many dev accuracies that a model which learnt nothing explains.

        The best of many lies above chance by luck: the bound grows with their number (Bonferroni,
        5 % over all). NaN where the dev split is unknown.
        """
        if not (self.num_dev and evaluations and 0 < self.dev_majority < 1):
            return math.nan
        spread = math.sqrt(self.dev_majority * (1 - self.dev_majority) / self.num_dev)
        return self.dev_majority + spread * statistics.NormalDist().inv_cdf(1 - 0.05 / evaluations)

    @property
    def at_chance(self) -> bool:
        """Whether all accuracies are explained by luck; False where the dev split is unknown."""
        scores = [t.best for t in self.trials if math.isfinite(t.best)]
        bound = self.by_luck(sum(len(t.curve) for t in self.trials))
        return bool(scores) and max(scores) <= bound

    @property
    def memory_of(self) -> str:
        """What its memory is measured on: "GPU", "process", or "" where no file tells."""
        gpus = self.environment.get("gpus")
        return "" if gpus is None else "GPU" if gpus else "process"


# -- the files beside a journal: a damaged one is a DataError that names it -----------------


def read_json(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping in a JSON file, its fields checked as an event's; {} where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        reason = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "no JSON"
        raise DataError(
            f"{path} is damaged ({reason}); the run's command with --resume writes it anew."
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: it must hold a mapping.")
    if wrong := events.unsound(found, fields):
        raise DataError(f"{path} is damaged: it has no sound {wrong}.")
    return found


def _read_config(checkpoint: Path) -> Mapping[str, Any] | None:
    """The plain RunConfig beside a checkpoint; None where there is none."""
    path = checkpoint / layout.CONFIG_FILE
    try:
        return read_yaml(path) if path.is_file() else None
    except ConfigError as error:
        raise DataError(f"{checkpoint} is damaged: {error}") from None


def read_scalars(folder: Path) -> dict[int, dict[str, float]]:
    """The scalars in a folder's own TensorBoard files, by rising step.

    A run that was resumed may have written a step twice; the later value counts.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    steps: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        try:
            for raw in RawEventFileLoader(str(path)).Load():
                event = Event.FromString(raw)
                for value in event.summary.value:
                    # A tag with a slash counts by something other than optimizer steps.
                    if value.WhichOneof("value") == "simple_value" and "/" not in value.tag:
                        steps.setdefault(event.step, {})[value.tag] = value.simple_value
        except Exception as error:  # whatever a damaged file makes protobuf or TensorBoard raise
            raise DataError(f"{path} is damaged ({type(error).__name__}).") from None
    return dict(sorted(steps.items()))


def _last_line(path: Path) -> str:
    """Of a traceback: the error itself."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
    except (OSError, IndexError):
        return ""
