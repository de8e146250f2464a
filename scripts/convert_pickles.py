"""Convert data sets that come as pickles into files that dmx reads, without running the pickles.

    python scripts/convert_pickles.py SOURCE OUT

SOURCE is a folder or an archive. Its files `<task>.{train,dev,test}.pickle` (of Solving-LRA-PathX
and Nystromformer, also named `lra-<task>...`) become OUT/<task>.<split>.npz, and CIFAR-10's python
version becomes OUT/cifar-10-batches-bin. Then: python -m dmx.data TASK --source OUT
"""

from __future__ import annotations

import math
import pickle
import posixpath
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmx.data.readers.archives import BATCHES, PER_BATCH, PIXELS
from dmx.data.sources import Source, open_source
from dmx.errors import EXIT_BAD_INPUT, DataError, DmxError
from dmx.tasks import SPLITS, task_names

_KINDS = "biufS"
"""dtype kinds that hold plain numbers or bytes: no objects, so nothing to build or call."""


class _Dtype:
    """Stands in for numpy.dtype: keeps the name and the byte order."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else str(name)
        self.swapped = False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.swapped = state[1] in (">", b">")  # as every machine we know, little endian

    def real(self) -> np.dtype[Any]:
        kind = np.dtype(self.name)
        if kind.kind not in _KINDS or kind.itemsize == 0:
            raise pickle.UnpicklingError(f"arrays of {self.name} are not allowed")
        return kind.newbyteorder(">") if self.swapped else kind


class PickledArray:
    """Stands in for numpy.ndarray while a pickle is read."""

    def __init__(self, *_: object) -> None:
        self.value: npt.NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.value = _array(content, dtype, shape, "F" if fortran else "C")


def _array(content: object, dtype: object, shape: object, order: object) -> npt.NDArray[Any]:
    if isinstance(content, str):  # a Python 2 string read as latin-1
        content = content.encode("latin-1")
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError("an array of objects is not allowed")
    sizes = tuple(int(n) for n in shape)  # type: ignore[attr-defined]
    flat = np.frombuffer(content, dtype.real())
    if math.prod(sizes) != flat.size:
        raise pickle.UnpicklingError(f"an array has {flat.size} values for the shape {sizes}")
    return flat.reshape(sizes, order="F" if order == "F" else "C")


def _reconstruct(*_: object) -> PickledArray:
    return PickledArray()


def _from_buffer(content: object, dtype: object, shape: object, order: object) -> PickledArray:
    array = PickledArray()
    array.value = _array(content, dtype, shape, order)
    return array


def _scalar(dtype: object, content: object = b"") -> Any:
    return _array(content, dtype, (), "C")[()]


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("only latin-1 strings are allowed")
    return text.encode("latin-1")


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            message = f"it asks for {module}.{name}, which is not allowed"
            raise pickle.UnpicklingError(message) from None


def load_pickle(stream: IO[bytes], where: str | Path) -> Any:
    """The value of a pickle of numbers, strings, bytes, lists, dicts and number arrays.

    Arrays come as PickledArray (their `.value`); strings of Python 2 come as bytes. Neither numpy's
    own unpickling code nor anything named in the file is run.

    Raises:
        DataError: the file is torn, no pickle, or asks for anything else.
    """
    try:
        return _Unpickler(stream, encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a crafted pickle can raise nearly anything
        raise DataError(f"{where} is no readable pickle of arrays ({error}).") from error


def _ids(example: Any, key: str, where: str) -> npt.NDArray[Any]:
    value = example.get(key) if isinstance(example, dict) else None
    if isinstance(value, list) and all(type(n) is int and abs(n) < 1 << 63 for n in value):
        ids = np.array(value, np.int64)
    elif isinstance(value, PickledArray) and value.value.ndim == 1:
        ids = value.value
    else:
        raise DataError(f"{where} has no list of numbers {key!r}.")
    if ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < 1 << 16):
        raise DataError(f"{where} has {len(ids)} values of {ids.dtype} in {key!r}, no token ids.")
    return ids.astype(np.uint16)


def _label(example: Any, where: str) -> int:
    value = example.get("label")
    if isinstance(value, PickledArray) and value.value.ndim == 0:
        value = value.value[()]
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise DataError(f"{where} has no whole number as its label.")
    return int(value)


def convert_split(stream: IO[bytes], where: str, out: Path) -> None:
    """One of the reference's pickles, a list of dicts, as an npz of arrays.

    Raises:
        DataError: it is not that, or its examples have different lengths.
    """
    examples = load_pickle(stream, where)
    if not isinstance(examples, list) or not examples:
        raise DataError(f"{where} is no list of examples.")
    keys = ["input_ids_0"]
    if isinstance(examples[0], dict) and "input_ids_1" in examples[0]:
        keys.append("input_ids_1")
    columns: dict[str, list[Any]] = {key: [] for key in (*keys, "label")}
    examples.reverse()
    for number in range(len(examples)):
        example = examples.pop()  # freed as it is stored
        at = f"{where}, example {number},"
        for key in keys:
            ids = _ids(example, key, at)
            if columns[key] and len(ids) != len(columns[key][0]):
                raise DataError(f"{at} has {len(ids)} values, and others {len(columns[key][0])}.")
            columns[key].append(ids)
        columns["label"].append(_label(example, at))
    np.savez_compressed(out, **{key: np.stack(column) for key, column in columns.items()})


def convert_batch(stream: IO[bytes], where: str, out: Path) -> None:
    """A batch of CIFAR-10's python version as one of the binary version: label, then 3,072 pixels.

    Raises:
        DataError: it is no such pickle.
    """
    value = load_pickle(stream, where)
    rgb = value.get(b"data") if isinstance(value, dict) else None
    labels = value.get(b"labels") if isinstance(value, dict) else None
    if not isinstance(rgb, PickledArray) or not isinstance(labels, list):
        raise DataError(f"{where} is no CIFAR-10 batch: it has no data and labels.")
    if rgb.value.shape != (PER_BATCH, 3 * PIXELS) or rgb.value.dtype != np.uint8:
        raise DataError(f"{where}: data are {rgb.value.shape} {rgb.value.dtype}, not CIFAR-10.")
    if len(labels) != PER_BATCH or not all(isinstance(x, int) and 0 <= x < 10 for x in labels):
        raise DataError(f"{where}: the labels are not {PER_BATCH} numbers 0..9.")
    out.write_bytes(np.hstack([np.array(labels, np.uint8)[:, None], rgb.value]).tobytes())


def found(source: Source, out: Path) -> dict[str, Path]:
    """The source's pickles, and the files that they become."""
    files: dict[str, Path] = {}
    for task in task_names():
        for stem in (task, f"lra-{task}"):
            root = source.locate(("",), f"{stem}.train.pickle")
            if root is not None:
                for split in SPLITS:
                    name = posixpath.join(root, f"{stem}.{split}.pickle")
                    files[name] = out / f"{task}.{split}.npz"
                break
    root = source.locate(("cifar-10-batches-py", ""), BATCHES[0])
    if root is not None:
        for batch in BATCHES:
            files[posixpath.join(root, batch)] = out / "cifar-10-batches-bin" / f"{batch}.bin"
    if not files:
        raise DataError(f"{source.path} holds no pickles of a task or of CIFAR-10.")
    return files


def main(argv: list[str]) -> int:
    """Convert; 0, or 2 and one sentence."""
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        source, out = open_source(Path(argv[0])), Path(argv[1])
        files = found(source, out)
        with source.explained():
            for name, stream in source.open(files):
                files[name].parent.mkdir(parents=True, exist_ok=True)
                convert = convert_batch if files[name].suffix == ".bin" else convert_split
                convert(stream, source.describe(name), files[name])
                print(f"wrote {files[name]}")
    except DmxError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
