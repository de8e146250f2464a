"""Packs what gpu_check.py needs on a bare GPU machine without a network, into `.gpu/`.

    python scripts/benchmarks/gpu_pack.py [--python 3.12] [--without-ray] [--reference PATH]

Run it before a machine is asked for, where there is a network: it downloads the wheels that the
machine lacks, in the versions of constraints.txt, and puts golden files and real batches beside
them. Ray's wheel is larger than all that may travel, so it is unpacked and packed again without
its Java archive and its dashboard's pages, which nothing here uses. What travels may have 64 MiB.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from bench_cases import CASES, batch_of
from bench_gpu import BATCHES

ROOT = Path(__file__).resolve().parents[2]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PLAIN = ["rich"]
WITH_RAY = [
    *("optuna", "alembic", "Mako", "SQLAlchemy", "colorlog", "tensorboardX"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
    *("jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),
]
"""What Ray and Optuna need beside the packages that images for PyTorch commonly hold."""
LEFT_OUT = ("ray/jars/", "ray/dashboard/client/")
LIMIT_MB = 64


def main() -> None:
    """Download, pack, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--without-ray", action="store_true", help="some 40 MB less")
    parser.add_argument("--reference", type=Path, help="a checkout of Solving-LRA-PathX")
    args = parser.parse_args()
    target = ROOT / ".gpu"
    wheels = target / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    _download(wheels, [*PLAIN, *([] if args.without_ray else WITH_RAY)], args.python)
    if not args.without_ray:
        _pack_ray(target, args.python)
    golden = ROOT.parent / "shared" / "golden" / "models"
    if golden.is_dir():
        (target / "golden" / "models").mkdir(parents=True, exist_ok=True)
        for path in sorted(golden.glob("*.npz")):
            if not (ROOT / "tests" / "golden" / "models" / path.name).is_file():
                shutil.copyfile(path, target / "golden" / "models" / path.name)
    for name in BATCHES:
        ids, labels = batch_of(name, BATCHES[name].batch)
        assert ids.max() < 256 <= CASES[name].vocab_size or ids.max() < CASES[name].vocab_size
        np.savez_compressed(
            target / f"{name}.npz", ids=ids.numpy().astype(np.uint8), labels=labels.numpy()
        )
    if args.reference:
        shutil.copytree(args.reference / "LRA" / "code", target / "reference" / "LRA" / "code",
                        dirs_exist_ok=True)  # fmt: skip
    _say_size(target)


def _download(folder: Path, names: list[str], python: str) -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.strip().split("==")
            pins[_plain(name)] = version
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    wanted = [f"{name}=={pins[_plain(name)]}" for name in names]
    subprocess.run([*command, "--dest", str(folder), *wanted], check=True)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pack_ray(target: Path, python: str) -> None:
    """`.gpu/ray.tar.xz`: xz does what the wheel's deflate does not, and the jar stays here."""
    packed, folder = target / "ray.tar.xz", target / "ray-wheel"
    if packed.is_file():
        return
    folder.mkdir(exist_ok=True)
    _download(folder, ["ray"], python)
    (wheel,) = folder.glob("ray-*.whl")
    shutil.unpack_archive(wheel, folder / "site", "zip")  # leaves out what would lie outside
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            place = folder / "site" / entry.filename
            if place.is_file():
                place.chmod(entry.external_attr >> 16 or 0o644)
    for name in LEFT_OUT:
        shutil.rmtree(folder / "site" / name)
    with tarfile.open(packed, "w:xz", preset=4) as out:
        out.add(folder / "site", arcname=".")
    shutil.rmtree(folder)


def _say_size(target: Path) -> None:
    own = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
    files = [ROOT / name for name in tracked.splitlines()]
    tree = sum(file.stat().st_size for file in files if file.is_file())
    total = (own + tree) / 2**20
    print(f".gpu: {own / 2**20:.1f} MiB, the tree: {tree / 2**20:.1f} MiB, together {total:.1f}")
    if total > LIMIT_MB - 1:
        sys.exit(f"more than {LIMIT_MB} MiB may not travel: pack --without-ray")
    print("now, on the machine with the GPU: see the top of scripts/benchmarks/gpu_check.py")


if __name__ == "__main__":
    main()
