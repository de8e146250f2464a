"""ListOps: the files of lra_release, listops-1000/basic_{train,val,test}.tsv, or generated.

Generated examples follow the grammar and limits of LRA's generator, one random stream per example.
Formulas: Nangia & Bowman 2018, with LRA's settings (lra_benchmarks/data/listops.py): depth 10,
2 to 10 arguments, operators MIN MAX MED SM, more than 500 and fewer than 2,000 tokens. The
official split hangs on Python's string hashing and cannot be regenerated; this one is a function
of the seed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import posixpath
import random
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmx.data.progress import progress
from dmx.data.readers.base import READERS, Reader, Request
from dmx.data.shards import ShardPlan, make_shards, read_shards
from dmx.data.sources import Source, without_bom
from dmx.data.store_writer import StoreWriter
from dmx.errors import ConfigError, DataError
from dmx.tasks import SPLITS, Task

VOCABULARY = (*"0123456789", "X", "[MAX", "[MED", "[MIN", "[SM")
"""Token of id 1, 2, ...; `X` is the closing bracket. Sorted: the reference's order is random."""
MAX_TOKENS = 2000
"""The reference cuts here and pads to 2,048; no example is longer than 1,999."""
MIN_LENGTH = 500
MAX_LENGTH = 2000
"""Both exclusive."""
MAX_DEPTH = 10
MAX_ARGUMENTS = 10
OPERATOR_SHARE = 0.25
_CLOSE = VOCABULARY.index("X") + 1
_FIRST_OPERATOR = VOCABULARY.index("[MAX") + 1
_LAST = len(VOCABULARY)
_IDS = {token: number for number, token in enumerate(VOCABULARY, 1)}
_IDS["]"] = _IDS["X"]
FILES = {"basic_train.tsv": "train", "basic_val.tsv": "dev", "basic_test.tsv": "test"}
HEADER = ["Source", "Target"]
SHARD_SIZE = 1000
DEFAULT_SEED = 0
_FOLDERS = ("lra_release/lra_release/listops-1000", "lra_release/listops-1000", "listops-1000", "")
_OPERATORS: tuple[Callable[[list[int]], int], ...] = (
    max,
    lambda values: _median(values),
    min,
    lambda values: sum(values) % 10,
)
"""In the order of their tokens: MAX, MED, MIN, SM."""


def _median(values: list[int]) -> int:
    ordered = sorted(values)
    half = len(ordered) // 2
    # Truncated, as in LRA's int(np.median(values)).
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) // 2


def value_of(ids: Iterable[int]) -> int | None:
    """The value 0..9 of an expression, given as ids; None for what is none."""
    open_ones: list[tuple[Callable[[list[int]], int], list[int]]] = []
    result = None
    for token in ids:
        if result is not None or not 1 <= token <= _LAST:
            return None
        if token >= _FIRST_OPERATOR:
            open_ones.append((_OPERATORS[token - _FIRST_OPERATOR], []))
            continue
        value = token - 1
        if token == _CLOSE:
            if not open_ones or not open_ones[-1][1]:
                return None
            operator, arguments = open_ones.pop()
            value = operator(arguments)
        if open_ones:
            open_ones[-1][1].append(value)
        else:
            result = value
    return None if open_ones else result


def decode(ids: npt.NDArray[Any]) -> str:
    """The expression as text, with `]` for the closing bracket; padding is dropped."""
    tokens = (VOCABULARY[number - 1] for number in ids.tolist() if number)
    return " ".join("]" if token == "X" else token for token in tokens)


def example(seed: int, index: int, attempt: int = 0) -> tuple[bytes, int]:
    """(ids as bytes, label 0..9) of example `index`: a function of its arguments alone.

    `attempt` counts up when an example turns out equal to an earlier one.
    """
    # Only random() is promised to be the same in every Python version; choice and randint are not.
    draw = random.Random(f"dmx-listops:{seed}:{index}:{attempt}").random
    tokens = bytearray()
    while True:
        label = _tree(draw, tokens)
        if label is not None:
            return bytes(tokens), label


def _tree(draw: Callable[[], float], tokens: bytearray) -> int | None:
    """Draw one tree into `tokens`; its value, or None when its length is outside the limits.

    The reference draws whole trees and throws most away; giving up as soon as the limit is certain
    to be broken keeps the same distribution.
    """
    tokens.clear()
    least = 1  # tokens that the tree has at least, given what is drawn
    stack: list[tuple[int, int, list[int]]] = []  # operator, number of arguments, their values
    while True:
        if len(stack) + 1 < MAX_DEPTH and draw() <= OPERATOR_SHARE:
            count = 2 + int(draw() * (MAX_ARGUMENTS - 1))
            least += count + 1
            if least >= MAX_LENGTH:
                return None
            operator = int(draw() * len(_OPERATORS))
            tokens.append(_FIRST_OPERATOR + operator)
            stack.append((operator, count, []))
            continue
        value = int(draw() * 10)
        tokens.append(value + 1)
        while stack:
            operator, count, values = stack[-1]
            values.append(value)
            if len(values) < count:
                break
            value = _OPERATORS[operator](values)
            tokens.append(_CLOSE)
            stack.pop()
        if not stack:
            return value if len(tokens) > MIN_LENGTH else None


def make_shard(start: int, stop: int, *, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Examples start..stop-1: "tokens" uint8 [sum of lengths], "lengths" int32, "labels" uint8."""
    examples = [example(seed, index) for index in range(start, stop)]
    return {
        "tokens": np.frombuffer(b"".join(ids for ids, _ in examples), np.uint8),
        "lengths": np.array([len(ids) for ids, _ in examples], np.int32),
        "labels": np.array([label for _, label in examples], np.uint8),
    }


def parse(stream: IO[bytes], where: str) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    """(ids [L], label) per line of a ListOps tsv; columns beside Source and Target are ignored.

    Raises:
        DataError: a line lacks a column, has an unknown token or a target that is not the
            expression's value, or is not UTF-8.
    """
    text = io.TextIOWrapper(without_bom(stream, where), encoding="utf-8", newline="")
    rows = csv.reader(text, delimiter="\t")
    try:
        header = next(rows, [])
        if not set(HEADER) <= set(header):
            raise DataError(
                f"{where}, line 1: expected the columns Source and Target, with a tab between them."
            )
        places = [header.index(name) for name in HEADER]
        for row in rows:
            at = f"{where}, line {rows.line_num}"
            if not row:
                continue  # an empty line, or the second half of a line end that was written twice
            if len(row) != len(header):
                raise DataError(f"{at}: {len(row)} columns instead of {len(header)}.")
            source, target = (row[place] for place in places)
            if len(target) != 1 or target not in VOCABULARY[:10]:
                raise DataError(f"{at}: target {target[:20]!r} is no digit.")
            try:
                ids = [_IDS[token] for token in source.replace("(", " ").replace(")", " ").split()]
            except KeyError as error:
                raise DataError(f"{at}: unknown token {error.args[0][:20]!r}.") from error
            if not ids:
                raise DataError(f"{at}: the source is empty.")
            if len(ids) > MAX_TOKENS:
                raise DataError(f"{at}: {len(ids):,} tokens are more than {MAX_TOKENS:,}.")
            value = value_of(ids)
            if value != int(target):
                what = "is no whole expression" if value is None else f"has the value {value}"
                raise DataError(f"{at}: the target is {target}, but the source {what}.")
            yield np.array(ids, np.uint8), value
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}, after line {rows.line_num}: not UTF-8 ({error.reason})."
        ) from error
    except csv.Error as error:
        raise DataError(f"{where}, line {rows.line_num}: {error}.") from error
    finally:
        text.detach()  # the source closes its own stream


def _find(_: Task, source: Source) -> str | None:
    return source.locate(_FOLDERS, "basic_train.tsv")


def _describe(request: Request) -> dict[str, Any]:
    source, root = request.found
    return {
        "origin": f"LRA release, {source.describe(root)}",
        "class_names": tuple("0123456789"),
        "dtype": "uint8",
        "parameters": {"vocabulary": list(VOCABULARY)},
        "licence": "Apache 2.0 (Long Range Arena)",
    }


def _fill(request: Request, writer: StoreWriter) -> None:
    source, root = request.found
    with progress("listops", 0, "expressions") as advance:
        for name, stream in source.open([posixpath.join(root, name) for name in FILES]):
            for ids, label in parse(stream, source.describe(name)):
                writer.add(FILES[posixpath.basename(name)], ids, label)
                advance(1)


def _plan(request: Request) -> tuple[ShardPlan, dict[str, int], int]:
    """(the shards, examples per split, seed)."""
    assert request.task.published is not None
    usual = zip(SPLITS, request.task.published.counts[0], strict=True)
    sizes = {split: int(request.options.get(f"num_{split}", n)) for split, n in usual}
    if least := [split for split, count in sizes.items() if count < 1]:
        raise ConfigError(f"--num-{least[0]} must be at least 1.")
    seed = int(request.options.get("seed", DEFAULT_SEED))
    plan = ShardPlan(
        store=request.folder,
        maker=f"{__name__}:make_shard",
        arguments={"seed": seed},
        total=sum(sizes.values()),
        size=SHARD_SIZE,
        unit="expressions",
    )
    return plan, sizes, seed


def _describe_generated(request: Request) -> dict[str, Any]:
    _, sizes, seed = _plan(request)
    return {
        "origin": "generated by dmx with the grammar and limits of LRA's generator",
        "class_names": tuple("0123456789"),
        "dtype": "uint8",
        "parameters": {
            "seed": seed,
            "sizes": sizes,
            "min_length": MIN_LENGTH,
            "max_length": MAX_LENGTH,
            "vocabulary": list(VOCABULARY),
        },
        "note": "generated",
        "licence": "none needed (generated)",
    }


def _generate(request: Request, writer: StoreWriter) -> dict[str, int]:
    """Distinct examples only: one that is there already is drawn again."""
    plan, sizes, seed = _plan(request)
    make_shards(plan, workers=request.workers, address=request.address)
    ends = {"train": sizes["train"], "dev": sizes["train"] + sizes["dev"], "test": plan.total}
    seen: set[bytes] = set()
    redrawn = 0
    for start, arrays in read_shards(plan):
        parts = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
        for index, (tokens, label) in enumerate(zip(parts, arrays["labels"], strict=True), start):
            ids, value, attempt = tokens.tobytes(), int(label), 0
            while (digest := hashlib.blake2b(ids, digest_size=16).digest()) in seen:
                attempt += 1
                redrawn += 1
                ids, value = example(seed, index, attempt)
            seen.add(digest)
            split = next(name for name, end in ends.items() if index < end)
            writer.add(split, np.frombuffer(ids, np.uint8), value)
    return {"redrawn": redrawn}


READERS.register("lra-listops")(
    Reader(
        name="lra-listops",
        families=("listops",),
        find=_find,
        expects="listops-1000/basic_{train,val,test}.tsv",
        describe=_describe,
        fill=_fill,
    )
)
READERS.register("generated-listops")(
    Reader(
        name="generated-listops",
        families=("listops",),
        describe=_describe_generated,
        fill=_generate,
        options=("seed", "num_train", "num_dev", "num_test"),
        rank=20,
    )
)
