"""All checks on a GPU machine without a network, in one call of less than nine minutes.

    python scripts/benchmarks/gpu_pack.py                      where there is a network: fills .gpu/
    python3 scripts/benchmarks/gpu_check.py --out DIR          on the machine, beside .gpu/

Nothing is installed but into /tmp; dmx runs from the source tree, so that the machine's own torch
is used even where it is older than the one setup.cfg asks for. Parts, each in a process of its own
with a time of its own, so that one that fails or hangs costs the others nothing:

    device       nvidia-smi, versions, the two ceilings: copy and bf16 matrix product
    tests        tests/gpu without Ray
    steps        bench_gpu.py: a training step, dense and packed, fp32 and bf16
    attention    bench_attention.py --device cuda: 1K to 64K tokens
    compile      the tests of train.compile, and compiled steps
    ray          tests/gpu/test_ray.py, with Ray from .gpu/ray.tar.xz

`--parts tests steps` runs these only. DIR then holds a text file for each part and benchmarks.md,
a fragment for docs/benchmarks.md. Two GPUs or the reference's checkout (gpu_pack.py --reference)
are used where they are there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / ".gpu"
SITE, RAY_SITE = Path("/tmp/dmx-site"), Path("/tmp/dmx-ray")
ALL_SECONDS = 530.0

DEVICE = """
import os, platform, torch
print(os.popen("nvidia-smi").read())
print("Python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
for index in range(torch.cuda.device_count()):
    print("GPU", index, torch.cuda.get_device_properties(index))
def seconds(work, count):
    work(); torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count): work()
    last.record(); last.synchronize()
    return first.elapsed_time(last) / 1000 / count
a = torch.randn(1 << 30, device="cuda"); b = torch.empty_like(a)
rate = 2 * 4 * a.numel() / seconds(lambda: b.copy_(a), 10)
print(f"copy: {rate / 1e12:.2f} TB/s read and written")
del a, b
m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
print(f"bf16 product: {2 * 8192**3 / seconds(lambda: m @ m, 20) / 1e12:.0f} TFLOP/s")
"""


@dataclass(frozen=True)
class Part:
    """A command line after `python`, what it may take, and whether Ray is on its path."""

    name: str
    words: list[list[str]]
    seconds: float
    with_ray: bool = False


def parts(device: str) -> list[Part]:
    """What is run, in the order of what is wanted most."""
    pytest = ["-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "-rfEs", "--tb=short"]
    steps = ["scripts/benchmarks/bench_gpu.py", "--device", device]
    reference = ["--reference", str(PACK / "reference")] if (PACK / "reference").is_dir() else []
    small = ["--tasks", "listops", "--batch", "4"] if device == "cpu" else []
    attention = ["scripts/benchmarks/bench_attention.py", "--device", device]
    attention += ["--repeats", "5", "--limit", "3"]
    lengths = ["--lengths", "1024", "--attentions", "linear"] if device == "cpu" else []
    compiled = ["--variants", "dense-bf16-compiled", "packed-bf16-compiled"]
    compiled += small or ["--tasks", "pathX-nogap", "text"]
    return [
        Part("device", [["-c", DEVICE]], 40),
        Part("tests", [[*pytest, "-k", "not compile", "--ignore=tests/gpu/test_ray.py"]], 160),
        Part("steps", [[*steps, *small, *reference]], 120),
        Part("attention", [[*attention, *lengths]], 80),
        Part("ray", [["-m", "pytest", "tests/gpu/test_ray.py", *pytest[3:]]], 100, True),
        Part("compile", [[*pytest, "-k", "compile"], [*steps, *compiled]], 120),
    ]


def main() -> int:
    """Prepare, run each part, write the fragment; 0 where every part ended well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-out")))
    names = [part.name for part in parts("cuda")]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a try")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + ALL_SECONDS
    lines: list[str] = []
    _attempt("wheels", _unpack_wheels, lines)
    if "ray" in args.parts:
        _attempt("Ray", _unpack_ray, lines)
    bad = 0
    for part in parts(args.device):
        if part.name not in args.parts:
            continue
        began = time.monotonic()
        codes = [_run(args, part, words, ends) for words in part.words]
        bad += any(codes)
        text = (args.out / f"{part.name}.txt").read_text(encoding="utf-8", errors="replace")
        last = [line for line in text.splitlines() if line.strip()][-1:]
        lines.append(f"{part.name}: {codes} in {time.monotonic() - began:.0f} s: {''.join(last)}")
        print(lines[-1], flush=True)
    (args.out / "benchmarks.md").write_text(_fragment(args.out, lines), encoding="utf-8")
    for name in ("tests", "ray", "compile"):
        _show_failures(args.out / f"{name}.txt")
    print("\n".join(lines))
    return min(bad, 1)


def _attempt(what: str, action: Callable[[], None], lines: list[str]) -> None:
    began = time.monotonic()
    try:
        action()
        lines.append(f"{what}: ready after {time.monotonic() - began:.0f} s")
    except Exception as error:  # whatever can be done without goes on
        lines.append(f"{what}: {type(error).__name__}: {error}"[:300])
    print(lines[-1], flush=True)


def _unpack_wheels() -> None:
    """A wheel is an archive of what is imported; pip would take seconds, and all or nothing."""
    wheels = sorted((PACK / "wheels").glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"no wheels in {PACK}: what the machine has must do")
    for wheel in wheels:
        shutil.unpack_archive(wheel, SITE, "zip")


def _unpack_ray() -> None:
    shutil.unpack_archive(PACK / "ray.tar.xz", RAY_SITE, "xztar", filter="data")


def _run(args: argparse.Namespace, part: Part, words: list[str], ends: float) -> int | str:
    """One command of a part, its output appended to the part's file; its exit code."""
    left = min(part.seconds, ends - time.monotonic())
    if left < 10:
        with (args.out / f"{part.name}.txt").open("a", encoding="utf-8") as log:
            log.write("not run: no time was left\n")
        return "no time"
    path = [ROOT, Path(__file__).parent, SITE, *([RAY_SITE] if part.with_ray else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **({"DMX_GPU_TESTS_ON": "cpu"} if args.device == "cpu" else {}),
    }
    with (args.out / f"{part.name}.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # and what it has started
            process.wait()
            log.write(f"\nkilled after {left:.0f} s\n".encode())
            return "killed"


def _fragment(out: Path, lines: list[str]) -> str:
    """For docs/benchmarks.md: which device, which versions, the tables."""

    def text(name: str) -> list[str]:
        path = out / f"{name}.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    def table(name: str) -> list[str]:
        return [line for line in text(name) if line.startswith("|")]

    keep = ("Python ", "GPU ", "copy:", "bf16 product:")
    about = [f"- {line}" for line in text("device") if line.startswith(keep)]
    return "\n".join(
        [
            "## On a GPU",
            "",
            "Command: `python3 scripts/benchmarks/gpu_check.py`, on:",
            "",
            *about,
            "",
            "A training step (see scripts/benchmarks/bench_gpu.py):",
            "",
            *table("steps"),
            "",
            "Compiled:",
            "",
            *table("compile"),
            "",
            "Growth with the length (see scripts/benchmarks/bench_attention.py):",
            "",
            *table("attention"),
            "",
            *(f"- {line}" for line in lines),
            "",
        ]
    )


def _show_failures(path: Path) -> None:
    """The tool's reply keeps the end of what is printed: the reasons belong there."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in [x for x in lines if x.startswith(("FAILED", "ERROR", "SKIPPED"))][:40]:
            print(line[:220])


if __name__ == "__main__":
    sys.exit(main())
