"""Faults inside of workers: what a file in the fault folder says happens to a trial's process."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

FOLDER = "DMX_TEST_FAULTS"


def install() -> None:
    """Ray's worker_process_setup_hook: before a trial's step, look whether something is to happen.

    The file `0003` holds words: `segv`, `stop`, `sleep`, `nan`; `once` before them removes it.
    Only a process that has made a report already stops or sleeps.
    """
    from dmx.runs.layout import BEST_DEV_ACCURACY, DEV_ACCURACY
    from dmx.training.runner import Runner

    real = Runner.step

    def step(self):
        file = Path(os.environ[FOLDER]) / self._folder.name
        words = file.read_text().split() if file.exists() else []
        if self._trainer.step == 0:
            words = [word for word in words if word in ("segv", "nan")]
        if "once" in words:
            file.unlink()
        if "segv" in words:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "stop" in words:
            os.kill(os.getpid(), signal.SIGSTOP)
        if "sleep" in words:
            time.sleep(3600)
        report = real(self)
        if "nan" in words:
            report.update({DEV_ACCURACY: math.nan, BEST_DEV_ACCURACY: math.nan})
        return report

    Runner.step = step
