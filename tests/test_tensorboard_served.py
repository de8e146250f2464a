"""A real TensorBoard on the files that dmx writes: what its tabs get, and what a browser shows."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dmx.tensorboard import RunWriter
from dmx.training.samples import TAG
from tests.browser import CHROMIUM, Browser

NUM_TRIALS = 3


def write_study(root: Path) -> None:
    """Three trials with all that a study writes: values, curves, a picture, a text, a status."""
    study = root / "study"
    for number in range(NUM_TRIALS):
        writer = RunWriter(study / "trials" / f"{number:04d}")
        writer.start({"optim.learning_rate": 0.01 * (number + 1), "attention": "butterfly"})
        for step in (2, 4):
            report = {"samples": 8 * step, "dev_accuracy": 0.1 * step + 0.01 * number}
            writer.scalars({**report, "dev_loss": 1 / step, "train_loss": 2 / step}, step)
            writer.image(TAG, Image.new("L", (16, 16), 50 * step), step)
            writer.text(TAG, "a | table", step)
        writer.end("COMPLETE")
    other = RunWriter(root / "other" / "trials" / "0000")
    other.start({"model.dropout": 0.5, "attention": "softmax"})
    other.scalars({"samples": 8, "dev_accuracy": 0.3}, 4)
    other.end("FAILED")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("runs")
    write_study(root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "tensorboard.main", "--logdir", str(root), "--port", str(port)]
    log = (root.parent / "tensorboard.log").open("wb")
    server = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)
    try:
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def get(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


def eventually(url: str, enough: Any, seconds: float = 90) -> Any:
    """What the server says once it has read all files."""
    deadline = time.monotonic() + seconds
    found = None
    while time.monotonic() < deadline:
        try:
            found = get(url)
            if enough(found):
                return found
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.3)
    pytest.fail(f"{url} never said more than {found}")


def test_every_tab_has_its_data(address: str) -> None:
    """The tags by tab; a tag that two plugins wanted would be missing from one of them."""
    trials = {f"study/trials/{number:04d}" for number in range(NUM_TRIALS)}
    images = eventually(f"{address}/data/plugin/images/tags", lambda found: trials <= found.keys())
    assert all(TAG in images[trial] for trial in trials)
    texts = eventually(f"{address}/data/plugin/text/tags", lambda found: trials <= found.keys())
    assert all(f"{TAG}/text_summary" in texts[trial] for trial in trials)
    scalars = eventually(f"{address}/data/plugin/scalars/tags", lambda f: trials <= f.keys())
    assert {"dev_accuracy", "by_samples/dev_accuracy", "samples"} <= scalars[min(trials)].keys()
    layout = get(f"{address}/data/plugin/custom_scalars/layout")
    titles = {c["title"]: [chart["title"] for chart in c["chart"]] for c in layout["category"]}
    assert titles["accuracy"][0] == "dev accuracy" and "train loss" in titles["loss"]
    chart = "multiline?run=study/trials/0001&tag=%5Edev_accuracy%24"
    series = get(f"{address}/data/plugin/custom_scalars/{chart.replace('multiline', 'scalars')}")
    points = series["tag_to_events"]["dev_accuracy"]
    assert [(p[1], round(p[2], 6)) for p in points] == [(2, 0.21), (4, 0.41)]
    listing = get(f"{address}/data/plugins_listing")
    for plugin in ("scalars", "custom_scalars", "images", "text", "hparams"):
        assert listing[plugin]["enabled"], plugin


def test_columns_are_those_of_all_studies(address: str) -> None:
    """No run writes an experiment record: TensorBoard works the columns out from all rows."""
    trials = {f"study/trials/{number:04d}" for number in range(NUM_TRIALS)}
    both = {*trials, "other/trials/0000"}
    eventually(f"{address}/data/plugin/scalars/tags", lambda found: both <= found.keys())
    hparams = f"{address}/data/plugin/hparams"
    found = get(f"{hparams}/experiment", {"experimentName": ""})
    columns = {info["name"]: info for info in found["hparamInfos"]}
    assert set(columns) == {"optim.learning_rate", "attention", "model.dropout"}
    assert columns["optim.learning_rate"]["domainInterval"] == {"minValue": 0.01, "maxValue": 0.03}
    assert set(columns["attention"]["domainDiscrete"]) == {"butterfly", "softmax"}
    metrics = {info["name"]["tag"] for info in found["metricInfos"]}
    assert {"dev_accuracy", "dev_loss", "samples"} <= metrics
    asked = {
        "experimentName": "",
        "colParams": [{"hparam": name} for name in columns],
        "sliceSize": 100,
        "startIndex": 0,
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE"],
    }
    rows = get(f"{hparams}/session_groups", asked)["sessionGroups"]
    assert len(rows) == NUM_TRIALS + 1, "a row without a value of a column is shown all the same"
    assert [r["hparams"].get("model.dropout") for r in rows].count(0.5) == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_shows_the_tabs(address: str, tmp_path: Path) -> None:
    tabs = {
        "custom_scalars": ["dev accuracy by training samples", f"Matches ({NUM_TRIALS})"],
        "hparams": ["optim.learning_rate", "dev_accuracy", "0.030000"],
        "images": [TAG, "study/trials/0002"],
    }
    trials = {f"study/trials/{number:04d}" for number in range(NUM_TRIALS)}
    eventually(f"{address}/data/plugin/images/tags", lambda found: trials <= found.keys())
    with Browser(tmp_path / "profile") as browser:
        for tab, wanted in tabs.items():
            text = browser.text_with(f"{address}/#{tab}", wanted)
            missing = [w for w in wanted if w not in text]
            assert not missing, f"{tab} does not show {missing}, but: {text[:2000]}"
