"""Who can reach Ray, and what is said when it cannot be reached."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmx.cluster import capacity, connection, gang
from dmx.curriculum import backend
from dmx.errors import ConfigError, RunFailedError
from dmx.nn.device import pick_device
from dmx.study.ray_tune import JOB_KEY, TrialTrainable
from dmx.training.evaluation import EvaluationJob
from dmx.training.job import Job
from tests.study.helpers import environment
from tests.tiny import one_sentence

LISTENERS = """
import os
from dmx.cluster import capacity, capacity, connection, gang
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


GREETING = bytes.fromhex("000006040000000000") + bytes.fromhex("000300000064")
"""SETTINGS of HTTP/2 (RFC 9113, 6.5): length 6, type 4, no flags, stream 0; one of 100 streams."""


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """HOST:PORT of a server that says something to whoever comes, or nothing."""
    with socket.create_server(("", 0)) as server:
        lines: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    lines.append(server.accept()[0])
                    if answer is not None:
                        lines[-1].recv(100)
                        lines[-1].sendall(answer)
                        lines[-1].close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


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
    monkeypatch.setattr(capacity, "ray", ray)
    with (
        listening(GREETING) as address,
        pytest.raises(ConfigError, match=said) as refused,
        connection.connect(address),
    ):
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
    monkeypatch.setattr(capacity, "ray", ray)
    with listening(GREETING) as address, connection.connect(address) as resources:
        assert resources == capacity.Resources(2, 0, ((2.0, 0.0),))
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
    monkeypatch.setattr(capacity, "ray", ray)
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
    monkeypatch.setattr(capacity, "ray", ray)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    capacity.hide_unreserved_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_whatever_ray_runs_looks_for_its_gpu_first(monkeypatch):
    """Trials, single runs, members of a gang, evaluations, tests of a curriculum."""
    done: list[str] = []
    monkeypatch.setattr(capacity, "hide_unreserved_gpus", lambda: done.append("hidden"))
    monkeypatch.setattr(gang, "runner_of", lambda job: done.append("used"))

    def evaluated(*_: object) -> SimpleNamespace:
        done.append("used")
        return SimpleNamespace(accuracy=0.5)

    monkeypatch.setattr(gang, "evaluate_checkpoint", evaluated)
    monkeypatch.setattr(backend, "evaluate_checkpoint", evaluated)
    job = {"run_config": {}, "data_folder": "", "folder": ""}
    TrialTrainable({JOB_KEY: job})
    gang.GangMember()
    assert done == ["hidden"] * 2
    gang._RunActor(Job(**job))
    gang._evaluate()
    backend._measure(EvaluationJob(checkpoint="", data_folder=""), 1)
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
    monkeypatch.setattr(capacity, "ray", ray)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != ""
    )
    gang.GangMember()
    assert pick_device("auto").type == expected


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "no answer within 1 s"),
        (b"HTTP/1.1 400 Bad Request\r\n", "what listens there is no Ray"),
        (b"", "what listens there is no Ray"),
    ],
)
@pytest.mark.parametrize("form", ["auto", "HOST:PORT"])
def test_who_does_not_answer_as_ray_is_refused_in_time(monkeypatch, tmp_path, answer, said, form):
    """Ray itself tried for more than five minutes; `auto` is where `ray start` was last."""
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(connection.services, "find_gcs_addresses", set)  # of other tests
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    began = time.monotonic()
    with listening(answer) as address:
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        given = "auto" if form == "auto" else address
        with (
            pytest.raises(ConfigError, match=re.escape(said)) as refused,
            connection.connect(given),
        ):
            pass
    assert f"--address {given}" in str(refused.value) and time.monotonic() - began < 10


def test_a_cluster_that_is_gone_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(connection.services, "find_gcs_addresses", set)  # of other tests
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    with (
        pytest.raises(ConfigError, match=r"--address auto: .*Connection refused"),
        connection.connect("auto"),
    ):
        pass


@pytest.fixture
def base(monkeypatch) -> Iterator[Path]:
    """A short folder, and no wish of the environment."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="d") as folder:
        yield Path(folder)


def test_ray_keeps_its_files_where_it_is_told(base, monkeypatch, caplog):
    assert connection.ray_folder() in ("/tmp/ray", f"/tmp/dmx-ray-{os.getuid()}")
    (base / "slurm").mkdir()
    monkeypatch.setenv("TMPDIR", str(base / "slurm"))
    assert connection.ray_folder() == str(base / "slurm" / "ray")
    monkeypatch.setenv("RAY_TMPDIR", str(base / "new"))  # which Ray makes
    assert connection.ray_folder() == str(base / "new" / "ray")
    assert (base / "new" / "ray").is_dir() and not caplog.records
    monkeypatch.chdir(base)
    monkeypatch.setenv("RAY_TMPDIR", "relative")
    assert connection.ray_folder() == str(base / "relative" / "ray")


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("x" * 60, "is longer than the 39 bytes that leave room"),
        ("file", "cannot be written (Not a directory)"),
        ("file/below", "cannot be written (Not a directory)"),
        ("missing", "does not exist"),
    ],
)
def test_a_folder_that_does_not_do_is_said_and_another_taken(
    base, monkeypatch, caplog, name, wish, said
):
    """107 bytes of a path, less /ray/session_(date, time, number, pid)/sockets/plasma_store."""
    (base / "file").touch()
    if wish.startswith("x"):
        (base / wish).mkdir()
    elif wish == "missing" and name == "RAY_TMPDIR":
        pytest.skip("it is made")
    elif wish == "file/below" and name == "TMPDIR":
        said = "does not exist"
    monkeypatch.setenv(name, str(base / wish))
    assert connection.ray_folder().startswith("/tmp/")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{name}={base / wish} {said}")


def test_another_users_folder_is_left_alone(base, monkeypatch):
    """Of a name that all users share, or of ours."""
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    (base / "ray").touch()
    own = base / f"dmx-ray-{os.getuid()}"
    assert connection.ray_folder() == str(own)
    assert own.stat().st_mode & 0o777 == 0o700
    if os.geteuid() == 0:
        os.chown(own, 12345, 12345)
        assert not connection.ray_folder().startswith(str(base))


def test_no_folder_at_all_is_one_sentence(monkeypatch):
    monkeypatch.setattr(connection, "_unfit", lambda folder, make: "cannot be written (x)")
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    monkeypatch.delenv("TMPDIR", raising=False)
    with pytest.raises(ConfigError, match="set RAY_TMPDIR to a folder") as refused:
        connection.ray_folder()
    said = one_sentence(refused.value)
    for place in ("RAY_TMPDIR=/nowhere", "/tmp", "/var/tmp", "/dev/shm"):
        assert f"{place} cannot be written (x)" in said


@pytest.mark.parametrize("known", [True, False])
def test_a_private_ray_has_a_token_without_a_home(monkeypatch, known):
    """A home that cannot be written, or none: a container's user without a passwd entry."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("HOME", "/proc/nonexistent")  # root cannot make it either
    if not known:
        monkeypatch.setattr(Path, "home", none)
    connection._give_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_token_in_the_home_folder_is_kept(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine")
    connection._give_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert (tmp_path / ".ray" / "auth_token").read_text() == "mine"
