"""The held-out loss of a training is the one of train_llava.evaluate, however the records are shared out."""

import json
import re

import pytest
import torch
from conftest import call
from trainers import trainer_of
from training import zero2

from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.evaluate import main as evaluate
from train_llava.model.load import load_processor
from train_llava.train import main as train
from train_llava.training.trainer import LlavaTrainer


@pytest.fixture(scope="module")
def held_out(data, tmp_path_factory):
    """Nine records, as uneven as users have them: a long answer, three rounds, one without an image."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "images").symlink_to(data / "images")
    records = json.loads((data / "chat.json").read_text())[:9]
    for i, record in enumerate(records):
        record["id"] = f"held_out_{i}"
    records[2]["conversations"][1]["value"] = "a red seven and a blue one, " * 6
    records[4]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}] * 2
    del records[8]["image"]
    records[8]["conversations"] = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Good morning."}]
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


def evaluated(model, data, output):
    where = ("--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--max_new_tokens", 1)
    done = call(evaluate, *where)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "metrics.json").read_text())["loss"]


@pytest.mark.parametrize(
    "flags",
    [
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 4},
        {"per_device_eval_batch_size": 64},
        {"per_device_eval_batch_size": 4, "dataloader_drop_last": True, "dataloader_num_workers": 1},
        {"per_device_eval_batch_size": 4, "eval_accumulation_steps": 1, "label_smoothing_factor": 0.3},
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_one_process(llava, data, held_out, tmp_path, flags, packing):
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector", **flags)
    trainer.data_collator = LlavaCollator(load_processor(llava), for_trainer=True, packing=packing)
    metrics = trainer.evaluate(LlavaDataset(held_out))
    assert metrics["eval_loss"] == pytest.approx(evaluated(llava, held_out, tmp_path), rel=1e-6)
    assert trainer.data_collator.packing == packing  # training goes on as before


def test_two_ranks(llava, data, held_out, tmp_path):
    """Under DeepSpeed, in the middle and at the end; the second rank has one record less than the first."""
    flags = ["--eval_data_path", held_out, "--per_device_eval_batch_size", 4, "--eval_strategy", "steps"]
    flags += ["--eval_steps", 3, "--load_best_model_at_end", "true"]
    done = zero2(llava, data, tmp_path / "run", "freeze_vision", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = {log["step"]: log["eval_loss"] for log in history if "eval_loss" in log}
    for step in (3, 6):
        expected = evaluated(tmp_path / "run" / f"checkpoint-{step}", held_out, tmp_path / str(step))
        assert losses[step] == pytest.approx(expected, rel=1e-5)
    assert f"held-out loss {losses[6]:.4f}" in done.stdout


def test_at_the_end_alone(llava, data, held_out, tmp_path):
    """Scored once unless more is asked for; sample captions are of the first held-out records with an image."""
    flags = ["--model_name_or_path", llava, "--data_path", data, "--eval_data_path", held_out, "--use_cpu", "true"]
    flags += ["--train_type", "projector", "--max_steps", 1, "--per_device_train_batch_size", 2, "--sample_steps", 1]
    done = call(train, *flags, "--report_to", "none", "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^step (\d)/1  held-out loss", done.stdout, re.M) == ["1"]
    assert re.findall(r"^  (\w+): .*reference: ", done.stdout, re.M) == [f"held_out_{i}" for i in range(4)]


def test_the_table_has_a_row_for_each_record(llava, data, tmp_path):
    """Ranks fill up their last round with records that are dropped by their rows: each sum must be in its own row."""
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "none")
    trainer.model.eval()
    collator = LlavaCollator(load_processor(llava))
    examples = [trainer.train_dataset[i] for i in range(5)]
    with torch.no_grad():
        table = trainer.model(**collator(examples)).logits
        alone = [trainer.model(**collator([example])).logits[0] for example in examples]
    torch.testing.assert_close(table, torch.stack(alone), rtol=1e-5, atol=1e-5)
    assert len({row[1].item() for row in alone}) > 1
