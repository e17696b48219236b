"""Weights in and out, against transformers, tokenizers and torch themselves; hostile files are refused."""

import hashlib
import json
import os
import re
import resource
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from conftest import Script
from omegaconf import OmegaConf
from parts import CPU
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer

from llm.checkpoints.book import BOOKS_HEADS, export_book
from llm.checkpoints.huggingface import export_huggingface
from llm.checkpoints.opening import open_weights, tokenizer_of
from llm.checkpoints.training_state import TrainingState
from llm.checkpoints.weights import build_model, check_shapes, without_wrappers
from llm.checkpoints.writing import CheckpointWriter, Snapshot
from llm.commands.evaluate import run_evaluation
from llm.commands.export import export_checkpoint
from llm.config import (
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
)
from llm.data.tokenizer import encode, fingerprint, load_tokenizer
from llm.errors import UserError
from llm.model.gpt import GPTModel
from llm.training.optimizers import build_optimizers
from llm.training.start import keys_unlike_default, with_weights

pytestmark = pytest.mark.usefixtures("no_pictures")

IDS = torch.tensor([[1, 5, 2, 90, 11, 3], [7, 7, 0, 98, 4, 60]])
HARD_TEXT = (
    "Hello  world\n\n\n  It's 12345 o'clock, ain't it?\tnaïve café — 日本語 🙂👩‍👩‍👧 \u00a0 x\r\n"
    "<|endoftext|>  \n don't WE'LL we'll     \n\t end \ufffd\u200b١٢٣ "
)


def hugging_face_gpt2(**settings: Any) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4, **settings}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for parameter in model.parameters():  # biases and LayerNorms too, which transformers begins at 0 and 1
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def our_model(folder: str | Path) -> GPTModel:
    source = open_weights(str(folder))
    return build_model(source)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_layer": 1, "n_head": 1},
        {"tie_word_embeddings": False},
        {"n_embd": 48, "activation_function": "gelu_pytorch_tanh"},
    ],
)
@torch.no_grad()
def test_weights_of_transformers_give_its_logits(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = hugging_face_gpt2(**settings)
    theirs.save_pretrained(tmp_path)
    ours = our_model(tmp_path)
    assert ours.config.tie_weights == settings.get("tie_word_embeddings", True)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_shards_half_precision_and_plain_names_load_too(tmp_path: Path) -> None:
    theirs = hugging_face_gpt2()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(our_model(tmp_path / "shards")(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    # OpenAI's own on the hub: names without the prefix, and the causal mask among them
    theirs.save_pretrained(tmp_path / "plain")
    plain = theirs.transformer.state_dict() | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    save_file({k: v.contiguous() for k, v in plain.items()}, tmp_path / "plain" / "model.safetensors")
    torch.testing.assert_close(our_model(tmp_path / "plain")(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    theirs.half().save_pretrained(tmp_path / "half")
    torch.testing.assert_close(our_model(tmp_path / "half")(IDS), theirs.float()(IDS).logits)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("tie_weights", [False, True])
@torch.no_grad()
def test_transformers_opens_an_export(tmp_path: Path, qkv_bias: bool, tie_weights: bool) -> None:
    torch.manual_seed(1)
    ours = GPTModel(ModelConfig(300, 16, 32, 4, 2, 0.2, qkv_bias=qkv_bias, tie_weights=tie_weights)).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    export_huggingface(ours, "bytes", tmp_path / "export")
    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    theirs, report = opened
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS), atol=1e-5, rtol=1e-5)
    back = open_weights(str(tmp_path / "export"))
    assert load_tokenizer(tokenizer_of(back)).name == "bytes"
    assert back.model.tie_weights == tie_weights
    assert back.model.drop_rate == 0.2
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.tensors[name], tensor), name


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_exported_tokenizer_gives_the_same_ids(tmp_path: Path, name: str) -> None:
    encoding = load_tokenizer(name)
    export_huggingface(GPTModel(ModelConfig(encoding.n_vocab, 8, 8, 1, 1)), name, tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in (HARD_TEXT, *HARD_TEXT.split("\n"), Path(__file__).read_text("utf-8")):
        ids = encoding.encode(text, allowed_special="all")
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == encoding.eot_token
    again = load_tokenizer(str(tmp_path / "export"))  # so that texts need not be tokenised for it again
    assert (again.name, fingerprint(again)) == (name, fingerprint(encoding))


class BooksAttention(torch.nn.Module):
    """The parameters of the book's MultiHeadAttention, and its buffer, in its order."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        for name in ("W_query", "W_key", "W_value"):
            setattr(self, name, torch.nn.Linear(width, width, bias=False))
        self.out_proj = torch.nn.Linear(width, width)
        self.register_buffer("mask", torch.triu(torch.ones(context, context), diagonal=1))


def books_model(config: ModelConfig) -> GPTModel:
    """Ours with the buffers that the book's has; a head of its own."""
    model = GPTModel(config)
    for block in model.trf_blocks:
        block.att = BooksAttention(config.emb_dim, config.context_length)
    return model


BOOK = ModelConfig(40, 8, 64, 1, 2, tie_weights=False)


def train_one_step(model: GPTModel) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def test_the_books_two_files_load(tmp_path: Path) -> None:
    book = books_model(BOOK)
    optimizer = train_one_step(book)
    torch.save(book.state_dict(), tmp_path / "model.pth")
    both = {"model_state_dict": book.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save(both, tmp_path / "model_and_optimizer.pth")
    for name in ("model.pth", "model_and_optimizer.pth"):
        source = open_weights(str(tmp_path / name), n_heads=1)
        assert source.model == ModelConfig(40, 8, 64, 1, 2, tie_weights=False)
        check_shapes(GPTModel(BOOK), source.tensors, name)
        assert all(torch.equal(tensor, book.state_dict()[key]) for key, tensor in source.tensors.items())
    assert source.optimizer_state
    for key, parameter in book.named_parameters():
        assert torch.equal(
            torch.as_tensor(source.optimizer_state[key]["exp_avg"]), optimizer.state[parameter]["exp_avg"]
        )
    ours = GPTModel(BOOK)
    build_optimizers(ours, OptimizerConfig(name="adamw"), CPU).load_state(
        ours, source.optimizer_state, "here"
    )


def test_the_books_two_files_are_written(tmp_path: Path) -> None:
    ours = GPTModel(BOOK)
    optimizers = build_optimizers(ours, OptimizerConfig(name="adamw", weight_decay=0.1), CPU)
    ours(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    optimizers.step()
    export_book(ours, "bytes", tmp_path / "book", optimizers.state(ours), OptimizerConfig(name="adamw"))
    book = books_model(BOOK)  # and so does the book read them
    optimizer = torch.optim.AdamW(book.parameters(), lr=5e-4, weight_decay=0.1)
    saved = torch.load(tmp_path / "book" / "model_and_optimizer.pth", weights_only=True)
    assert list(saved["model_state_dict"]) == list(book.state_dict())
    book.load_state_dict(saved["model_state_dict"])
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    for name, parameter in book.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))
        average = torch.as_tensor(optimizers.state(ours)[name]["exp_avg"])
        assert torch.equal(optimizer.state[parameter]["exp_avg"], average)
    plain = torch.load(tmp_path / "book" / "model.pth", weights_only=True)
    assert all(torch.equal(tensor, saved["model_state_dict"][name]) for name, tensor in plain.items())


def test_a_tied_model_continues_in_the_book(tmp_path: Path) -> None:
    ours = GPTModel(ModelConfig(40, 8, 64, 1, 2, tie_weights=True))
    optimizers = build_optimizers(ours, OptimizerConfig(name="adamw"), CPU)
    ours(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    optimizers.step()
    state = optimizers.state(ours)
    export_book(ours, "bytes", tmp_path / "book", state, OptimizerConfig(name="adamw"))
    book = books_model(BOOK)
    optimizer = torch.optim.AdamW(book.parameters(), lr=5e-4)
    saved = torch.load(tmp_path / "book" / "model_and_optimizer.pth", weights_only=True)
    book.load_state_dict(saved["model_state_dict"])
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    embeddings, head = book.tok_emb.weight, book.head_weight
    before = torch.as_tensor(state["tok_emb.weight"]["exp_avg"])
    assert torch.equal(optimizer.state[head]["exp_avg"], before)
    head.grad = torch.ones_like(head)
    optimizer.step()  # moves the head's averages, and the embeddings' not with them
    assert torch.equal(optimizer.state[embeddings]["exp_avg"], before)
    assert not torch.equal(optimizer.state[head]["exp_avg"], before)
    assert [optimizer.state[weight]["step"].item() for weight in (embeddings, head)] == [1, 2]


@pytest.mark.parametrize("room", [1000, 200_000])
def test_a_disk_that_fills_up_leaves_no_export(tmp_path: Path, room: int) -> None:
    model = GPTModel(ModelConfig(300, 16, 128, 2, 2))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (
        lambda: export_huggingface(model, "bytes", tmp_path / "export"),
        lambda: export_book(model, "bytes", tmp_path / "export", None, OptimizerConfig()),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))  # no file can be longer
        try:
            with pytest.raises(UserError, match=r"^cannot write .*export: .*File too large.*$"):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert not list(tmp_path.iterdir())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A hub on this machine's own interface, with two repositories; gives its address."""
    served = tmp_path / "served"
    hugging_face_gpt2().save_pretrained(served / "someone" / "small")
    hugging_face_gpt2().save_pretrained(served / "openai-community" / "gpt2")
    commit = {
        "someone": "a" * 40,
        "openai-community": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    }

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            asked = re.fullmatch(r"/([\w-]+)/(\w+)/resolve/(\w+)/(\S+)", self.path)
            owner, repository, revision, name = asked.groups() if asked else ("", "", "", "")
            file = served / owner / repository / name
            if revision not in ("main", commit.get(owner)) or not file.exists():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header(
                    "X-Repo-Commit", commit.get(owner, "")
                )  # so that it is kept that it is not there
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit[owner])
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                if (served / "cut").exists():
                    self.wfile.write(content[:10])
                    self.close_connection = True
                    return
                if name == "model.safetensors" and (served / "tamper").exists():
                    content = content[:-1] + bytes([content[-1] ^ 1])
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


OpenFrom = Callable[[str | None, str], str]


@pytest.fixture
def open_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenFrom:
    """What is said of a name at the hub of an address (None: one that nobody listens at), with a cache of the
    test's own."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    pauses = SimpleNamespace(sleep=lambda seconds: None)  # between tries to download again
    monkeypatch.setattr(huggingface_hub.file_download, "time", pauses)

    def open_it(address: str | None, name: str) -> str:
        endpoint = address or "http://127.0.0.1:9"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # made of it at the import
        try:
            source = open_weights(name)
        except UserError as error:
            return f"error: {error}"
        return f"{source.origin} {source.tensors['tok_emb.weight'].sum().item()}"

    return open_it


def test_weights_come_from_the_hub_by_name_and_then_from_its_cache(hub: str, open_from: OpenFrom) -> None:
    total = hugging_face_gpt2().transformer.wte.weight.sum().item()
    for address in (hub, None):  # then with nothing to reach
        for name in ("someone/small", f"someone/small@{'a' * 40}"):
            assert open_from(address, name) == f"someone/small at revision {'a' * 40} {total}"
    line = open_from(None, "someone/else")
    assert line.startswith("error: someone/else is no file or folder here, and")
    assert "cannot be reached: give a local folder" in line
    assert "\n" not in line
    assert open_from(hub, "someone/none").startswith("error: someone/none is not available")


def test_tokenizers_come_from_the_hub_too(tmp_path: Path, hub: str, open_from: OpenFrom) -> None:
    for address in (hub, None):  # that there is none is kept in the cache as well
        open_from(address, "someone/small")
        with pytest.raises(UserError, match="does not say which tokenizer it was trained with"):
            tokenizer_of(open_weights("someone/small"))
    shutil.rmtree(tmp_path / "hub-cache")
    served = tmp_path / "served" / "someone" / "small"
    shutil.rmtree(served)
    _, tokenizer = theirs_with_its_own_tokenizer(served)
    for address in (hub, None):
        open_from(address, "someone/small")
        ours = load_tokenizer(tokenizer_of(open_weights("someone/small")))
        assert encode(TRAINED_ON, ours) == tokenizer.encode(TRAINED_ON)


def test_other_layouts_than_gpt2s_come_from_the_hub(tmp_path: Path, hub: str, open_from: OpenFrom) -> None:
    served = tmp_path / "served" / "someone" / "small"
    shutil.rmtree(served)
    sizes: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=48))
    llama.save_pretrained(served)
    total = llama.model.embed_tokens.weight.sum().item()
    assert open_from(hub, "someone/small") == f"someone/small at revision {'a' * 40} {total}"


def test_what_is_not_the_hubs_is_refused(tmp_path: Path, hub: str, open_from: OpenFrom) -> None:
    # a file under OpenAI's name and revision that is not OpenAI's
    assert "is not what the hub has (its SHA-256 differs)" in open_from(hub, "gpt2")
    (tmp_path / "served" / "tamper").touch()  # what arrives is not what was announced
    line = open_from(hub, "someone/small")
    assert "is not what the hub has (its SHA-256 differs): delete it and try again" in line
    (tmp_path / "served" / "tamper").unlink()
    assert open_from(hub, "someone/small") == line
    Path(line.removeprefix("error: ").partition(" is not")[0]).unlink()
    assert open_from(hub, "someone/small").startswith("someone/small at revision")


def test_a_connection_lost_on_the_way_is_one_line(tmp_path: Path, hub: str, open_from: OpenFrom) -> None:
    (tmp_path / "served" / "cut").touch()
    line = open_from(hub, "someone/small")
    assert line.startswith("error: someone/small is not available from Hugging Face's hub: ")
    assert "\n" not in line
    (tmp_path / "served" / "cut").unlink()
    assert open_from(hub, "someone/small").startswith("someone/small at revision")


class _Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("bomb-went-off",)


def refused(path: str | Path, n_heads: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        open_weights(str(path), n_heads)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("model_type", "bert", "model_type=bert is not supported"),
        ("activation_function", "relu", "activation_function=relu is not supported"),
        ("n_inner", 7, "n_inner=7 is not supported"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("reorder_and_upcast_attn", True, "reorder_and_upcast_attn=True is not supported"),
        ("model_type", "a\nb\x1b[2J", "model_type=a\\nb\\x1b[2J is not supported"),
        ("tiktoken_encoding", ["gpt2"], "tiktoken_encoding=['gpt2'] is not the name of an encoding"),
        ("tiktoken_encoding", "a\nb", "tiktoken_encoding=a\\nb is not the name of an encoding"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon=1e-06 is not supported"),
        ("n_layer", 10**4, "config.json says n_layer=10000, and the weights have 3"),
        ("n_embd", 10**6, "wte.weight has shape (99, 32), and the config's model wants (99, 1000000)"),
        ("n_head", 5, "model.emb_dim=32 cannot be divided evenly among model.n_heads=5 heads"),
        ("n_embd", "wide", "n_embd=wide is no whole number"),
        ("n_layer", 0, "model.n_layers=0: must be at least 1"),
        ("vocab_size", None, "vocab_size=None is no whole number"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, key: str, value: object, line: str) -> None:
    hugging_face_gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    assert line in refused(tmp_path)


def test_hostile_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    hugging_face_gpt2().save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    for content in (b"", weights[:1000], weights[:-1], b"\xff" * 8 + weights[8:], b"PK\x03\x04" * 100):
        (folder / "model.safetensors").write_bytes(content)
        assert "is damaged or of another format" in refused(folder)
    torch.save(_Bomb(), folder / "model.safetensors")
    assert "is damaged or of another format" in refused(folder)
    for outside in ("../../etc/passwd", "/etc/passwd", "sub/x", ".."):
        (folder / "model.safetensors").unlink(missing_ok=True)
        index = {"weight_map": {"transformer.wte.weight": outside}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert f"names {outside}, which is not a file of its folder" in refused(folder)
    for text in ('{"weight_map": [1]}', "[" * 200_000):
        (folder / "model.safetensors.index.json").write_text(text)
        assert "is damaged or of another format" in refused(folder)
    (folder / "model.safetensors.index.json").unlink()
    torch.save(_Bomb(), folder / "pytorch_model.bin")
    assert "holds its weights as a pickle, which can run code" in refused(folder)
    (folder / "config.json").unlink()
    assert "holds its weights as a pickle, which can run code" in refused(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "holds no model.safetensors; give a run or checkpoint folder, a folder in" in refused(folder)
    (folder / "model.safetensors").write_bytes(weights)
    for content in (b"", b"[1, 2]", b"{", b"\xff", b"[" * 200_000):
        (folder / "config.json").write_bytes(content)
        assert "config.json cannot be read" in refused(folder)
    assert not (tmp_path / "bomb-went-off").exists()


def test_missing_and_surplus_tensors_are_named(tmp_path: Path) -> None:
    hugging_face_gpt2().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "surprise": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "surprise has shape (1,), and the config's model wants nothing" in refused(tmp_path)
    save_file({**tensors, "sur\nprise": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "sur\\nprise has shape (1,), and the config's model wants nothing" in refused(tmp_path)
    name = "transformer.wte.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "model.safetensors")
    assert "transformer.wte.weight is of torch.int8, and not of floating-point numbers" in refused(tmp_path)
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "ln_f.bias has shape nothing, and the config's model wants (32,)" in refused(tmp_path)


def test_hostile_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    torch.save({"tok_emb.weight": _Bomb()}, path)
    assert "holds more than tensors, which could run code" in refused(path)
    assert refused(path).endswith("not opened, for its posix.mkdir; of a model, save model.state_dict()")
    torch.save({"tok_emb.weight": _Bomb()}, path, _use_new_zipfile_serialization=False)
    assert "an older one is a plain pickle, which can run code" in refused(path)
    state = books_model(BOOK).state_dict()
    torch.save({**state, "tok_emb.weight": torch.zeros(1).expand(10**9, 64)}, path)
    assert "tok_emb.weight claims numbers that are not in the file" in refused(path)
    torch.save({**state, "tok_emb.weight": torch.zeros(40, 64, device="meta")}, path)
    assert "tok_emb.weight claims numbers that are not in the file" in refused(path)
    torch.save({name: tensor for name, tensor in state.items() if "trf_blocks" not in name}, path)
    assert "model.n_layers=0: must be at least 1" in refused(path, 1)
    expanded = torch.zeros(1).expand(state["tok_emb.weight"].shape)
    for number, average in ((0, torch.zeros(1).expand(10**11)), (0, expanded), (-1, torch.tensor(1.0))):
        averages = {"state": {number: {"exp_avg": average}}}
        torch.save({"model_state_dict": state, "optimizer_state_dict": averages}, path)
        assert "is not AdamW's for this model" in refused(path, 1)
    torch.save({**state, "pos_emb.weight": torch.zeros(8, 3)}, path)
    assert "pos_emb.weight has shape (8, 3)" in refused(path, 1)
    torch.save([1, 2], path)
    assert "is damaged, or no state dict" in refused(path)
    torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is no .pth file" in refused(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escaped", b"x")
    assert "../../escaped leads out of the archive" in refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", b"\0" * 10**7)
    assert "unpacks to 10000000 bytes, more than the file has" in refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", os.urandom(1000))
    assert "model/data.pkl is compressed" in refused(path)
    assert not (tmp_path / "bomb-went-off").exists()


@torch.no_grad()
def test_names_that_wrappers_left_are_understood(tmp_path: Path) -> None:
    theirs = hugging_face_gpt2()
    theirs.save_pretrained(tmp_path / "theirs")
    book = books_model(BOOK).eval()
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "model."):
        tensors = {f"{prefix}{name}": tensor for name, tensor in book.state_dict().items()}
        for content in (tensors, {"state_dict": tensors, "epoch": 3}):  # the latter is Lightning's
            torch.save(content, tmp_path / "model.pth")
            ours = build_model(open_weights(str(tmp_path / "model.pth"), n_heads=1))
            assert all(torch.equal(ours.get_parameter(name), one) for name, one in book.named_parameters())
        if prefix != "model.":
            wrapped = {prefix + name: each.contiguous() for name, each in theirs.state_dict().items()}
            del wrapped[f"{prefix}lm_head.weight"]
            save_file(wrapped, tmp_path / "theirs" / "model.safetensors")
            torch.testing.assert_close(our_model(tmp_path / "theirs")(IDS), theirs(IDS).logits)
    blocks = {f"trf_blocks.0._orig_mod.{name}": 1 for name in ("a", "b")}
    assert list(without_wrappers(blocks)) == ["trf_blocks.0.a", "trf_blocks.0.b"]


def test_what_is_not_the_file_itself_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
    page = b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>"
    folder, path = tmp_path / "theirs", tmp_path / "model.pth"
    hugging_face_gpt2().save_pretrained(folder)
    for name in ("model.safetensors", "config.json"):
        for content, said in (
            (pointer, "is a git-LFS pointer, not the file itself: run `git lfs pull`"),
            (page, "web page"),
        ):
            before = (folder / name).read_bytes()
            (folder / name).write_bytes(content)
            assert f"{name} is a " in refused(folder)
            assert said in refused(folder)
            (folder / name).write_bytes(before)
            path.write_bytes(content)
            assert said in refused(path)
    path.write_bytes(b"Entry not found")
    assert "is no .pth file as torch.save writes them today; it begins with b'Entry not found'" in refused(
        path
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/a.npy", b"x")
    assert "is a zip archive without a data.pkl, not what torch.save writes" in refused(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "is a program of TorchScript" in refused(path)
    torch.save(torch.nn.Linear(2, 2), path)
    assert "for its torch.nn.modules.linear.Linear; of a model, save model.state_dict()" in refused(path)
    theirs = {
        name.replace("lm_head", "head"): each for name, each in hugging_face_gpt2().state_dict().items()
    }
    torch.save({"model": theirs, "model_args": {"n_head": 4, "bias": True}, "iter_num": 5}, path)
    assert "is a checkpoint of nanoGPT, which does not say with which of nanoGPT's two GELUs" in refused(path)
    torch.save(theirs, path)
    assert "has Hugging Face's names, which say nothing of its sizes: give the folder" in refused(path)
    torch.save({"weight": torch.zeros(2), "optimizer": {}}, path)
    assert "holds no state dict in the book's names, but weight, optimizer" in refused(path)
    assert "give the folder that holds it" in refused(folder / "model.safetensors")


def test_shards_that_are_missing_or_say_it_twice_are_named(tmp_path: Path) -> None:
    hugging_face_gpt2().save_pretrained(tmp_path, max_shard_size="40KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    tensors = load_file(first)
    save_file({**load_file(second), **tensors}, second)
    assert f"{second.name} holds {min(tensors)} a second time" in refused(tmp_path)
    second.unlink()
    assert f"{second.name}, which its index names, is missing" in refused(tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    hugging_face_gpt2().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.h.1.mlp.c_fc.bias"
    tensors[name] = tensors[name].double()
    tensors[name][5] = bad  # 1e300 is finite in the file, and not in fp32
    save_file(tensors, file)
    assert f"{name} holds numbers that are not finite" in refused(tmp_path / "theirs")
    state = books_model(BOOK).state_dict()
    state["trf_blocks.1.ff.layers.0.weight"] = torch.full((256, 64), bad, dtype=torch.double)
    torch.save(state, tmp_path / "model.pth")
    line = "trf_blocks.1.ff.layers.0.weight holds numbers that are not finite"
    assert line in refused(tmp_path / "model.pth", 1)


def write(run_dir: Path, weights: dict[str, torch.Tensor], config: PretrainConfig) -> None:
    writer, state = CheckpointWriter(run_dir, keep=1), TrainingState("0123abcd", {}, {}, [], [], {}, {}, None)
    writer.write(Snapshot(5, config, weights, state, record_sizes={}))
    assert writer.wait() is None


def test_weights_of_ours_that_are_not_finite_are_refused_by_name(script: Script, tmp_path: Path) -> None:
    config = PretrainConfig(model=ModelConfig(257, 8, 16, 2, 1), tokenizer=TokenizerConfig("bytes"))
    weights = GPTModel(config.model).state_dict()
    weights["final_norm.shift"][3] = torch.nan
    write(tmp_path, weights, config)
    checkpoint = f"checkpoint={tmp_path / 'checkpoints' / 'step-00000005'}"
    for name, *arguments in (
        ("generate",),
        ("evaluate", "text=Hello"),
        ("export", "to=x"),
        ("export", "format=book"),
    ):
        refusal = script(name, checkpoint, *arguments)
        assert refusal.returncode == 1
        assert "final_norm.shift holds numbers that are not finite (NaN or infinity)" in refusal.stderr
    weights["final_norm.shift"][3] = 0
    weights["trf_blocks.0.ff.layers.0.weight"] += 1e30  # finite, but nothing can be computed with it
    write(tmp_path, weights, config)
    for name, *arguments in (("generate", "prompt=Hello"), ("evaluate", "text=Hello")):
        refusal = script(name, checkpoint, *arguments)
        assert refusal.returncode == 1
        assert "the model gives logits that are not finite: its weights are damaged" in refusal.stderr


def test_a_head_that_the_config_does_not_expect_is_refused(tmp_path: Path) -> None:
    hugging_face_gpt2(tie_word_embeddings=False).save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    untied = config.read_text()
    config.write_text(untied.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert "says tie_word_embeddings=true, or nothing, and lm_head.weight is not wte.weight" in refused(
        tmp_path
    )
    config.write_text(untied)
    tensors = load_file(file)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, file)
    assert "says tie_word_embeddings=false, and there is no lm_head.weight" in refused(tmp_path)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, file)
    assert not open_weights(str(tmp_path)).model.tie_weights  # a head of its own, though it is the same
    assert head.shape == (99, 32)


class TestTheBooksFiles:
    """What a .pth does not hold: it stands beside it, or is asked for."""

    MODEL = ModelConfig(257, 8, 16, 2, 1, drop_rate=0.1)

    def export(self, folder: Path) -> GPTModel:
        torch.manual_seed(4)
        model = GPTModel(self.MODEL).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        optimizers = build_optimizers(model, OptimizerConfig(name="adamw"), CPU)
        model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
        optimizers.step()
        export_book(model, "bytes", folder, optimizers.state(model), OptimizerConfig(name="adamw"))
        return model

    @torch.no_grad()
    def test_heads_tokenizer_and_tied_weights_come_back(self, tmp_path: Path) -> None:
        with torch.enable_grad():
            model = self.export(tmp_path / "book")
        for name in ("model", "model_and_optimizer"):
            source = open_weights(str(tmp_path / "book" / f"{name}.pth"))
            assert source.model == self.MODEL
            assert tokenizer_of(source) == "bytes"
            assert torch.equal(build_model(source)(IDS[:, :5]), model(IDS[:, :5]))
        assert source.optimizer_state
        assert source.optimizer_state.keys() == dict(model.named_parameters()).keys()
        one = build_model(open_weights(str(self.without_json(tmp_path)), n_heads=1))
        two = build_model(open_weights(str(self.without_json(tmp_path)), n_heads=2))
        assert torch.equal(two(IDS[:, :5]), model(IDS[:, :5]))
        assert (one(IDS[:, :5]) - model(IDS[:, :5])).abs().max() > 0.1  # so that guessing would be wrong

    @staticmethod
    def without_json(folder: Path) -> Path:
        (folder / "book" / "model.json").unlink(missing_ok=True)
        return folder / "book" / "model.pth"

    def test_without_it_heads_are_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.export(tmp_path / "book")
        path = self.without_json(tmp_path)
        assert "does not say how many attention heads its model has: add model.n_heads=NUMBER" in refused(
            path
        )
        assert "emb_dim=16 cannot be divided evenly" in refused(path, 3)
        with pytest.raises(UserError, match=r"its 257 tokens are not GPT-2's: give it with tokenizer\.name="):
            tokenizer_of(open_weights(str(path), 2))
        presets = (Path(__file__).parents[2] / "conf" / "model").glob("gpt*.yaml")
        sizes = [OmegaConf.load(preset) for preset in presets]
        heads = {(size.emb_dim, size.n_layers): size.n_heads for size in sizes}
        assert heads == BOOKS_HEADS
        monkeypatch.setitem(BOOKS_HEADS, (16, 1), 4)
        with caplog.at_level("INFO"):
            assert open_weights(str(path)).model.n_heads == 4
        assert "4 are assumed, as in the book's of this size" in caplog.text
        assert open_weights(str(path), 2).model.n_heads == 2

    def test_it_is_not_used_for_another_file(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.export(tmp_path / "book")
        path = tmp_path / "book" / "model.pth"
        state = torch.load(path)
        state["pos_emb.weight"][0, 0] += 1
        torch.save(state, path)
        assert "does not say how many attention heads" in refused(path)
        assert "model.json is not used: model.pth has changed since it was written" in caplog.text

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ({"model": {"n_heads": 3}}, "model.emb_dim=16 cannot be divided"),
            ({"model": {"n_layers": 2}}, "n_layers=1, not 2"),
            ({"model": {"norm": "x"}}, "model.norm=x: must be one of"),
            ({"model": {"n_heads": "2"}}, "n_heads='2' is of the wrong type"),
            ({"tokenizer": "../x"}, "tokenizer=../x is no name"),
            ({"tokenizer": 5}, "is damaged or of another format"),
        ],
    )
    def test_a_damaged_one_is_refused(self, tmp_path: Path, change: dict[str, Any], line: str) -> None:
        self.export(tmp_path / "book")
        file = tmp_path / "book" / "model.json"
        described = json.loads(file.read_text())
        model = {"model": {**described["model"], **change.get("model", {})}}
        file.write_text(json.dumps({**described, **change, **model}))
        assert line in refused(tmp_path / "book" / "model.pth")

    @pytest.mark.parametrize(
        ("key", "value", "line"),
        [
            ("exp_avg", torch.full((8, 16), torch.nan), "pos_emb.weight has averages that are not finite"),
            ("exp_avg_sq", torch.full((8, 16), -1.0), "pos_emb.weight has negative averages of squares"),
            ("exp_avg_sq", torch.zeros(8, 3), "pos_emb.weight has averages of other names or shapes"),
            ("momentum_buffer", torch.zeros(8, 16), "pos_emb.weight has averages of other names or shapes"),
            (None, None, "pos_emb.weight has no state"),
        ],
    )
    def test_a_damaged_optimizer_state_is_not_written(
        self, tmp_path: Path, key: str | None, value: Any, line: str
    ) -> None:
        model = self.export(tmp_path / "book")
        state = open_weights(str(tmp_path / "book" / "model_and_optimizer.pth")).optimizer_state
        assert state
        if key:
            state["pos_emb.weight"][key] = value
        else:
            del state["pos_emb.weight"]
        with pytest.raises(UserError, match=line):
            export_book(model, "bytes", tmp_path / "new", state, OptimizerConfig(name="adamw"))
        assert not (tmp_path / "new").exists()


def test_fine_tuning_sampling_and_export_through_the_commands(script: Script, tmp_path: Path) -> None:
    hugging_face_gpt2(vocab_size=257, n_positions=32).save_pretrained(tmp_path / "theirs")
    (tmp_path / "text.txt").write_text("99 bottles of beer on the wall\n" * 80, encoding="utf-8")
    common = (
        "data=text",
        "data.path=text.txt",
        "tokenizer=bytes",
        "model.context_length=16",
        "data.batch_size=2",
        "training.max_minutes=null",
        "optimizer=adamw",
        "schedule=constant",
        "optimizer.lr=1e-12",
        "samples.max_new_tokens=3",
        "tracking=disabled",
    )
    tuned = script("pretrain", *common, "init_from=theirs", "training.max_steps=2", "hydra.run.dir=tuned")
    assert tuned.returncode == 0, tuned.stderr
    resumed = script("pretrain", "resume=tuned", "training.max_steps=3")
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = open_weights(str(tmp_path / "tuned")), open_weights(str(tmp_path / "theirs"))
    assert (ours.model.emb_dim, ours.model.context_length) == (32, 16)
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(
            ours.tensors[name], tensor[:16] if name == "pos_emb.weight" else tensor, atol=1e-6, rtol=0
        )
    exported = script("export", "checkpoint=tuned", "to=export")
    assert exported.returncode == 0, exported.stderr
    sampled = script("generate", "checkpoint=export", "max_new_tokens=8", "num_samples=2")
    assert sampled.returncode == 0, sampled.stderr
    assert "sample 2:" in sampled.stdout

    with pytest.raises(UserError, match="export already exists: give the name of a new folder"):
        export_checkpoint(ExportConfig(str(tmp_path / "tuned"), to=str(tmp_path / "export")), tmp_path)
    folder = export_checkpoint(ExportConfig(str(tmp_path / "tuned"), "book"), tmp_path).files["folder"]
    assert sorted(file.name for file in folder.iterdir()) == [
        "model.json",
        "model.pth",
        "model_and_optimizer.json",
        "model_and_optimizer.pth",
    ]
    with pytest.raises(UserError, match=r"the training data of .*export is unknown"):
        run_evaluation(EvaluateConfig(str(tmp_path / "export")), tmp_path)


TRAINED_ON = "99 bottles of beer on the wall, naïve café — 日本語\n" * 80


def theirs_with_its_own_tokenizer(folder: Path) -> tuple[transformers.GPT2LMHeadModel, Any]:
    """A model of transformers with a BPE of its own, of 300 tokens, whose end of text is the first."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [TRAINED_ON], 300, special_tokens=["<|endoftext|>", "<user>"], show_progress=False
    )
    folder.mkdir()
    bpe.save_model(str(folder))
    model = hugging_face_gpt2(vocab_size=300, n_positions=32)
    model.save_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_a_folders_own_tokenizer_is_used_kept_and_exported(script: Script, tmp_path: Path) -> None:
    model, tokenizer = theirs_with_its_own_tokenizer(tmp_path / "theirs")
    (tmp_path / "text.txt").write_text(TRAINED_ON, encoding="utf-8")
    text = "9 bottles of naïve beer — 日本<|endoftext|>on the wall"
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()

    def evaluated(checkpoint: str, *more: str) -> dict[str, Any]:
        done = script(
            "evaluate", f"checkpoint={checkpoint}", f"text={text}", "hydra.run.dir=evaluated", *more
        )
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "evaluated" / "evaluation.json").read_text("utf-8"))

    figures = evaluated("theirs", "runtime.precision=fp32")
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert [row["token_id"] for row in figures["token_table"]] == ids[0, 1:].tolist()

    tuned = script(
        "pretrain",
        "init_from=theirs",
        "data=text",
        "data.path=text.txt",
        "model.context_length=16",
        "data.batch_size=2",
        "training.max_minutes=null",
        "training.max_steps=2",
        "optimizer=adamw",
        "optimizer.lr=1e-12",
        "samples.prompt=9 bottles",
        "samples.max_new_tokens=3",
        "tracking=disabled",
        "hydra.run.dir=tuned",
    )
    assert tuned.returncode == 0, tuned.stderr
    shutil.rmtree(tmp_path / "theirs")  # from here on, the run alone knows the tokenizer
    for checkpoint in ("last", "best"):
        figures = evaluated(f"tuned/checkpoints/{checkpoint}", "runtime.precision=fp32")
        assert figures["loss"] == pytest.approx(loss, rel=1e-3), checkpoint  # its context is shorter
    resumed = script("pretrain", "resume=tuned", "training.max_steps=3")
    assert resumed.returncode == 0, resumed.stderr
    for form, name in (("huggingface", "export"), ("book", "book/model.pth")):
        exported = script("export", "checkpoint=tuned", f"format={form}", f"to={name.partition('/')[0]}")
        assert exported.returncode == 0, exported.stderr
        ours = load_tokenizer(tokenizer_of(open_weights(str(tmp_path / name))))
        assert encode(text, ours) == ids[0].tolist()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.encode(text) == ids[0].tolist()
    assert theirs.eos_token_id == tokenizer.eos_token_id
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id

    vocabulary = tmp_path / "tuned" / "checkpoints" / "last" / "vocab.json"
    vocabulary.write_bytes(vocabulary.read_bytes().replace(b'"!":', b'"?":'))
    assert "vocab.json does not match its checksum" in refused(tmp_path / "tuned" / "checkpoints" / "last")


def test_a_tokenizer_is_asked_for_where_nothing_says_it(script: Script, tmp_path: Path) -> None:
    theirs_with_its_own_tokenizer(tmp_path / "theirs")
    (tmp_path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "theirs" / name).rename(tmp_path / "tokenizer" / name)
    with pytest.raises(UserError, match=r"its 300 tokens are not GPT-2's: give it with tokenizer\.name="):
        tokenizer_of(open_weights(str(tmp_path / "theirs")))
    given = "tokenizer.name=tokenizer"
    evaluated = script("evaluate", "checkpoint=theirs", "text=9 bottles", given, "hydra.run.dir=evaluated")
    assert evaluated.returncode == 0, evaluated.stderr
    generated = script("generate", "checkpoint=theirs", "prompt=9 bottles", "max_new_tokens=3", given)
    assert generated.returncode == 0, generated.stderr
    exported = script("export", "checkpoint=theirs", "to=export", given)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "export" / "vocab.json").exists()
    other = script("export", "checkpoint=export", "to=again", "tokenizer.name=gpt2")
    assert "tokenizer.name=gpt2: the weights of export have export; remove it" in other.stderr
    (tmp_path / "export" / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    refusal = script("generate", "checkpoint=export")
    assert "is a RobertaTokenizer without a tokenizer.json, and only byte-level BPE" in refusal.stderr
    assert refusal.stderr.count("\n") == 1
    assert script("export", "checkpoint=export", "to=again", given).returncode == 0


def test_the_books_heads_are_asked_for_by_a_key(script: Script, tmp_path: Path) -> None:
    torch.save(
        books_model(ModelConfig(257, 8, 16, 2, 1, tie_weights=False)).state_dict(), tmp_path / "model.pth"
    )
    common = ("checkpoint=model.pth", "tokenizer.name=bytes", "text=Every effort")
    refusal = script("evaluate", *common)
    assert "add model.n_heads=NUMBER" in refusal.stderr
    refusal = script("evaluate", "checkpoint=model.pth", "tokenizer=bytes")
    assert "set its keys one by one, as tokenizer.KEY=VALUE" in refusal.stderr
    done = script("evaluate", *common, "model.n_heads=2")
    assert done.returncode == 0, done.stderr
    (tmp_path / "text.txt").write_text(TRAINED_ON, encoding="utf-8")
    tuned = script(
        "pretrain",
        "init_from=model.pth",
        "model.n_heads=2",
        "tokenizer=bytes",
        "data=text",
        "data.path=text.txt",
        "data.batch_size=2",
        "training.max_minutes=null",
        "training.max_steps=1",
        "samples.max_new_tokens=3",
        "tracking=disabled",
        "hydra.run.dir=tuned",
        "model.context_length=8",
    )
    assert tuned.returncode == 0, tuned.stderr
    assert open_weights(str(tmp_path / "tuned")).model.n_heads == 2
    assert (
        "model.n_heads=4: the weights of tuned"
        in script("generate", "checkpoint=tuned", "model.n_heads=4").stderr
    )


@pytest.mark.parametrize(
    ("model", "tokenizer", "line"),
    [
        (ModelConfig(emb_dim=64), "gpt2", "model.emb_dim=64: the weights of here have 32; remove it"),
        (
            ModelConfig(context_length=64),
            "gpt2",
            "the weights of here have positions for 16; ask for no more",
        ),
        (
            ModelConfig(context_length=8),
            "p50k_base",
            "tokenizer.name=p50k_base: the weights of here have bytes",
        ),
    ],
)
def test_other_sizes_than_the_weights_have_are_refused(model: ModelConfig, tokenizer: str, line: str) -> None:
    config = PretrainConfig(model=model, tokenizer=TokenizerConfig(tokenizer))
    source = ModelConfig(257, 16, 32, 2, 1), TokenizerConfig("bytes"), "here"
    with pytest.raises(UserError, match=re.escape(line)):
        with_weights(config, *source, given=keys_unlike_default(config))
    config = PretrainConfig(model=ModelConfig(context_length=8, drop_rate=0.1))
    config = with_weights(config, *source, given=keys_unlike_default(config))
    assert config.model == ModelConfig(257, 8, 32, 2, 1, drop_rate=0.1)
    assert config.tokenizer.name == "bytes"
