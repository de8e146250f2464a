"""Several hosts on one machine, made of namespaces, for soak_hosts.py; it is no command.

A host has a network, processes, a name, /tmp, /dev/shm and a disk (/mnt) of its own, and sees all
other folders, and the shared one wherever it is. Its name resolves to 127.0.1.1, as Debian's
installer has it, and nothing else resolves. No namespace has a name: all are gone with their
processes, and those end with this one, however it ends, since each host reads from its pipe.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEEN = (ROOT, Path(sys.prefix), Path(sys.base_prefix))
"""What each host sees where it is, even below /tmp."""
SUBNET = "10.213.0"
_SPACES = ("--net", "--pid", "--uts", "--ipc", "--mount")
_TOOLS = ("ip", "unshare", "nsenter", "mount")
_INIT = """
hostname "$1"
ip link set lo up
own=$2
shift 2
mount --bind "$own/hosts" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
mount --bind "$own/disk" /mnt
mount -t tmpfs -o size=2g none /dev/shm
for seen; do
    case "$seen" in /tmp/*)
        mkdir -p "$own/tmp/${seen#/tmp/}" && mount --bind "$seen" "$own/tmp/${seen#/tmp/}" ;;
    esac
done
mount --rbind "$own/tmp" /tmp
echo ready
read -r _
"""
_SWITCH = "ip link add br0 type bridge && ip link set br0 up && echo ready && read -r _"


def why_not() -> str | None:
    """Why no hosts can be made here, or None."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} here"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    words = ["unshare", *_SPACES, "--fork", "--mount-proc", "sh", "-c"]
    words += ["mount -t tmpfs none /mnt && ip link add br0 type bridge && ip link add a0 type veth"]
    done = subprocess.run(words, capture_output=True, text=True)
    return f"no namespaces: {done.stderr.strip()[-200:]}" if done.returncode else None


def _start(script: str, log: Path, *words: str) -> subprocess.Popen[str]:
    """A shell in namespaces of its own, as their first process; it has said that it is ready."""
    line = ["unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", script]
    with log.open("a") as errors:
        process = subprocess.Popen(
            [*line, "init", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, start_new_session=True,
        )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"a host could not be made: {log.read_text().strip()}")
    return process


def _inner(process: subprocess.Popen[str]) -> int:
    """The process that `unshare` started: the first one within."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


def _ip(*words: str, at: int | None = None) -> None:
    enter = [] if at is None else ["nsenter", "--target", str(at), "--net"]
    subprocess.run([*enter, "ip", *words], check=True, capture_output=True)


class Host:
    """One host; `start` and `run` do something on it."""

    def __init__(self, name: str, number: int, shared: Path, switch: int) -> None:
        self.name, self.address, self.alive = name, f"{SUBNET}.{number}", True
        folder = shared / "hosts" / f"{number}-{name}"
        self.home = folder / "home"
        for part in ("home", "disk"):
            (folder / part).mkdir(parents=True)
        self._tmp = Path(tempfile.mkdtemp(prefix=f"host-{name}-", dir="/tmp"))
        (folder / "tmp").symlink_to(self._tmp)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        seen = map(str, (shared, *SEEN))
        self._process = _start(_INIT, folder / "log", name, str(folder), *seen)
        self._inside, self._switch, self._port = _inner(self._process), switch, f"port{number}"
        port, inside = self._port, str(self._inside)
        _ip("link", "add", port, "netns", str(switch), "type", "veth",
            "peer", "name", "eth0", "netns", inside)  # fmt: skip
        _ip("link", "set", port, "master", "br0", "up", at=switch)
        _ip("addr", "add", f"{self.address}/24", "dev", "eth0", at=self._inside)
        _ip("link", "set", "eth0", "up", at=self._inside)

    def start(self, words: list[str], env: Mapping[str, str], **how: object) -> subprocess.Popen:
        """A process on this host."""
        line = ["nsenter", "--target", str(self._inside), "--all", f"--wd={Path.cwd()}"]
        own = {**env, "HOME": str(self.home)}
        return subprocess.Popen([*line, *words], env=own, **how)  # type: ignore[call-overload,no-any-return]

    def run(self, words: list[str], env: Mapping[str, str], timeout: float) -> str:
        """What a command on this host prints; an error if it fails."""
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = self.start(words, env, **pipe)
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} on {self.name}: {process.returncode}\n{out}")
        return str(out)

    def link(self, up: bool) -> None:
        """Plug the cable in or out, at the switch."""
        _ip("link", "set", self._port, "up" if up else "down", at=self._switch)

    def send(self, pid: int, number: signal.Signals) -> None:
        """A signal to a process, by its number within the host."""
        words = ["nsenter", "--target", str(self._inside), "--pid", "--mount"]
        subprocess.run([*words, "kill", f"-{number.name[3:]}", str(pid)], capture_output=True)

    def runs(self, program: str) -> bool:
        """Whether a process of this host was started from a file of that name."""
        own = Path(f"/proc/{self._inside}/ns/pid").readlink()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/pid").readlink() == own:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if words[0].rpartition(b"/")[2].decode() == program:
                        return True
        return False

    def die(self) -> None:
        """Kill -9 all of it at once: the kernel ends a process namespace with its first process."""
        self.alive = False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._inside, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._tmp, ignore_errors=True)


class Network:
    """A switch, and hosts on it.

    Args:
        shared: a folder that all hosts see, under the same path; their own ones lie below it.
    """

    def __init__(self, shared: Path) -> None:
        self._shared = shared.absolute()
        (shared / "hosts").mkdir(parents=True)
        self._switch = _start(_SWITCH, shared / "hosts" / "log")
        self._hosts: list[Host] = []

    def add(self, name: str) -> Host:
        """One more host; each has an address of its own, and no other ever gets it again."""
        number = len(self._hosts) + 1
        self._hosts.append(Host(name, number, self._shared, _inner(self._switch)))
        return self._hosts[-1]

    @property
    def count(self) -> int:
        """Hosts so far, dead ones too."""
        return len(self._hosts)

    def close(self) -> None:
        """End all hosts, with all they run."""
        for host in self._hosts:
            host.die()
        self._switch.kill()
        self._switch.wait()
