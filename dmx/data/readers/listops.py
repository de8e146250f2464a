"""ListOps: the files of lra_release, listops-1000/basic_{train,val,test}.tsv, or generated.

Generated examples follow the grammar and limits of LRA's generator, one random stream per example.
Formulas: Nangia & Bowman 2018, with LRA's settings (lra_benchmarks/data/listops.py): depth 10,
2 to 10 arguments, operators MIN MAX MED SM, more than 500 and fewer than 2,000 tokens. The
official split hangs on Python's string hashing and cannot be regenerated; this one is a function
of the seed.
"""

from __future__ import annotations

import codecs
import csv
import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmx.data.prepare import Reader, Request, register
from dmx.data.shards import ShardPlan, make_shards, read_shards
from dmx.data.sources import without_bom
from dmx.data.store_writer import StoreWriter
from dmx.errors import ConfigError, DataError
from dmx.tasks import SPLITS
from dmx.terminal import progress

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
SHARD_SIZE = 1000
_LAST = len(VOCABULARY)
_IDS = {token: number for number, token in enumerate(VOCABULARY, 1)}
_CLOSE, _MAX, _MED, _MIN = (_IDS[token] for token in ("X", "[MAX", "[MED", "[MIN"))
FILES = {"train": "basic_train.tsv", "dev": "basic_val.tsv", "test": "basic_test.tsv"}
_FOLDERS = ("lra_release/lra_release/listops-1000", "lra_release/listops-1000", "listops-1000", "")


# -- expressions --------------------------------------------------------------------------------


def value_of(ids: Iterable[int]) -> int | None:
    """The value 0..9 of an expression, given as ids; None for what is none."""
    value = _compiled()(np.frombuffer(bytes(ids), np.uint8))
    return None if value < 0 else int(value)


@functools.cache
def _compiled() -> Callable[[npt.NDArray[np.uint8]], int]:
    from dmx.data.pathfinder_core import entry  # numba takes half a second to import

    return entry(_evaluate, {})


def _evaluate(ids: npt.NDArray[np.uint8]) -> int:
    """The value, or -1."""
    stacks = np.empty((3, ids.size), np.int64)
    values, starts, operators = stacks[0], stacks[1], stacks[2]
    top = depth = 0  # of the values, and of the open operators with their first arguments
    for n in range(ids.size):
        token: Any = np.int64(ids[n])
        if (n > 0 and depth == 0) or token < 1 or token > _LAST:
            return -1
        if token > _CLOSE:
            operators[depth], starts[depth] = token, top
            depth += 1
            continue
        value = token - 1
        if token == _CLOSE:
            depth -= 1
            if depth < 0 or starts[depth] == top:
                return -1
            arguments = values[starts[depth] : top]
            top, half = starts[depth], arguments.size // 2
            if operators[depth] == _MAX:
                value = arguments.max()
            elif operators[depth] == _MIN:
                value = arguments.min()
            elif operators[depth] == _MED:  # truncated, as in LRA's int(np.median(values))
                arguments.sort()
                value = (arguments[half] + arguments[-1 - half]) // 2
            else:
                value = arguments.sum() % 10
        values[top] = value
        top += 1
    return values[0] if depth == 0 and top == 1 else -1


def decode(ids: npt.NDArray[Any]) -> str:
    """The expression as text, with `]` for the closing bracket; padding is dropped."""
    tokens = (VOCABULARY[number - 1] for number in ids.tolist() if number)
    return " ".join("]" if token == "X" else token for token in tokens)


# -- files --------------------------------------------------------------------------------------


def _parse(stream: IO[bytes], where: str) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    """(ids [L], label) per line of a ListOps tsv; columns beside Source and Target are ignored."""
    known = {**_IDS, "]": _CLOSE}
    rows = csv.reader(codecs.iterdecode(without_bom(stream, where), "utf-8"), delimiter="\t")
    try:
        header = next(rows, [])
        if not {"Source", "Target"} <= set(header):
            raise DataError(
                f"{where}, line 1: expected the columns Source and Target, with a tab between them."
            )
        places = header.index("Source"), header.index("Target")
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
                ids = [known[token] for token in source.replace("(", " ").replace(")", " ").split()]
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


def _fill(request: Request, writer: StoreWriter) -> None:
    with progress("listops", 0, "expressions") as advance:
        for split, stream, where in request.files(FILES):
            for ids, label in _parse(stream, where):
                writer.add(split, ids, label)
                advance(1)


# -- generated ----------------------------------------------------------------------------------


def example(seed: int, index: int, attempt: int = 0) -> bytes:
    """The ids of example `index`: a function of its arguments alone.

    `attempt` counts up when an example turns out equal to an earlier one.
    """
    # Only random() is promised to be the same in every Python version; choice and randint are not.
    draw = random.Random(f"dmx-listops:{seed}:{index}:{attempt}").random
    tokens = bytearray()
    while not _tree(draw, tokens):
        pass
    return bytes(tokens)


def _tree(draw: Callable[[], float], tokens: bytearray) -> bool:
    """Draw one tree into `tokens`; False when its length is outside the limits.

    The reference draws whole trees and throws most away; giving up as soon as the limit is certain
    to be broken keeps the same distribution.
    """
    tokens.clear()
    least = 1  # tokens that the tree has at least, given what is drawn
    wanted: list[int] = []  # arguments that each open operator still lacks
    while True:
        if len(wanted) + 1 < MAX_DEPTH and draw() <= OPERATOR_SHARE:
            count = 2 + int(draw() * (MAX_ARGUMENTS - 1))
            least += count + 1
            if least >= MAX_LENGTH:
                return False
            tokens.append(_CLOSE + 1 + int(draw() * (_LAST - _CLOSE)))
            wanted.append(count)
            continue
        tokens.append(int(draw() * 10) + 1)
        while wanted:
            wanted[-1] -= 1
            if wanted[-1]:
                break
            tokens.append(_CLOSE)
            wanted.pop()
        if not wanted:
            return len(tokens) > MIN_LENGTH


def make_shard(start: int, stop: int, *, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Examples start..stop-1: "tokens" uint8 [sum of lengths], "lengths" int32."""
    examples = [example(seed, index) for index in range(start, stop)]
    return {
        "tokens": np.frombuffer(b"".join(examples), np.uint8),
        "lengths": np.array([len(ids) for ids in examples], np.int32),
    }


def _settings(request: Request) -> tuple[int, dict[str, int]]:
    """The seed, and examples per split."""
    assert request.task.published is not None
    usual = zip(SPLITS, request.task.published.counts[0], strict=True)
    sizes = {split: int(request.options.get(f"num_{split}", n)) for split, n in usual}
    if least := [split for split, count in sizes.items() if count < 1]:
        raise ConfigError(f"--num-{least[0]} must be at least 1.")
    return int(request.options.get("seed", 0)), sizes


def _describe_generated(request: Request) -> dict[str, Any]:
    seed, sizes = _settings(request)
    limits = {"min_length": MIN_LENGTH, "max_length": MAX_LENGTH, "vocabulary": list(VOCABULARY)}
    return {
        "origin": "generated by dmx with the grammar and limits of LRA's generator",
        "class_names": tuple("0123456789"),
        "dtype": "uint8",
        "parameters": {"seed": seed, "sizes": sizes, **limits},
        "note": "generated",
        "licence": "none needed (generated)",
    }


def _generate(request: Request, writer: StoreWriter) -> dict[str, int]:
    """Distinct examples only: one that is there already is drawn again."""
    seed, sizes = _settings(request)
    plan = ShardPlan(
        store=request.folder,
        maker=f"{__name__}:make_shard",
        arguments={"seed": seed},
        total=sum(sizes.values()),
        size=SHARD_SIZE,
    )
    make_shards(plan, workers=request.workers, on_cluster=request.on_cluster)
    seen: set[bytes] = set()
    redrawn = 0
    for start, arrays in read_shards(plan):
        parts = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
        for index, part in enumerate(parts, start):
            ids, attempt = part.tobytes(), 0
            while (digest := hashlib.blake2b(ids, digest_size=16).digest()) in seen:
                attempt += 1
                ids = example(seed, index, attempt)
            seen.add(digest)
            redrawn += attempt
            value = value_of(ids)
            assert value is not None
            writer.add(None, np.frombuffer(ids, np.uint8), value)
    first = 0
    for split, count in sizes.items():
        writer.place(split, np.arange(first, first + count))
        first += count
    return {"redrawn": redrawn}


register(
    Reader(
        name="lra-listops",
        families=("listops",),
        find=lambda _, source: source.locate(_FOLDERS, FILES["train"]),
        expects="listops-1000/basic_{train,val,test}.tsv",
        describe={
            "origin": "LRA release",
            "class_names": tuple("0123456789"),
            "dtype": "uint8",
            "parameters": {"vocabulary": list(VOCABULARY)},
            "licence": "Apache 2.0 (Long Range Arena)",
        },
        fill=_fill,
    )
)
register(
    Reader(
        name="generated-listops",
        families=("listops",),
        describe=_describe_generated,
        fill=_generate,
        options=("seed", "num_train", "num_dev", "num_test"),
        rank=20,
    )
)
