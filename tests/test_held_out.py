"""Held-out loss and score of a training are those of train_llava.evaluate, however the records are shared out."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from conftest import call
from folders import changed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import trainer_of
from training import losses, weights, zero2

from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.evaluate import main as evaluate
from train_llava.model.generate import MAX_NEW_TOKENS, first_question, generate
from train_llava.model.load import load, load_processor
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.train import main as train
from train_llava.training.held_out import check_scores
from train_llava.training.trainer import LlavaTrainer


@pytest.fixture(scope="module")
def held_out(data, tmp_path_factory):
    """Nine records, as uneven as users have them: a long answer, three rounds, one without an image."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "images").symlink_to(data / "images")
    records = json.loads((data / "chat.json").read_text())[:9]
    for i, record in enumerate(records):
        record |= {"id": f"held_out_{i}", "category": ("odd", "even")[i % 2]}
    records[2]["conversations"][1]["value"] = "a red seven and a blue one, " * 6
    records[4]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}] * 2
    del records[8]["image"]
    records[8]["conversations"] = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Good morning."}]
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


SHORT = 12  # tokens, where longer answers show nothing more


@pytest.fixture(scope="module")
def answerable(held_out, plain, tmp_path_factory):
    """The same records; of three, the reference is what plain transformers answers with the untrained model."""

    return with_answers(held_out, range(3, 6), partial(plain, max_new_tokens=SHORT), tmp_path_factory.mktemp("some"))


def with_answers(data, indices, answer, folder):
    """A copy of data whose first answers are what `answer(messages, images)` says."""
    dataset, records = LlavaDataset(data), json.loads((data / "chat.json").read_text())
    for i in indices:
        question, _ = first_question(dataset[i])
        records[i]["conversations"][1]["value"] = answer(question["messages"], question["images"])
    (folder / "images").symlink_to(data / "images")
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


FIGURES = ("loss", "exact_match", "bleu_1", "bleu_4", "rouge_l", "cider")  # of captions
IMAGES = ("image_records", "loss_own_image", "loss_other_image", "loss_grey_image", "image_gain", "image_gain_error")


def evaluated(model, data, output, *flags):
    where = ("--model_name_or_path", model, "--data_path", data, "--output_dir", output)
    done = call(evaluate, *where, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "metrics.json").read_text())


def assert_same(log, expected):
    """What a training has logged of an evaluation, and what evaluate says."""
    for name in (*FIGURES, *IMAGES):
        assert log[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert expected["categories"].keys() == {"odd", "even"}
    for name, figures in expected["categories"].items():
        assert log[f"eval_exact_match/{name}"] == pytest.approx(figures["exact_match"], abs=1e-6), name


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
    expected = evaluated(llava, held_out, tmp_path, "--max_new_tokens", 1)["loss"]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6) and "eval_exact_match" not in metrics
    assert trainer.data_collator.packing == packing  # training goes on as before


def test_the_score_of_one_process(llava, data, answerable, tmp_path, monkeypatch):
    monkeypatch.setattr("train_llava.training.held_out.MAX_NEW_TOKENS", SHORT)
    flags = {"eval_generate": True, "per_device_eval_batch_size": 4}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector", **flags)
    trainer.processing_class = load_processor(llava)
    metrics = trainer.evaluate(LlavaDataset(answerable, held_out=True))
    assert_same(metrics, evaluated(llava, answerable, tmp_path, "--max_new_tokens", SHORT))
    assert metrics["eval_exact_match"] == pytest.approx(3 / 9)


def test_two_ranks(llava, data, held_out, plain, tmp_path):
    """Under DeepSpeed, in the middle and at the end; the second rank has one record less than the first. One token in
    four ends an answer, and the rate is low: some answers stay the untrained model's, which the references are."""
    ends, model = list(range(0, 418, 4)), shutil.copytree(llava, tmp_path / "model")
    changed(model / "generation_config.json", eos_token_id=ends)
    (tmp_path / "data").mkdir()
    answer = partial(plain, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=ends)
    answerable = with_answers(held_out, range(9), answer, tmp_path / "data")
    flags = ["--eval_data_path", answerable, "--per_device_eval_batch_size", 4, "--eval_strategy", "steps"]
    flags += ["--learning_rate", 1e-5, "--report_to", "tensorboard"]
    flags += ["--eval_steps", 3, "--load_best_model_at_end", "true", "--eval_generate", "true"]
    done = zero2(model, data, tmp_path / "run", "freeze_vision", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    logs = {log["step"]: log for log in history if "eval_loss" in log}
    events = EventAccumulator(str(next((tmp_path / "run" / "runs").iterdir())))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("eval/exact_match")}
    assert shown == pytest.approx({step: log["eval_exact_match"] for step, log in logs.items()})
    assert 0 < logs[6]["eval_exact_match"] < 1 and logs[3]["eval_loss"] > logs[6]["eval_loss"]
    for step in (3, 6):
        assert_same(logs[step], evaluated(tmp_path / "run" / f"checkpoint-{step}", answerable, tmp_path / str(step)))
    assert f"held-out loss {logs[6]['eval_loss']:.4f}  exact match" in done.stdout
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| does it look at the image? | 8 records with another image are too few" in card


def test_the_best_is_kept_and_training_goes_on_as_without(llava, data, held_out, tmp_path, monkeypatch):
    """With dropout, so that a number drawn meanwhile would show. The references of the second run are what the first
    one's checkpoint in the middle answers."""
    monkeypatch.setattr("train_llava.training.held_out.MAX_NEW_TOKENS", SHORT)
    flags = ["--model_name_or_path", llava, "--data_path", data, "--use_cpu", "true", "--report_to", "none"]
    flags += ["--train_type", "use_lora", "--lora_dropout", 0.3, "--max_steps", 6, "--learning_rate", 0.1]
    flags += ["--per_device_train_batch_size", 2, "--logging_steps", 1, "--lr_scheduler_type", "constant"]
    flags += ["--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2]
    done = call(train, *flags, "--eval_data_path", held_out, "--output_dir", tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    middle = tmp_path / "plain" / "checkpoint-4"
    model, processor = load(middle)

    def answer(messages, images):
        return generate(model, processor, [{"messages": messages, "images": images}], max_new_tokens=SHORT)[0]

    (tmp_path / "data").mkdir()
    records = with_answers(held_out, range(9), answer, tmp_path / "data")
    flags += ["--eval_data_path", records, "--eval_generate", "true", "--load_best_model_at_end", "true"]
    done = call(train, *flags, "--metric_for_best_model", "exact_match", "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    scores = {log["step"]: log["eval_exact_match"] for log in history if "eval_loss" in log}
    assert scores[4] == 1 and max(scores[2], scores[6]) < 1
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, weights(middle)[name]), name
    done = evaluated(tmp_path / "run", records, tmp_path / "scores", "--max_new_tokens", SHORT)
    assert done["exact_match"] == 1
    assert "| held-out exact_match, at step 4 | 1.0000 |" in (tmp_path / "run" / "README.md").read_text()


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


def test_scores_that_the_records_do_not_have(held_out, tmp_path):
    """A figure is there if some record is scored by its metric; and a record may be none of its metric's kind."""
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", eval_generate=True)
    records = json.loads((held_out / "chat.json").read_text())
    (tmp_path / "images").symlink_to(held_out / "images")
    for metric, figures in {None: FIGURES, "yes_no": (*FIGURES, "yes_no_accuracy", "yes_f1")}.items():
        records[0] |= {"metric": metric} if metric else {}
        records[0]["conversations"][1]["value"] = "Yes, a red seven."
        (tmp_path / "chat.json").write_text(json.dumps(records))
        dataset = LlavaDataset(tmp_path, held_out=True)
        for args.metric_for_best_model in (None, *figures, "eval_exact_match", "exact_match/odd"):
            check_scores(dataset, args)
        for args.metric_for_best_model in {"anls", "yes_f1", "exact_match/none", "accuracy/odd"} - set(figures):
            with pytest.raises(InputError, match=r"of these held-out records there are loss, .*exact_match"):
                check_scores(dataset, args)
    records[0]["conversations"][1]["value"] = "A red seven."
    (tmp_path / "chat.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match="record 'held_out_0': the metric yes_no needs"):
        check_scores(LlavaDataset(tmp_path, held_out=True), args)
