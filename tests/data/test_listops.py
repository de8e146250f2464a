"""ListOps: the reader against hand-made lines, the generator against LRA's grammar and figures."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmx.data.prepare import prepare_data
from dmx.data.readers.listops import VOCABULARY, decode, example, value_of
from dmx.errors import ConfigError, DataError
from tests.data.helpers import write_folder, write_tar
from tests.tiny import one_sentence

LINE = b"( ( ( ( [MAX 2 ) ( ( ( ( [SM 9 ) 8 ) 7 ) ] ) ) 3 ) ] )\t4\r\n"
"""As the stock generator writes it. Ids by the sorted vocabulary: digits 1..10, X 11, [MAX 12..."""
IDS = [12, 3, 15, 10, 9, 8, 11, 4, 11]


def tsv(*lines: bytes) -> bytes:
    return b"Source\tTarget\r\n" + b"".join(lines)


def files(train: bytes) -> dict[str, bytes]:
    folder = "lra_release/lra_release/listops-1000"
    return {
        f"{folder}/basic_train.tsv": train,
        f"{folder}/basic_val.tsv": tsv(b"[MIN 1 2 ]\t1\n"),
        f"{folder}/basic_test.tsv": tsv(b"7\t7\n"),
    }


@pytest.mark.parametrize("archive", [False, True])
def test_release_files_become_ids(tmp_path: Path, archive: bool) -> None:
    raw = files(tsv(LINE, LINE))
    if archive:
        source = write_tar(tmp_path / "lra_release.gz", raw)
    else:
        source = write_folder(tmp_path / "raw", raw)
    store = prepare_data("listops", tmp_path / "data", source=source)
    train = store.split("train")
    assert len(train) == 2
    assert train.tokens(1).tolist() == IDS
    assert train.labels.tolist() == [4, 4]
    assert store.split("dev").tokens(0).tolist() == [14, 2, 3, 11]
    assert store.split("test").tokens(0).tolist() == [8]
    assert store.manifest.label == "listops (partial: 4 of 100,000 examples)"
    assert not store.manifest.is_sample
    assert decode(train.tokens(0)) == "[MAX 2 [SM 9 8 7 ] 3 ]"


@pytest.mark.parametrize(
    "inner", ["", "lra_release", "lra_release/lra_release", "lra_release/lra_release/listops-1000"]
)
def test_source_may_be_any_level_of_the_release(tmp_path: Path, inner: str) -> None:
    write_folder(tmp_path / "raw", files(tsv(LINE)))
    assert len(
        prepare_data("listops", tmp_path / "data", source=tmp_path / "raw" / inner).split("train")
    )


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"Source,Target\r\n1,1\r\n", "line 1: expected the columns"),
        (tsv(LINE).decode().encode("utf-16"), "UTF-16; save it as UTF-8"),
        (tsv(b"[MAX " + b"1 " * 1999 + b"]\t1\n"), "line 2: 2,001 tokens are more than 2,000"),
        (b"", "line 1: expected the columns"),
        (tsv(LINE, b"[MAX 1 2 ]\r\n"), "line 3: 1 columns"),
        (tsv(b"1\t2\t3\n"), "line 2: 3 columns"),
        (tsv(b"[MAX 1 2 ]\t12\n"), "line 2: target '12'"),
        (tsv(b"[MAX 1 2 ]\tX\n"), "line 2: target 'X'"),
        (tsv(b"[AVG 1 2 ]\t1\n"), r"line 2: unknown token '\[AVG'"),
        (tsv(b"( )\t1\n"), "line 2: the source is empty"),
        (tsv(b"\xff\xfe\t1\n"), "not UTF-8"),
        (tsv(), "split train"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, train: bytes, message: str) -> None:
    source = write_folder(tmp_path / "raw", files(train))
    with pytest.raises(DataError, match=message) as caught:
        prepare_data("listops", tmp_path / "data", source=source)
    if "split" not in message:
        assert "basic_train.tsv" in str(caught.value)
    assert not (tmp_path / "data" / "listops").exists()


def independent_value(text: str) -> int:
    """Evaluate the printed expression with nothing of dmx: a recursive reader, numpy's median."""
    tokens = iter(text.split())

    def value(token: str) -> int:
        if token.isdigit():
            return int(token)
        arguments = []
        while (inner := next(tokens)) != "]":
            arguments.append(value(inner))
        functions: dict[str, Any] = {
            "[MIN": min,
            "[MAX": max,
            "[MED": lambda v: int(np.median(v)),
            "[SM": lambda v: sum(v) % 10,
        }
        return int(functions[token](arguments))

    result = value(next(tokens))
    assert next(tokens, None) is None
    return result


def depth_and_widths(text: str) -> tuple[int, list[int]]:
    depth = deepest = 0
    widths: list[int] = []
    open_counts: list[int] = []
    for token in text.split():
        if token.startswith("["):
            if open_counts:
                open_counts[-1] += 1
            open_counts.append(0)
            depth += 1
            deepest = max(deepest, depth)
        elif token == "]":
            widths.append(open_counts.pop())
            depth -= 1
        else:
            open_counts[-1] += 1
    return deepest + 1, widths  # the leaves below the deepest operator


def test_generated_examples_obey_the_grammar_and_match_lras_figures() -> None:
    made = [(ids, value_of(ids)) for ids in (example(7, index) for index in range(1500))]
    texts = [decode(np.frombuffer(ids, np.uint8)) for ids, _ in made]
    lengths = [len(ids) for ids, _ in made]
    assert min(lengths) > 500
    assert max(lengths) < 2000
    # Measured on LRA's own generator: mean 1,067, median 1,012 (lra-data.md, 2.1).
    assert statistics.mean(lengths) == pytest.approx(1067, abs=60)
    assert statistics.median(lengths) == pytest.approx(1012, abs=90)
    for text, (_, label) in list(zip(texts, made, strict=True))[:150]:
        assert independent_value(text) == label
        depth, widths = depth_and_widths(text)
        assert depth <= 10
        assert 2 <= min(widths) <= max(widths) <= 10
    widths = [w for text in texts[:100] for w in depth_and_widths(text)[1]]
    assert {*widths} == set(range(2, 11))
    shares = {value: count / len(made) for value, count in Counter(v for _, v in made).items()}
    assert shares[0] == pytest.approx(0.166, abs=0.035)
    assert shares[9] == pytest.approx(0.157, abs=0.035)
    assert all(0.05 < shares[value] < 0.12 for value in range(1, 9))
    roots = Counter(text.split()[0] for text in texts)
    assert all(0.2 < roots[op] / len(texts) < 0.3 for op in ("[MIN", "[MAX", "[MED", "[SM"))


def test_examples_are_a_function_of_seed_index_and_attempt() -> None:
    assert example(1, 2) == example(1, 2)
    assert len({example(*key) for key in [(1, 2), (2, 2), (1, 3), (1, 2, 1)]}) == 4


@pytest.mark.parametrize("ids", [[], [11], [12, 11], [1, 1], [12, 1], [16], [0]])
def test_what_is_no_expression_has_no_value(ids: list[int]) -> None:
    assert value_of([14, 3, 4, 11]) == 2  # [MIN 2 3 ]
    assert value_of(ids) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MED 1 2 ]", 1),
        ("[MED 9 0 4 ]", 4),
        ("[MED 9 9 0 0 ]", 4),
        ("[MED 3 [MAX 1 8 ] [SM 9 9 9 ] 0 ]", 5),
        ("[SM 5 5 ]", 0),
        ("[MIN 7 ]", 7),
        ("4", 4),
    ],
)
def test_values_of_written_expressions(text: str, value: int) -> None:
    numbers = {token: n for n, token in enumerate(VOCABULARY, 1)} | {"]": 11}
    ids = np.array([numbers[token] for token in text.split()], np.uint8)
    assert value_of(ids) == value == independent_value(text)


def test_targets_are_held_against_the_expressions(tmp_path: Path) -> None:
    wrong = tsv(LINE, b"[MIN 1 2 ]\t2\n", LINE)
    source = write_folder(tmp_path / "raw", files(wrong))
    with pytest.raises(DataError, match=r"train\.tsv, line 3: the target is 2, but the source has"):
        prepare_data("listops", tmp_path / "data", source=source)
    for broken in (b"[MIN 1 2\t1\n", b"1 2\t1\n", b"[MIN ]\t1\n", b"] 1\t1\n"):
        source = write_folder(tmp_path / "raw", files(tsv(LINE, broken)))
        with pytest.raises(DataError, match=r"line 3: the target is 1, .* no whole expression"):
            prepare_data("listops", tmp_path / "data", source=source)
    assert not (tmp_path / "data" / "listops").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"\r\n", b"\n"),
        lambda text: text.replace(b"\r\n", b"\r\r\n"),
        lambda text: text + b"\r\n\n",
        lambda text: text.removesuffix(b"\r\n"),
        lambda text: text.replace(b"]", b"X"),
        lambda text: text.replace(b"( ", b"").replace(b" )", b""),
        lambda text: text.replace(b"( (", b"(  ("),
        lambda text: b"".join(b"7\t" + row for row in text.splitlines(keepends=True)),
        lambda text: text.replace(b"\tTarget", b"\tTarget\tlength").replace(b"\t4\r", b"\t4\t9\r"),
        lambda text: b'"' + text.replace(b"\t", b'"\t"').replace(b"\r\n", b'"\r\n"')[:-1],
    ],
)
def test_files_of_other_systems_are_read_the_same(tmp_path: Path, change: Any) -> None:
    source = write_folder(tmp_path / "raw", files(change(tsv(LINE, LINE))))
    train = prepare_data("listops", tmp_path / "data", source=source).split("train")
    assert [train.tokens(n).tolist() for n in range(len(train))] == [IDS, IDS]
    assert train.labels.tolist() == [4, 4]


@pytest.mark.parametrize("up", ["listops", "", ".."])
def test_s4_layout_and_the_folder_above_it(tmp_path: Path, up: str) -> None:
    raw = files(tsv(LINE))
    write_folder(tmp_path / "h" / "data", {f"listops/{n.split('/')[-1]}": raw[n] for n in raw})
    source = (tmp_path / "h" / "data" / up).resolve()
    assert len(prepare_data("listops", tmp_path / "data", source=source).split("train")) == 1


def test_a_folder_inside_the_right_one_is_told_which_is_right(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", files(tsv(LINE)))
    inside = raw / "lra_release" / "lra_release" / "listops-1000" / "plots"
    inside.mkdir()
    with pytest.raises(DataError, match=r"listops-1000 does hold them; pass that\.") as caught:
        prepare_data("listops", tmp_path / "data", source=inside)
    one_sentence(caught.value)


def sizes(train: int, dev: int, test: int, **more: int) -> dict[str, int]:
    return {"num_train": train, "num_dev": dev, "num_test": test, **more}


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "manifest.json"}


@pytest.mark.slow
def test_generated_set_is_equal_for_any_number_of_workers(tmp_path: Path) -> None:
    options = sizes(2100, 30, 20, seed=3)
    one = prepare_data("listops", tmp_path / "one", options=options, workers=1)
    two = prepare_data("listops", tmp_path / "two", options=options, workers=2)
    assert content(one.folder) == content(two.folder)
    assert one.manifest.checksum == two.manifest.checksum
    assert one.manifest.label == "listops (generated, partial: 2,150 of 100,000 examples)"
    assert [len(one.split(s)) for s in ("train", "dev", "test")] == [2100, 30, 20]
    assert one.split("dev").tokens(0).tobytes() == example(3, 2100)
    assert one.split("test").labels[19] == value_of(example(3, 2149))
    assert sorted(p.name for p in one.folder.parent.iterdir()) == [".listops.lock", "listops"]


def test_equal_examples_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmx.data.readers import listops as reader

    def forgetful(seed: int, index: int, attempt: int = 0) -> bytes:
        if index == 4 and attempt < 2:  # looks like example 1, twice
            index, attempt = 1, 0
        return example(seed, index, attempt)

    monkeypatch.setattr(reader, "example", forgetful)
    store = prepare_data("listops", tmp_path, options=sizes(6, 1, 1), workers=1)
    train = store.split("train")
    assert train.tokens(4).tobytes() == example(0, 4, 2)
    assert len({train.tokens(k).tobytes() for k in range(6)}) == 6
    assert store.manifest.parameters["redrawn"] == 2


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--num-dev must be at least 1"):
        prepare_data("listops", tmp_path, options=sizes(5, 0, 5))
    with pytest.raises(ConfigError, match="--render has no effect on listops"):
        prepare_data("listops", tmp_path, options={"render": "lra"})
    with pytest.raises(ConfigError, match="--workers 0"):
        prepare_data("listops", tmp_path, workers=0)


def test_prepared_set_is_kept_and_another_is_refused(tmp_path: Path) -> None:
    first = prepare_data("listops", tmp_path, options=sizes(5, 2, 2), workers=1)
    made = first.manifest.created
    assert (
        prepare_data("listops", tmp_path, options=sizes(5, 2, 2), workers=1).manifest.created
        == made
    )
    with pytest.raises(DataError, match=r"with sizes=.* instead of sizes=.*; pass --force"):
        prepare_data("listops", tmp_path, options=sizes(6, 2, 2), workers=1)
    with pytest.raises(DataError, match=r"with seed=0 instead of seed=1; pass --force"):
        prepare_data("listops", tmp_path, options=sizes(5, 2, 2, seed=1), workers=1)
    again = prepare_data("listops", tmp_path, options=sizes(5, 2, 2, seed=1), workers=1, force=True)
    assert again.manifest.checksum != first.manifest.checksum


def test_vocabulary_is_sorted_with_fifteen_tokens() -> None:
    assert list(VOCABULARY) == sorted(VOCABULARY)
    assert len(VOCABULARY) == 15
