"""Checkpoints: what is loaded is what was saved, and damage or hostility is one line."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llm import checkpoint
from llm.checkpoint import find_checkpoint, load_checkpoint, load_training_state, save_checkpoint
from llm.config import ModelConfig, PretrainConfig, UserError
from llm.model import GPTModel

CONFIG = PretrainConfig(model=ModelConfig(vocab_size=31, context_length=8, emb_dim=16, n_heads=2, n_layers=1))


def save(run_dir: Path, steps: int, kind: str = "step") -> GPTModel:
    torch.manual_seed(steps)
    model = GPTModel(CONFIG.model)
    save_checkpoint(run_dir, kind, steps, model, CONFIG, {"steps": steps, "tensor": torch.ones(2)})
    return model


def test_the_last_of_each_kind_is_kept_and_loads_the_same(tmp_path: Path) -> None:
    save(tmp_path, 1)
    best = save(tmp_path, 1, "best")
    last = save(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best",
        "best-00000001",
        "last",
        "step-00000002",
    ]
    for name, model in (("last", last), ("best", best)):
        loaded, config = load_checkpoint(find_checkpoint(str(tmp_path / "checkpoints" / name)))
        assert config == CONFIG
        for (key, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), key
    _, state = load_training_state(find_checkpoint(str(tmp_path)))
    assert state["steps"] == 2


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*step-00000002: No space left on device"):
        save(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step-00000001"]
    load_checkpoint(find_checkpoint(str(tmp_path)))


class _Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("bomb-went-off",)


def test_a_pickle_bomb_does_not_go_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    folder = find_checkpoint(str(tmp_path))
    torch.save({"steps": _Bomb()}, folder / "training_state.pt")
    with pytest.raises(UserError, match="damaged or of another format"):
        load_training_state(folder)
    (folder / "training_state.pt").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    with pytest.raises(UserError, match="damaged or of another format"):
        load_training_state(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    with pytest.raises(UserError, match="damaged or of another format"):
        load_checkpoint(folder)
    assert not (tmp_path / "bomb-went-off").exists()


def test_another_models_weights_are_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = find_checkpoint(str(tmp_path))
    save_file({"tok_emb.weight": torch.zeros(3, 16)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="holds another model: "):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damage_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    file = find_checkpoint(str(tmp_path)) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError) as error:
        load_checkpoint(find_checkpoint(str(tmp_path)) if name != "model.safetensors" else file.parent)
    assert "\n" not in str(error.value)


def test_a_config_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = find_checkpoint(str(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    config["model"]["surprise"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="surprise"):
        load_checkpoint(folder)
