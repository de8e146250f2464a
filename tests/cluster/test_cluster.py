"""Who can reach Ray, and what is said when it cannot be reached."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dmx.cluster import connection, gang, launch
from dmx.curriculum import backend
from dmx.errors import ConfigError, RunFailedError
from dmx.nn.device import pick_device
from dmx.study.trainable import JOB_KEY, TrialTrainable
from dmx.training.evaluation import Measurement
from dmx.training.job import Job
from tests.study.helpers import environment
from tests.tiny import one_sentence

LISTENERS = """
import os
from dmx.cluster import connection, gang, launch
from dmx.curriculum import backend
import ray, psutil
with connection.connect(None):
    ray.get(ray.remote(lambda: 1).remote())
    print(ray.util.get_node_ip_address())
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        for one in process.net_connections(kind="inet"):
            if one.status == psutil.CONN_LISTEN or one.type == 2:
                print("listens", one.laddr.ip.removeprefix("::ffff:"))
"""


@pytest.mark.slow
def test_no_other_host_reaches_a_local_ray():
    """Every socket of it and of its workers."""
    done = subprocess.run(
        [sys.executable, "-c", LISTENERS], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    node, *listeners = done.stdout.split("\n")[:-1]
    assert node == "127.0.0.1"
    assert len(listeners) >= 4 and set(listeners) == {"listens 127.0.0.1"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (connection.AuthenticationError("Token authentication is enabled"), "wants a token"),
        ((ConnectionError("Failed"), RuntimeError("x InvalidAuthToken: y")), "wants a token"),
        ((ConnectionError("Failed"), RuntimeError("No node info found m")), "--num-cpus=0"),
        (ConnectionError("Failed\nmore"), "no Ray cluster answers"),
    ],
)
def test_rays_refusals_are_one_sentence(monkeypatch, error, said):
    if isinstance(error, tuple):
        error, error.__cause__ = error[0], error[1]

    def init(**options):
        raise error

    ray = SimpleNamespace(init=init, is_initialized=lambda: False)
    monkeypatch.setattr(connection, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=said) as refused, connection.connect(address):
            pass
    text = str(refused.value)
    assert address in text and "\n" not in text
    if "--num-cpus" not in text:  # which ends with a command
        one_sentence(refused.value)


@pytest.mark.parametrize(("mode", "warned"), [("DISABLED", True), ("TOKEN", False), (None, False)])
def test_a_cluster_without_a_token_is_warned_of(monkeypatch, caplog, mode, warned):
    """Another Ray may not have these two names, which are not public: then nothing is said."""
    modes = SimpleNamespace(DISABLED="DISABLED", TOKEN="TOKEN")
    inner = SimpleNamespace(AuthenticationMode=modes, get_authentication_mode=lambda: mode)
    ray = SimpleNamespace(
        init=lambda **options: None,
        shutdown=lambda: None,
        is_initialized=lambda: False,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}],
        _raylet=inner if mode else SimpleNamespace(),
    )
    monkeypatch.setattr(connection, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with connection.connect(address) as resources:
            assert resources == connection.Resources(2, 0, ((2.0, 0.0),))
    said = [r.getMessage() for r in caplog.records]
    assert [f"the cluster at {address} was started without a token" in m for m in said] == (
        [True] if warned else []
    )


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_starts_too_slowly_is_tried_once_more(monkeypatch, failures):
    """Ray has no type of its own for a node that took longer than 30 s."""
    calls = []

    def init(**options):
        calls.append("init")
        if calls.count("init") <= failures:
            raise Exception("The current node timed out during startup. This could\nhappen")

    ray = SimpleNamespace(
        init=init,
        shutdown=lambda: calls.append("shutdown"),
        is_initialized=lambda: False,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}],
    )
    monkeypatch.setattr(connection, "ray", ray)
    if failures == 1:
        with connection.connect(None):
            pass
        assert calls == ["init", "shutdown", "init", "shutdown"]
    else:
        with pytest.raises(RunFailedError, match="Ray did not start on this machine: The current"):
            connection._start_here()
        assert calls == ["init", "shutdown", "init", "shutdown"]


def test_gloo_listens_where_the_node_is(monkeypatch):
    loopback = gang.interface_of("127.0.0.1")
    assert loopback in {name for _, name in socket.if_nameindex()}
    assert gang.interface_of("203.0.113.7") is None
    monkeypatch.setattr(gang.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(gang.GLOO_INTERFACE, "mine")
    gang.use_node_interface()
    assert os.environ[gang.GLOO_INTERFACE] == "mine"
    monkeypatch.delenv(gang.GLOO_INTERFACE)
    gang.use_node_interface()
    assert os.environ[gang.GLOO_INTERFACE] == loopback


@pytest.mark.parametrize(
    ("connected", "task", "reserved", "visible"),
    [
        (False, None, [], "0,1"),
        (True, None, [], "0,1"),  # the driver, which may be a notebook of the user's
        (True, "a task", [], ""),
        (True, "a task", ["1"], "0,1"),  # Ray has set what it may see
    ],
)
def test_work_without_a_gpu_sees_none(monkeypatch, connected, task, reserved, visible):
    """Ray leaves all GPUs of a node visible to work that asked for none."""
    context = SimpleNamespace(
        get_task_id=lambda: task, get_accelerator_ids=lambda: {"GPU": reserved, "TPU": []}
    )
    ray = SimpleNamespace(is_initialized=lambda: connected, get_runtime_context=lambda: context)
    monkeypatch.setattr(connection, "ray", ray)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    connection.hide_unreserved_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_whatever_ray_runs_looks_for_its_gpu_first(monkeypatch):
    """Trials, single runs, members of a gang, evaluations, tests of a curriculum."""
    done: list[str] = []
    monkeypatch.setattr(connection, "hide_unreserved_gpus", lambda: done.append("hidden"))
    monkeypatch.setattr(launch, "runner_of", lambda job: done.append("used"))
    monkeypatch.setattr(gang, "evaluate_checkpoint", lambda *_: done.append("used"))
    monkeypatch.setattr(backend, "measure", lambda *_: done.append("used"))
    job = {"run_config": {}, "data_folder": "", "folder": ""}
    TrialTrainable({JOB_KEY: job})
    gang.GangMember()
    assert done == ["hidden"] * 2
    launch._Actor(Job(**job))
    gang._evaluate()
    backend._measure(Measurement(checkpoint="", data_folder=""), 1)
    assert done[2:] == ["hidden", "used"] * 3


@pytest.mark.parametrize(
    ("gpu_ids", "expected"), [([], "cpu"), (["0"], "cuda")], ids=["none", "one"]
)
def test_device_auto_is_what_was_reserved(monkeypatch, gpu_ids, expected):
    """On a host with a GPU, which torch sees where the environment lets it."""
    context = SimpleNamespace(
        get_task_id=lambda: "a task", get_accelerator_ids=lambda: {"GPU": gpu_ids}
    )
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setattr(connection, "ray", ray)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != ""
    )
    gang.GangMember()
    assert pick_device("auto").type == expected
