"""Read pickles of arrays without running anything in them: a closed list of harmless stand-ins."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmx.errors import DataError

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
