"""Shards through the real scripts: every format against ids worked out here, a prepare that is cut off, runs,
mixtures, windows within documents, and files of nanoGPT and modded-nanogpt."""

import gzip
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Script, numbers

from llm.data import accelerated, documents, shard_worker
from llm.data.cutting import DocumentWindows, Windows
from llm.data.documents import divided, passages, read_documents
from llm.data.mixture import MIXED, Mixture
from llm.data.tokenizer import encode, load_tokenizer
from llm.data.tokens import Shard, ShardedTokens
from llm.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

RANDOM = random.Random(5)
LETTERS = ["to ", "be", " or", "\n", "é", "你好", "🙂", " 12", "don't", "  ", '"']
TEXTS = ["".join(RANDOM.choices(LETTERS, k=RANDOM.randrange(5, 400))).strip() + "." for _ in range(300)]
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
    """Units of 20 kB, of which these texts make several."""
    for name in ("divided", "divided_rows"):
        plain = getattr(documents, name)
        monkeypatch.setattr(f"llm.data.sharding.{name}", lambda what, size, plain=plain: plain(what, 20_000))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "dataset"])
def test_every_format_gives_the_same_tokens(script: Script, tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    source = "huggingface" if kind == "dataset" else "text"
    prepare(script, f"data={source}", f"data.path={path}", "shards.path=shards", "shards.workers=1")
    for split, tokens in expected().items():
        assert tokens_in(tmp_path / "shards", split) == tokens
    index = json.loads((tmp_path / "shards" / "index.json").read_text())["record"]
    for split, tokens in expected().items():
        assert sum(shard["tokens"] for shard in index[split]) == len(tokens)
        assert sum(shard["documents"] for shard in index[split]) == tokens.count(END)
        for shard in index[split]:
            content = (tmp_path / "shards" / shard["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    assert len(index["training"]) > 1 or "." in kind


@pytest.mark.usefixtures("small")
def test_a_prepare_that_was_cut_off_keeps_its_shards(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, by two processes; cut off in its third unit, damaged, and finished by one: the same bytes."""
    arguments = ["data=text", f"data.path={write(tmp_path, 'jsonl')}"]
    prepare(script, *arguments, "shards.path=whole", "shards.workers=2")
    finish, done = shard_worker.write_record, list[Path]()

    def killed(path: Path, *record: object) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        finish(path, *record)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_worker, "write_record", killed)
    alone = ["shards.path=cut", "shards.workers=1"]
    assert script("prepare", "tokenizer=bytes", "shards.validation=0.1", *arguments, *alone).returncode != 0
    monkeypatch.setattr(shard_worker, "write_record", finish)
    cut = tmp_path / "cut"
    kept = cut / "training-000000-000.bin"
    (cut / "training-000001-000.bin").write_bytes(b"damaged")
    before = kept.stat().st_mtime_ns
    assert "no shards" not in script("pretrain", *TINY, "data=shards", "data.path=cut").stderr  # half of them
    assert "training-000001-000.bin is damaged" in prepare(script, *arguments, *alone)
    assert kept.stat().st_mtime_ns == before
    assert contents(cut) == contents(tmp_path / "whole")


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
    ("arguments", "message"),
    [
        (["data.path=bad.jsonl"], 'bad.jsonl, line 2: each line must be a JSON object with a "text"'),
        (["data.path=cut.jsonl.gz"], "cut.jsonl.gz is damaged"),
        (["data.path=cut.jsonl.zst"], "cut.jsonl.zst"),
        (["data.path=bad.parquet"], "bad.parquet is damaged ("),
        (["data.path=t.parquet", "shards.column=body"], "has no column 'body': give shards.column=, one of"),
        (["data.path=latin.txt"], "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
        (["data.path=empty.txt"], "is empty"),
        (["data.path=t.jsonl", "shards.path=used"], "used holds other files"),
        (["data=huggingface", "data.path=./none"], "cannot load this dataset"),
    ],
)
def test_bad_texts_are_one_line(script: Script, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    for kind in ("jsonl.gz", "jsonl.zst", "parquet", "jsonl"):
        write(tmp_path, kind)
        (tmp_path / f"text.{kind}").rename(tmp_path / f"t.{kind}")
        (tmp_path / f"cut.{kind}").write_bytes((tmp_path / f"t.{kind}").read_bytes()[:-50])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
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


@pytest.fixture
def two_folders(script: Script, tmp_path: Path) -> None:
    for name, word in (("a", "to be "), ("b", "or not ")):
        texts = (json.dumps({"text": f"{number} {word}" * 40}) for number in range(60))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
        arguments = ["data=text", f"data.path={name}.jsonl", "tokenizer=bytes", f"shards.path={name}"]
        assert script("prepare", *arguments, "shards.validation=0.2").returncode == 0


@pytest.mark.usefixtures("two_folders", "no_pictures")
def test_runs_on_shards_resume_exactly(script: Script, tmp_path: Path) -> None:
    data = "data.mixture=[a:1,b:0.5]"
    run = [*TINY, "data=shards", data, "training.eval_freq=3", "schedule=constant"]
    whole = script("pretrain", *run, "training.max_steps=6", "hydra.run.dir=mixed")
    assert whole.returncode == 0, whole.stderr
    assert script("pretrain", *run, "training.max_steps=3", "hydra.run.dir=cut").returncode == 0
    again = script("pretrain", "resume=cut", "training.max_steps=6")
    assert again.returncode == 0, again.stderr
    losses = [[line.get("train/loss") for line in numbers(tmp_path / name)] for name in ("mixed", "cut")]
    assert [*filter(None, losses[0])] == [*filter(None, losses[1])]
    result = script("evaluate", "checkpoint=mixed")
    assert "validation split" in result.stdout
    run = [*TINY, "data=shards", "data.path=a", "training.max_steps=2", "data.cross_documents=false"]
    assert script("pretrain", *run, "hydra.run.dir=within").returncode == 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("header", [False, True])
def test_files_of_nanogpt_and_modded_nanogpt(script: Script, tmp_path: Path, header: bool) -> None:
    tokens = {
        split: np.array([*f"{split} be or not " * 300], "U1").view("<u4").astype("<u2") for split in "tv"
    }
    for split, part in (("train", "t"), ("val", "v")):
        name = f"fineweb_{split}_000001.bin" if header else f"{split}.bin"
        begin = np.zeros(256, "<i4")
        begin[:3] = 20240520, 1, len(tokens[part])
        (tmp_path / name).write_bytes((begin.tobytes() if header else b"") + tokens[part].tobytes())
    run = [*TINY, "data=shards", f"data.path={tmp_path}", "training.max_steps=2"]
    result = script("pretrain", *run, "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert f"{len(tokens['t']) / 1000:.3g}k training and" in result.stdout
    if header:
        with (tmp_path / "fineweb_val_000001.bin").open("ab") as file:
            file.write(b"xx")
        result = script("pretrain", *run)
        assert "fineweb_val_000001.bin is damaged: its header says" in result.stderr
    else:
        result = script("pretrain", *run, "data.cross_documents=false")
        assert "does not say where its documents end" in result.stderr


def test_a_run_needs_the_tokenizer_of_its_shards(script: Script, tmp_path: Path) -> None:
    prepare(script, "data=text", f"data.path={write(tmp_path, 'txt')}", "shards.path=s")
    for tokenizer in ("gpt2", "bpe"):
        result = script("pretrain", "data=shards", "data.path=s", f"tokenizer={tokenizer}")
        assert "s holds tokens of another tokenizer than" in result.stderr
        assert result.stderr.endswith(": give tokenizer=bytes\n")
    arguments = ["data=text", "data.path=text.txt", "shards.path=s", "tokenizer=gpt2"]
    assert "another text, or of other settings" in script("prepare", *arguments).stderr
