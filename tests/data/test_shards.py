"""Shards through the real scripts: every format against ids worked out here, a prepare that is cut off, runs,
mixtures, windows within documents, and files of nanoGPT and modded-nanogpt."""

import gzip
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TINY, Script, numbers

from llm.config import DataConfig
from llm.data import accelerated, documents, shard_worker
from llm.data.cutting import DocumentWindows, Windows
from llm.data.dataset import Dataset, load_dataset
from llm.data.documents import Part, divided, passages, read_documents
from llm.data.mixture import MIXED, Mixture
from llm.data.shards import shard_files
from llm.data.tokenizer import END_OF_TEXT, TOKENIZERS, encode, load_tokenizer
from llm.data.tokens import Shard, ShardedTokens
from llm.data.windows import TrainingBatches
from llm.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

RANDOM = random.Random(5)
LETTERS = ["to ", "be", " or", "\n", "é", "你好", "🙂", " 12", "don't", "  ", '"']
TEXTS = ["".join(RANDOM.choices(LETTERS, k=RANDOM.randrange(5, 400))).strip() + "." for _ in range(300)]
TEXTS[200] = "a document longer than a shard " * 1000
END = 256


def is_held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.1


def expected() -> dict[str, list[int]]:
    """The tokens of both splits, one document after the other: the bytes, and the end of text."""
    splits = dict[str, list[int]](training=[], validation=[])
    for text in TEXTS:
        splits["validation" if is_held_out(text) else "training"] += [*text.encode(), END]
    return splits


def tokens_in(folder: Path, split: str) -> list[int]:
    return [
        token for path in sorted(folder.glob(f"{split}-*.bin")) for token in np.fromfile(path, "<u2").tolist()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, key: text}).encode() + b"\n" for text in TEXTS)


def write(folder: Path, kind: str) -> Path:
    path = folder / f"text.{kind}"
    match kind:
        case "txt":
            path.write_text("<|endoftext|>".join(TEXTS))
        case "jsonl":
            path.write_bytes(lines())
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines()[:9999]) + gzip.compress(lines()[9999:]))  # two members
        case "jsonl.zst":
            compress = pyarrow.Codec("zstd").compress
            halves = (lines()[:9999], lines()[9999:])
            path.write_bytes(b"".join(compress(half).to_pybytes() for half in halves))
        case "parquet":
            table = pyarrow.table({"text": [None, *TEXTS]})
            parquet.write_table(table, path, row_group_size=70)
        case "dataset":
            pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    return path


def prepare(script: Script, *arguments: str) -> str:
    result = script("prepare", "tokenizer=bytes", "shards.validation=0.1", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units and shards of 20 kB, of which these texts make several."""
    job = shard_worker.Job
    monkeypatch.setattr("llm.data.sharding.Job", lambda *what: replace(job(*what), shard_bytes=20_000))
    for name in ("divided", "divided_rows"):
        plain = getattr(documents, name)
        monkeypatch.setattr(f"llm.data.sharding.{name}", lambda what, size, plain=plain: plain(what, 20_000))


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_has_the_same_documents(tmp_path: Path, kind: str) -> None:
    units = [*divided([write(tmp_path, kind)], 20_000)]
    assert [text for unit in units for part in unit for text in read_documents(part, "text")] == TEXTS
    assert len(units) > 1 or "." in kind


@pytest.mark.usefixtures("small")
def test_a_dataset_by_its_folder_configuration_and_split(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved by `save_to_disk`, and as on the hub: files, and a card that divides them."""
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path, "dataset").rename(tmp_path / "saved")
    card = "configs:\n- {config_name: %s, data_files: [{split: train, path: none.jsonl}]}\n"
    card += "- {config_name: plays, data_files: [{split: first, path: text.jsonl}]}"
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub", "jsonl")
    (tmp_path / "hub" / "none.jsonl").write_text(json.dumps({"text": "none"}))
    (tmp_path / "hub" / "README.md").write_text(f"---\n{card % 'none'}\n---\n")
    asked = ["shards.dataset_config=plays", "shards.dataset_split=first"]
    for name, arguments in (("saved", []), ("hub", asked)):
        options = ["data=huggingface", f"data.path={name}", f"shards.path=of_{name}", "shards.workers=1"]
        prepare(script, *options, *arguments)
        for split, tokens in expected().items():
            assert tokens_in(tmp_path / f"of_{name}", split) == tokens
    hub = str(tmp_path / "hub")
    with pytest.raises(UserError, match=r"one among the available configs: \['none', 'plays'\]"):
        load_dataset(Dataset(hub, None, "train"))
    with pytest.raises(UserError, match=r"Unknown split \"train\"\. Should be one of \['first'\]"):
        load_dataset(Dataset(hub, "plays", "train"))
    with pytest.raises(UserError, match=r"no column 'body': give shards\.column=, one of id, text"):
        [*read_documents(Part(hub, 0, 1, 1), "body", Dataset(hub, "plays", "first"))]
    with pytest.raises(UserError, match=r"split=test: .*saved was saved as one split: remove it"):
        load_dataset(Dataset(str(tmp_path / "saved"), None, "test"))


def test_a_hub_out_of_reach_is_one_line(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as without a network, but at once
    result = script("prepare", "data=huggingface", "data.path=some/stories", "shards.path=x")
    assert "data.path=some/stories: no such folder here, and Hugging Face's hub cannot be" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("small", "no_pictures")
def test_a_run_on_a_folder_that_grows_stays_on_its_shards(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prepare is cut off in its third shard, and damaged; a run begins on the first ones, beside a whole
    folder; the prepare is finished, with the bytes that another had by two processes; the run goes on."""
    first, second = b"".join(lines().splitlines(True)[:150]), b"".join(lines().splitlines(True)[150:])
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.jsonl.gz").write_bytes(gzip.compress(first))
    (tmp_path / "texts" / "2.jsonl").write_bytes(second)
    text = "data.path=texts"
    prepare(script, "data=text", text, "shards.path=whole", "shards.workers=2")
    for split, tokens in expected().items():
        assert tokens_in(tmp_path / "whole", split) == tokens
        index = json.loads((tmp_path / "whole" / "index.json").read_text())["record"]
        assert sum(shard["documents"] for shard in index[split]) == tokens.count(END)
        assert len(index[split]) > 3
        for shard in index[split]:
            content = (tmp_path / "whole" / shard["file"]).read_bytes()
            assert len(content) == 2 * shard["tokens"]
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]

    finish, done = shard_worker.write_record, list[Path]()

    def killed(path: Path, *record: object) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        finish(path, *record)  # type: ignore[arg-type]

    begin = ["prepare", "tokenizer=bytes", "shards.validation=0.1", "data=text", text]
    alone = ["shards.path=grows", "shards.workers=1"]
    run = [*TINY, "data=shards", "data.mixture=[grows:1,whole:0.5]", "training.eval_freq=3"]
    run += ["schedule=constant"]
    with monkeypatch.context() as patch:
        patch.setattr(shard_worker, "write_record", killed)
        assert script(*begin, *alone).returncode != 0
    refused = script(*begin, *alone, "shards.column=id")
    assert "of other settings: give another folder" in refused.stderr
    part = script("pretrain", *run, "training.max_steps=3", "hydra.run.dir=part")
    assert part.returncode == 0, part.stderr
    assert "grows is still being written: 35.3k training tokens in the first 2 shards are used" in part.stdout

    grows = tmp_path / "grows"
    kept = grows / "training-000000-000.bin"
    before = kept.stat().st_mtime_ns
    (grows / "training-000000-001.bin").write_bytes(b"damaged")
    assert "training-000000-001.bin is damaged" in prepare(script, "data=text", text, *alone)
    assert kept.stat().st_mtime_ns == before
    assert contents(grows) == contents(tmp_path / "whole")

    resumed = script("pretrain", "resume=part", "training.max_steps=6")
    assert resumed.returncode == 0, resumed.stderr
    counts = f"data.shards=[2,{len(index['training'])}]"
    at_once = script("pretrain", *run, counts, "training.max_steps=6", "hydra.run.dir=at_once")
    assert at_once.returncode == 0, at_once.stderr
    assert "still being written" not in at_once.stdout
    losses = [[line.get("train/loss") for line in numbers(tmp_path / name)] for name in ("at_once", "part")]
    assert [*filter(None, losses[0])] == [*filter(None, losses[1])]
    assert "data.shards=[9, 9] (it is [2, " in script("pretrain", "resume=part", "data.shards=[9,9]").stderr
    for folder, shards, message in (
        ("whole", [99], r"whole has \d+ of the 99 shards asked for"),
        ("whole", [1, 2], "one count for each folder, of which there are 1"),
    ):
        data = DataConfig(source="shards", path=str(tmp_path / folder), shards=shards)
        with pytest.raises(UserError, match=message):
            shard_files(data, load_tokenizer("bytes"))
    assert "validation split" in script("evaluate", "checkpoint=at_once").stdout


def test_ids_that_differ_end_the_use_of_gigatoken(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shard_worker, "accelerated", lambda tokenizer: lambda text: np.array([1, 2], np.uint32)
    )
    out = prepare(script, "data=text", f"data.path={write(tmp_path, 'jsonl')}", "shards.path=s")
    assert "gigatoken gave other ids than tiktoken" in out
    assert tokens_in(tmp_path / "s", "training") == expected()["training"]


def test_gigatoken_gives_the_ids_of_tiktoken() -> None:
    pytest.importorskip("gigatoken")
    tokenizer = load_tokenizer("gpt2")
    encode_fast = accelerated.accelerated(tokenizer)
    assert encode_fast is not None
    for text in [*TEXTS, "a<|endoftext|> b", "x\r\n\r\n  y", "\u3000\u00a0 '\u017f", "I'LL 'll"]:
        assert encode_fast(text).tolist() == encode(text, tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad.jsonl", r'bad\.jsonl, line 2: each line must be a JSON object with a "text"'),
        ("cut.jsonl.gz", r"cut\.jsonl\.gz is damaged \(Compressed file ended before .*: copy or download it"),
        ("bad.txt.gz", r"bad\.txt\.gz is damaged \(Not a gzipped file"),
        ("cut.jsonl.zst", r"cut\.jsonl\.zst is damaged \(Truncated compressed stream\)"),
        ("bad.parquet", r"bad\.parquet is damaged \(Parquet file size is 4 bytes"),
        ("latin.parquet", r"latin\.parquet is damaged \('utf-8' codec can't decode byte 0xe9"),
        ("t.parquet", r"has no column 'text': give shards\.column=, one of body, number"),
        ("latin.txt", r"latin\.txt is not UTF-8: byte 0xe9 at offset 3; convert the file"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / name
    match name.split(".", 1):
        case ["cut", kind]:
            path.write_bytes(write(tmp_path, kind).read_bytes()[:-50])
        case ["bad", "jsonl"]:
            path.write_text('{"text": "a"}\n{"body": "b"}\n')
        case ["latin", "parquet"]:
            buffers = [None, *map(pyarrow.py_buffer, (np.array([0, 4], "<i4").tobytes(), b"caf\xe9"))]
            column = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
            parquet.write_table(pyarrow.table({"text": column}), path)
        case ["t", "parquet"]:
            parquet.write_table(pyarrow.table({"body": ["a"], "number": [1]}), path)
        case _:
            path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=message) as raised:
        [*read_documents(next(divided([path], 10**6))[0], "text")]
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("small")
def test_a_fault_that_one_of_two_processes_meets_is_one_line(script: Script, tmp_path: Path) -> None:
    rows = lines().splitlines(True)
    rows[250] = b'{"text": "no end\n'
    (tmp_path / "broken.jsonl").write_bytes(b"".join(rows))
    options = ["data=text", "data.path=broken.jsonl", "shards.path=s", "shards.workers=2", "tokenizer=bytes"]
    result = script("prepare", *options)
    assert result.returncode == 1
    assert result.stderr.startswith("error: broken.jsonl, line 251: each line must be a JSON object")
    assert result.stderr.count("\n") == 1
    assert not [*(tmp_path / "s").glob(".*.tmp")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=empty.txt"], "is empty"),
        (["data.path=text.txt", "shards.path=used"], "used holds other files"),
        (["data=huggingface", "data.path=./none"], "data.path=./none: no such folder"),
    ],
)
def test_bad_texts_are_one_line(script: Script, tmp_path: Path, arguments: list[str], message: str) -> None:
    write(tmp_path, "txt")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    result = script("prepare", "data=text", "tokenizer=bytes", "shards.path=s", *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_part_has_the_lines_that_begin_in_it(tmp_path: Path) -> None:
    for kind in ("jsonl", "txt"):
        path = write(tmp_path, kind)
        for size in (997, 5_000, 10**6):
            parts = [part for unit in divided([path], size) for part in unit]
            assert [text for part in parts for text in read_documents(part, "text")] == TEXTS


def test_a_long_text_is_cut_at_lines_however_it_is_read() -> None:
    text = "".join(f"{number} bottles of beer on the wall\n" for number in range(9_000)) + "x" * 150_000
    cut = [*passages([text])]
    assert "".join(cut) == text
    assert max(map(len, cut)) <= documents.PASSAGE_CHARACTERS
    assert all(passage.endswith("\n") for passage in cut[:4])
    for size in (1_000, 70_001):
        assert [*passages(text[start : start + size] for start in range(0, len(text), size))] == cut


def sharded(tmp_path: Path, tokens: np.ndarray, counts: list[int]) -> ShardedTokens:
    shards = []
    for number, part in enumerate(np.split(tokens.astype("<u2"), np.cumsum(counts)[:-1])):
        part.tofile(tmp_path / f"{number}.bin")
        ends = np.flatnonzero(part == 0) + 1
        ends.astype("<i8").tofile(tmp_path / f"{number}.documents")
        shards.append(
            Shard(tmp_path / f"{number}.bin", len(part), np.dtype("<u2"), 0, tmp_path / f"{number}.documents")
        )
    return ShardedTokens(shards, 60_000)


def test_shards_are_read_as_one_array(tmp_path: Path) -> None:
    tokens = np.arange(1, 1001)
    joined = sharded(tmp_path, tokens, [10, 1, 500, 489])
    assert len(joined) == 1000
    for place in (slice(0, 3), slice(5, 900), slice(990, 5000), slice(7, 7), slice(None, 12)):
        assert joined[place].tolist() == tokens[place].tolist()
    one, many = Windows(tokens, 16, 5, 3), Windows(joined, 16, 5, 3)
    assert len(one) == len(many)
    indices = torch.arange(len(one))
    for ours, wanted in zip(many.batch(indices), one.batch(indices), strict=True):
        assert ours.equal(wanted)
    joined.vocab_size = 900
    with pytest.raises(UserError, match=r"3\.bin holds the token id \d+, and the tokenizer has 900"):
        many.batch(indices)


def test_windows_within_documents(tmp_path: Path) -> None:
    lengths = [3, 9, 10, 17, 18, 40, 1]
    tokens = np.concatenate([[*range(1 + 100 * n, 100 * n + length), 0] for n, length in enumerate(lengths)])
    windows = DocumentWindows(sharded(tmp_path, tokens, [12, 27, 59]), 8, 8)
    inputs, targets = windows.batch(torch.arange(len(windows)))
    rows = torch.cat([inputs, targets[:, -1:]], 1).tolist()
    wanted, start = [], 0
    for length in lengths:
        document = tokens[start : start + length].tolist()
        start += length
        begins = sorted({*range(0, length - 9, 8), length - 9}) if length >= 9 else []
        wanted += [document[begin : begin + 9] for begin in begins]
    assert rows == wanted
    assert windows.covered == sum(length for length in lengths if length > 8)


def test_a_mixture_has_each_source_by_its_weight_and_starts_anywhere() -> None:
    sources = [
        Windows(np.arange(size, dtype=np.int64) + base, 4, 4) for size, base in ((4001, 0), (801, 9000))
    ]
    mixture = Mixture(np.empty(0), [*sources], [3.0, 1.0], seed=7, shift=False)
    places = torch.arange(8 * MIXED)
    starts = mixture.batch(places)[0][:, 0]
    for block in range(8):
        assert (starts[block * MIXED : (block + 1) * MIXED] >= 9000).sum() == MIXED // 4
    for source, (base, windows) in enumerate(zip((0, 9000), sources, strict=True)):
        of_source, numbers = mixture.drawn(places.numpy())
        [chosen] = np.nonzero(of_source == source)
        assert sorted(numbers[chosen]) == [*range(len(chosen))]
        passes = [
            starts[chosen[numbers[chosen] // len(windows) == number]].tolist()
            for number in range(len(chosen) // len(windows))
        ]
        assert len(passes) > 1
        for each in passes:  # each window once, in another order each time
            assert sorted(each) == [*range(base, base + 4 * len(windows), 4)]
        assert passes[0] != passes[1]
    assert mixture.batch(places[5000:5016])[0][:, 0].equal(starts[5000:5016])
    assert not mixture.batch(places[:64])[0].equal(
        Mixture(np.empty(0), [*sources], [3.0, 1.0], 8, False).batch(places[:64])[0]
    )


def test_each_window_once_an_epoch_and_in_another_order_each() -> None:
    windows = Windows(np.arange(4001, dtype=np.int64), 4, 4)
    config = DataConfig(source="shards", batch_size=10)
    batches = TrainingBatches(Mixture(windows.tokens, [windows], [1.0], 5, False), config, 5)
    epochs = [[start for _ in range(100) for start in next(batches)[0][:, 0].tolist()] for _ in range(3)]
    for starts in epochs:
        assert sorted(starts) == [*range(0, 4000, 4)]
    for one, other in ((epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], sorted(epochs[0]))):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 8  # 1 is expected
    for starts in epochs:  # neighbours come from anywhere: of 1,000 things, a third of them lies between two
        assert np.abs(np.diff(starts)).mean() / 4 == pytest.approx(1000 / 3, rel=0.1)


def test_ids_beyond_16_bits(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer of the bytes and all pairs of them; and mixed with a file of 16 bits."""
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *pairs])}
    end = {END_OF_TEXT: len(ranks)}
    wide = tiktoken.Encoding("wide", pat_str=r"..?|\n", mergeable_ranks=ranks, special_tokens=end)
    monkeypatch.setitem(TOKENIZERS, "wide", lambda: wide)
    path = write(tmp_path, "txt")
    options = ["data=text", f"data.path={path}", "shards.path=s", "tokenizer.name=wide", "shards.workers=1"]
    prepare(script, *options)
    ids = [token for text in TEXTS if not is_held_out(text) for token in [*wide.encode(text), len(ranks)]]
    assert np.fromfile(tmp_path / "s" / "training-000000-000.bin", "<u4").tolist() == ids
    foreign(tmp_path / "foreign", header=True)
    mixture = [f"{tmp_path}/s:1", f"{tmp_path}/foreign:1"]
    tokens = shard_files(DataConfig(source="shards", mixture=mixture), wide)[0].ids
    assert tokens[: len(ids) + 2].tolist() == [*ids, ord("t"), ord(" ")]
    inputs, targets = Windows(tokens, 8, 8).batch(torch.tensor([1, len(ids) // 8]))
    assert inputs[0].tolist() == ids[8:16]
    assert targets[1].tolist() == tokens[len(ids) // 8 * 8 + 1 :][:8].tolist()


def foreign(folder: Path, header: bool, *numbers: int) -> dict[str, np.ndarray]:
    """The files of nanoGPT, or with headers, of modded-nanogpt; returns their tokens."""
    tokens = {
        split: np.array([*f"{split[0]} be or not " * 300], "U1").view("<u4").astype("<u2")
        for split in ("train", "val")
    }
    folder.mkdir(exist_ok=True)
    for split, ids in tokens.items():
        begin = np.zeros(256, "<i4")
        begin[:3] = 20240520, 1, len(ids)
        begin[: len(numbers)] = numbers
        name = f"fineweb_{split}_000001.bin" if header else f"{split}.bin"
        (folder / name).write_bytes((begin.tobytes() if header else b"") + ids.tobytes())
    return tokens


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("header", [False, True])
def test_files_of_nanogpt_and_modded_nanogpt(script: Script, tmp_path: Path, header: bool) -> None:
    tokens = foreign(tmp_path / "d", header)
    data = DataConfig(source="shards", path=str(tmp_path / "d"))
    for file, wanted in zip(shard_files(data, load_tokenizer("bytes")), tokens.values(), strict=True):
        assert file.ids[:].tolist() == wanted.tolist()
    run = [*TINY, "data=shards", "data.path=d", "training.max_steps=1"]
    if header:
        assert script("pretrain", *run).returncode == 0
    else:
        result = script("pretrain", *run, "data.cross_documents=false")
        assert "does not say where its documents end" in result.stderr
        (tmp_path / "d" / "train.bin").write_bytes(np.full(5_000, 300, "<u2").tobytes())
        result = script("pretrain", *run, "hydra.run.dir=run")
        assert "train.bin holds the token id 300, and the tokenizer has 257: give the tok" in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("numbers", "end", "message"),
    [
        ((20240520, 2), None, r"val_000001\.bin: version 2 of its format is unknown; version 1 is read"),
        ((20240801, 7), None, r"val_000001\.bin begins with a header of another format \(number 20240801\)"),
        ((), -2, r"val_000001\.bin is damaged: its header says 3,600 tokens, and its size says otherwise"),
        ((), 2000, r"val_000001\.bin is damaged: its header says"),
        ((1, 1, 1, 1, 1), -1, r"val_000001\.bin is damaged: a file of uint16 has an even number of bytes"),
    ],
)
def test_other_files_than_these_are_one_line(
    tmp_path: Path, numbers: tuple[int, ...], end: int | None, message: str
) -> None:
    foreign(tmp_path, True, *numbers)
    [file] = tmp_path.glob("*_val_*")
    file.write_bytes(file.read_bytes()[:end])
    foreign_train = next(tmp_path.glob("*_train_*"))
    foreign_train.write_bytes(np.ones(3000, "<u2").tobytes())
    with pytest.raises(UserError, match=message):
        shard_files(DataConfig(source="shards", path=str(tmp_path)), load_tokenizer("bytes"))


def test_a_run_needs_the_tokenizer_of_its_shards(script: Script, tmp_path: Path) -> None:
    prepare(script, "data=text", f"data.path={write(tmp_path, 'txt')}", "shards.path=s")
    result = script("pretrain", "data=shards", "data.path=s", "tokenizer=bpe")
    assert "s holds tokens of another tokenizer than a learnt one of 4,096 tokens" in result.stderr
    assert result.stderr.endswith(": give tokenizer=bytes\n")
    with pytest.raises(UserError, match="of another tokenizer than gpt2: give tokenizer=bytes"):
        shard_files(DataConfig(source="shards", path=str(tmp_path / "s")), load_tokenizer("gpt2"))
    (tmp_path / "s" / "index.json").unlink()  # as before the first shard
    for tokenizer in ("bytes", "bpe"):
        result = script("pretrain", "data=shards", "data.path=s", f"tokenizer={tokenizer}")
        assert "s has no shard yet, or its index is damaged: wait for the first shard" in result.stderr
