"""A run with a tokenizer learnt from its text: what the scripts make of it, with nothing but its folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, Script, numbers
from settings import settings

from llm import pretrain
from llm.config import ModelConfig, TokenizerConfig
from llm.data.tokenizer import encode, load_tokenizer
from llm.errors import UserError
from llm.generation.inference import load_for_inference
from llm.runtime import start_runtime

pytestmark = pytest.mark.usefixtures("no_pictures")

SIZE = "tokenizer.vocab_size=270"
COMMON = (*(each for each in TINY if not each.startswith("tokenizer")), "tokenizer=bpe", SIZE, "data=text")


def lines(script: Script, name: str, *arguments: str) -> str:
    result = script(name, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refusal(script: Script, name: str, *arguments: str) -> str:
    result = script(name, *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("error: ").strip()


def test_a_runs_folder_is_all_that_its_tokenizer_needs(script: Script, text: str, tmp_path: Path) -> None:
    steps = "training.max_steps=4"
    prepared = lines(script, "prepare", *COMMON, text, steps, "data.cache_dir=cache")
    assert "learnt a tokenizer of 270 tokens" in prepared
    assert "tokenizer   270 tokens, learnt from the training split" in prepared
    arguments = [*COMMON, text, "data.cache_dir=cache", steps, "checkpoint.every_steps=2"]
    assert "learnt" not in lines(script, "pretrain", *arguments, "hydra.run.dir=run")
    config = json.loads((tmp_path / "run" / "checkpoints" / "last" / "config.json").read_text("utf-8"))
    assert (config["tokenizer"], config["model"]["vocab_size"]) == ({"name": "bpe", "vocab_size": 270}, 270)

    # Another text in the place of the first, and an empty cache: what is learnt from it would be another one.
    shutil.rmtree(tmp_path / "cache")
    first = Path(text.partition("=")[2])
    content = first.read_text("utf-8")
    first.write_text(content.upper(), encoding="utf-8")
    (tmp_path / "run").rename(tmp_path / "moved")
    run = "checkpoint=moved"
    arguments = [run, "prompt=9 bottles", "tokenizer.name=bpe", "hydra.run.dir=written"]
    assert "9 bottles" in lines(script, "generate", *arguments)
    lines(script, "evaluate", run, "text=9 bottles of beer", "hydra.run.dir=evaluated")
    lines(script, "export", run, "to=theirs")
    lines(script, "export", run, "to=book", "format=book")

    loaded = load_for_inference(tmp_path / "moved", start_runtime(settings(tmp_path).runtime))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for each in ("9 bottles of beer on the wall\n", "It's  naïve — 日本 🙂<|endoftext|>\n\n x"):
        ids = encode(each, loaded.tokenizer)
        assert tokenizer(each)["input_ids"] == ids
        assert encode(each, load_tokenizer(str(tmp_path / "book"))) == ids
        assert tokenizer.decode(ids) == each
    with torch.no_grad():
        logits = [model(torch.tensor([ids])) for model in (loaded.model, theirs)]
    torch.testing.assert_close(logits[0], logits[1].logits, atol=1e-5, rtol=1e-5)

    # With the text it was learnt from, the run is resumed, repeated and begun from; it is not learnt again.
    first.write_text(content, encoding="utf-8")
    whole = numbers(tmp_path / "moved")
    resumed = lines(script, "pretrain", "resume=moved/checkpoints/step-00000002")
    assert "learnt" not in resumed
    assert numbers(tmp_path / "moved") == whole
    assert "the same numbers" in lines(script, "pretrain", "rerun=moved", "hydra.run.dir=again")
    begun = lines(script, "pretrain", *COMMON, text, "init_from=moved", steps, "hydra.run.dir=begun")
    assert "learnt" not in begun
    kept = [tmp_path / run / "checkpoints" / "last" / "tokenizer.json" for run in ("moved", "again", "begun")]
    assert len({file.read_bytes() for file in kept}) == 1


def test_what_cannot_be_is_one_line(script: Script, text: str, tmp_path: Path) -> None:
    arguments = [*COMMON, text, "training.max_steps=1"]
    lines(script, "pretrain", *arguments, "hydra.run.dir=run")
    other = "tokenizer.vocab_size=271"
    assert refusal(script, "pretrain", "resume=run", "tokenizer=bpe", other).startswith(
        "resume=run: model.vocab_size=271 (it is 270), tokenizer.vocab_size=271 (it is 270) cannot change"
    )
    assert refusal(script, "pretrain", "resume=run", "tokenizer=bytes").startswith(
        "resume=run: model.vocab_size=257 (it is 270), tokenizer.name=bytes (it is bpe) cannot change"
    )
    begun = ["init_from=run", "hydra.run.dir=begun", "data=text", text]
    assert "tokenizer.vocab_size=271: the weights of run/checkpoints/step-00000001 have 270; remove it" in (
        refusal(script, "pretrain", *begun, "tokenizer=bpe", other)
    )
    assert "tokenizer.name=bytes: the weights of run/checkpoints/step-00000001 have " in refusal(
        script, "pretrain", *begun, "tokenizer=bytes"
    )
    assert refusal(script, "pretrain", *arguments, "tokenizer=gpt2", "hydra.run.dir=no") == (
        "tokenizer.vocab_size=270: tokenizer.name=gpt2 has a size of its own; remove it, or learn a "
        "tokenizer of that size with tokenizer=bpe"
    )
    assert refusal(script, "pretrain", *arguments, "tokenizer.vocab_size=null", "hydra.run.dir=no") == (
        "tokenizer.vocab_size is null, and other keys have its value: set it"
    )
    # Alone, the size is another one of what there is: of the run's, of the weights'.
    assert refusal(script, "pretrain", "resume=run", other).startswith(
        "resume=run: tokenizer.vocab_size=271 (it is 270) cannot change"
    )
    assert "tokenizer.vocab_size=271: the weights of run/checkpoints/step-00000001 have 270" in refusal(
        script, "pretrain", *begun, other
    )
    assert refusal(script, "pretrain", "tokenizer=gpt2", "tokenizer.name=bpe", "hydra.run.dir=no").startswith(
        "tokenizer.name=bpe is learnt from the text of a run: set its tokenizer.vocab_size too"
    )
    assert refusal(script, "pretrain", *arguments, "tokenizer.vocab_size=256", "hydra.run.dir=no").startswith(
        "tokenizer.vocab_size=256: must be at least 257"
    )
    assert "model.vocab_size=260 must be at least 270" in refusal(
        script, "pretrain", *arguments, "model.vocab_size=260", "hydra.run.dir=no"
    )
    assert not (tmp_path / "no").exists()


def test_in_python_too(tmp_path: Path) -> None:
    config = settings(tmp_path, max_steps=2)
    config.model, config.tokenizer = ModelConfig(270, 16, 16, 2, 1), TokenizerConfig("bpe", 270)
    assert pretrain(config, tmp_path / "run").steps == 2
    assert load_tokenizer(str(tmp_path / "run" / "checkpoints" / "last")).n_vocab == 270
    config.tokenizer.vocab_size = None
    with pytest.raises(UserError, match=r"set its tokenizer\.vocab_size too"):
        pretrain(config, tmp_path / "other")
