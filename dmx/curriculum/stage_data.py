"""The prepared data that a session of a curriculum has open."""

from __future__ import annotations

from pathlib import Path

from dmx.curriculum.precheck import check_settings
from dmx.curriculum.stages import StageConfig
from dmx.data.locate import is_prepared
from dmx.data.store import Store, open_store


class Stores:
    """Prepared data sets below one root, opened once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[str, Store] = {}

    def is_prepared(self, stage: StageConfig) -> bool:
        """Whether the stage's data are there."""
        return stage.task in self._open or is_prepared(stage.task, self.root)

    def open(self, stage: StageConfig) -> bool:
        """Open the stage's data; False while they are not there.

        Raises:
            DataError: they are damaged, or were generated with other settings.
        """
        if not self.is_prepared(stage):
            return False
        if stage.task not in self._open:
            self._open[stage.task] = open_store(self.root / stage.task)
        check_settings(stage, self._open[stage.task])
        return True

    def __getitem__(self, task: str) -> Store:
        """An open store."""
        return self._open[task]
