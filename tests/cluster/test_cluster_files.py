"""The cluster examples say what Ray and dmx understand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from dmx.cli.tune import parser

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "cluster"


def test_the_cluster_is_one_that_ray_up_takes():
    config = yaml.safe_load((FOLDER / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))  # what `ray up` does before it connects to anything
    broken = {**config, "provider": {"type": "local"}}
    with pytest.raises(Exception, match="head_ip"):
        validate_config(prepare_config(broken))


def test_dashboards_stay_on_localhost_and_ask_for_a_token():
    cluster = yaml.safe_load((FOLDER / "ray-cluster.yaml").read_text())
    (head,) = [c for c in cluster["head_start_ray_commands"] if "--head" in c]
    assert "--dashboard-host=127.0.0.1" in head
    starts = [c for c in (head, *cluster["worker_start_ray_commands"]) if "ray start" in c]
    assert len(starts) == 2 and all(c.startswith("RAY_AUTH_MODE=token ") for c in starts)
    job = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert job["authOptions"] == {"mode": "token"}
    assert job["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_the_job_is_a_command_of_ours():
    spec = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())["spec"]
    shell = shlex.split(spec["entrypoint"])
    assert shell[:2] == ["sh", "-c"] and len(shell) == 3
    found = re.search(r"python -m dmx\.tune (.*) \$more$", shell[2])
    assert found, shell[2]
    args = parser().parse_args(shlex.split(found[1]))
    assert args.address == "auto" and args.storage == "/shared/runs"
    mounts = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert mounts["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
