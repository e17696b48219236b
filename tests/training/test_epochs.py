"""What a run counts, where the batches of an epoch are no multiple of `training.accumulate`: by hand, and
against a training loop written out here."""

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import numbers
from drill import TEXT, outcome
from settings import changed, settings
from torch.nn import functional as F

from llm.checkpoints.opening import open_weights
from llm.checkpoints.weights import build_model
from llm.commands.pretrain import pretrain
from llm.config import PretrainConfig
from llm.data.windows import Batch, TrainingBatches
from llm.errors import UserError
from llm.model.gpt import GPTModel

pytestmark = pytest.mark.usefixtures("no_pictures")

BATCHES, BATCH_TOKENS = 7, 2 * 16  # in an epoch, in a batch


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    """Seven batches an epoch, four to an update."""
    config = settings(tmp_path, max_steps=None, max_epochs=1.0, accumulate=4, eval_freq=1, eval_iter=1)
    Path(config.data.path or "").write_text(TEXT[:257], encoding="utf-8")  # 231 bytes of it to train on
    return changed(config, model__drop_rate=0.0, data__shift_windows=False)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that training draws."""
    batches: list[Batch] = []
    original = TrainingBatches.__next__

    def draw(self: TrainingBatches) -> Batch:
        batches.append(original(self))
        return batches[-1]

    monkeypatch.setattr(TrainingBatches, "__next__", draw)
    return batches


def test_an_epoch_is_a_pass_over_the_data(
    config: PretrainConfig, drawn: list[Batch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = changed(config, training__max_epochs=3.0, samples__every_epoch=True)
    summary = pretrain(config, tmp_path / "run")
    windows = Counter(tuple(window.tolist()) for inputs, _ in drawn for window in inputs)
    assert len(windows) == 2 * BATCHES
    assert set(windows.values()) == {3}
    lines = [line for line in numbers(tmp_path / "run") if "train/loss" in line]
    used = [4, 8, 12, 16, 20, 21]  # batches after each update: the last one takes what is left
    assert [line["epoch"] for line in lines] == [batches / BATCHES for batches in used]
    assert [line["tokens_seen"] for line in lines] == [BATCH_TOKENS * batches for batches in used]
    assert (summary.steps, summary.tokens_seen) == (6, 3 * BATCHES * BATCH_TOKENS)
    said = [record.getMessage() for record in caplog.records]
    # The book's line names the epoch of the update's last batch.
    assert [line[:4] for line in said if line[:2] == "Ep"] == ["Ep 1", "Ep 2", "Ep 2", "Ep 3", "Ep 3", "Ep 3"]
    # A sample after each update that ends an epoch, and one at the end.
    assert [int(line.split()[2]) for line in said if "Sample after" in line] == [2, 4, 6, 6]
    assert "about 672 tokens (3 epochs)" in caplog.text
    assert "672 (3.00 epochs)" in caplog.text


def test_an_update_is_the_mean_of_the_batches_that_it_uses(
    config: PretrainConfig, drawn: list[Batch], tmp_path: Path
) -> None:
    config = changed(config, training__grad_clip=None, schedule__name="constant", schedule__warmup=0.0)
    config = changed(config, optimizer__name="adamw", optimizer__weight_decay=0.0, optimizer__lr=0.01)
    config = changed(config, optimizer__betas=[0.9, 0.95])
    pretrain(config, tmp_path / "run")
    torch.manual_seed(config.seed)
    model = GPTModel(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for group in (drawn[:4], drawn[4:]):
        inputs, targets = (torch.cat(each) for each in zip(*group, strict=True))  # as one large batch
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    found = build_model(open_weights(str(tmp_path / "run"))).state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)


def test_limits_by_epochs_steps_and_clock_agree_on_what_an_epoch_is(
    config: PretrainConfig, tmp_path: Path
) -> None:
    by_steps = changed(config, training__max_epochs=None, training__max_steps=7)
    assert pretrain(by_steps, tmp_path / "steps").tokens_seen == 28 * BATCH_TOKENS
    assert numbers(tmp_path / "steps")[-1]["epoch"] == 4.0
    part = changed(config, training__max_epochs=0.5)  # 3.5 batches: four are more, and no fewer will do
    assert pretrain(part, tmp_path / "part").tokens_seen == 4 * BATCH_TOKENS
    with pytest.raises(UserError, match=r"is finished: training.max_epochs=0.5 is spent"):
        pretrain(changed(part, resume=str(tmp_path / "part")))


def test_a_run_that_ended_on_part_of_an_update_counts_on_from_there(
    config: PretrainConfig, drawn: list[Batch], tmp_path: Path
) -> None:
    pretrain(config, tmp_path / "run")
    pretrain(changed(config, resume=str(tmp_path / "run"), training__max_epochs=2.0))
    lines = [line for line in numbers(tmp_path / "run") if "train/loss" in line]
    assert [line["epoch"] * BATCHES for line in lines] == pytest.approx([4, 7, 11, 14])
    windows = Counter(tuple(window.tolist()) for inputs, _ in drawn for window in inputs)
    assert set(windows.values()) == {2}


@pytest.mark.parametrize("order", ["shuffled", "book"])
def test_it_is_resumed_inside_an_update_that_ends_an_epoch(
    config: PretrainConfig, tmp_path: Path, order: str
) -> None:
    config = changed(config, training__max_epochs=3.0, data__order=order, model__drop_rate=0.1)
    config = changed(config, checkpoint__every_steps=2)
    pretrain(config, tmp_path / "whole")
    pretrain(config, tmp_path / "cut")
    pretrain(changed(config, resume=str(tmp_path / "cut" / "checkpoints" / "step-00000004")))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
