"""What a resumed run may change, and the sentence that a user reads where it may not."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call
from trainers import TRAIN_TYPES
from training import losses, weights

from train_llava import train
from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.training.resume import BEST, check_resumable, checkpoint_to_resume, write_run

FLAGS = ["--use_cpu", "true", "--report_to", "none", "--logging_steps", 1, "--train_type", "projector"]
FLAGS += ["--num_train_epochs", 2, "--save_strategy", "steps", "--save_steps", 4, "--learning_rate", 1e-3]


def start(llava, data, output, *flags):
    return call(train.main, "--model_name_or_path", llava, "--data_path", data, "--output_dir", output, *FLAGS, *flags)


@pytest.fixture(scope="module")
def stopped(llava, data, tmp_path_factory):
    """A run of 16 steps of 8, and the same one when it had only its checkpoint of step 12."""
    output = tmp_path_factory.mktemp("run")
    done = start(llava, data, output, "--per_device_train_batch_size", 8)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("checkpoint-16", "checkpoint-4", "checkpoint-8"):
        shutil.rmtree(output / name)
    return output


@pytest.fixture
def again(llava, data, stopped, tmp_path):
    """Resumes a copy of it; returns what was said and the folder."""
    shutil.copytree(stopped / "checkpoint-12", tmp_path / "run" / "checkpoint-12")

    def go_on(*flags, path=data):
        where = tmp_path / "run"
        files = {file: file.stat().st_mtime_ns for file in where.rglob("*")}
        flags = ("--per_device_train_batch_size", 8, "--resume_from_checkpoint", "true", *flags)
        done = start(llava, path, where, *flags)
        if done.returncode == 2:  # a refusal changes nothing, and comes before the weights are loaded
            assert {file: file.stat().st_mtime_ns for file in where.rglob("*")} == files
            assert "parameters" not in done.stdout and done.stderr.splitlines()[-1].startswith("error: ")
        return done, where

    return go_on


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_one_process_goes_on_exactly(llava, data, tmp_path, train_type):
    """Without DeepSpeed Trainer loads the weights itself, and would not know their names."""
    flags = ("--per_device_train_batch_size", 8, "--train_type", train_type, "--lora_dropout", 0.1)
    flags += ("--num_train_epochs", 1, "--learning_rate", 1e-2)
    assert start(llava, data, tmp_path / "whole", *flags).returncode == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    done = start(llava, data, tmp_path / "again", *flags, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "again")[name]), name


@pytest.mark.parametrize("train_type, rate", [("none", 1.0), ("use_lora", 1.0)])
def test_the_best_model_is_the_one_that_is_saved(llava, data, tmp_path, train_type, rate):
    """With a rate that grows so far the last checkpoint is not the best."""
    flags = ("--train_type", train_type, "--learning_rate", rate, "--eval_data_path", data, "--eval_strategy", "steps")
    flags += ("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", 16, "--eval_steps", 4)
    flags += ("--load_best_model_at_end", "true", "--per_device_train_batch_size", 8)
    done = start(llava, data, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    best = Path(json.loads((tmp_path / "run" / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.name != "checkpoint-16"
    for name, value in weights(best).items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name


def test_the_newest_checkpoint_is_the_one_of_the_largest_number(tmp_path):
    for step in (8, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint="true")
    assert checkpoint_to_resume(args) == tmp_path / "checkpoint-10"


def test_with_and_without_deepspeed_are_not_mixed(llava, data, runs, stopped, tmp_path):
    output, _ = runs("projector")
    done = start(llava, data, tmp_path / "run", "--resume_from_checkpoint", output / "checkpoint-3")
    assert done.returncode == 2 and "is of a run with DeepSpeed; resume it with --deepspeed" in done.stderr
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args.deepspeed = "ds_zero2.json"  # given to the class, it would make this process a rank of its own
    with pytest.raises(InputError, match="is of a run without DeepSpeed; resume it without --deepspeed"):
        check_resumable(stopped / "checkpoint-12", args, {})


def test_other_micro_batches_go_on_exactly(again, stopped):
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        sizes = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation)
        done, output = again(*sizes)
        assert done.returncode == 0, done.stderr[-2000:]
        assert losses(output) == pytest.approx(losses(stopped), rel=1e-5)
        shutil.rmtree(output / "checkpoint-16")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--per_device_train_batch_size", 4), "is of a run with 8 samples in a step (8 x 1 x 1), this one has 4 (4 x "
         "1 x 1), so that records would be left out or seen twice. Give --per_device_train_batch_size 4 "
         "--gradient_accumulation_steps 2."),
        (("--learning_rate", 2e-3), "Give --learning_rate 0.001, or start a new run"),
        (("--seed", 7), "Give --seed 42, --data_seed 42, or"),
        (("--data_seed", 7), "Give --data_seed 42, or"),
        (("--train_type", "freeze_vision"), "Give --train_type projector, or"),
        (("--optim", "adafactor", "--weight_decay", 0.1), "Give --weight_decay 0.0, --optim adamw_torch"),
        (("--train_sampling_strategy", "sequential"), "Give --train_sampling_strategy random, or"),
        (("--packing", "true", "--tokens_per_batch", 400), "Give no --tokens_per_batch, or"),
        (("--projector_learning_rate", 1e-4), "Give no --projector_learning_rate, or"),
        (("--model_max_length", 40), "was trained on 64 records, and here are"),
    ],
)  # fmt: skip
def test_what_would_change_the_run_is_refused(again, flags, sentence):
    done, _ = again(*flags)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr


def changed(data, folder, change):
    """The same data in another folder, once its records were changed."""
    shutil.copytree(data, folder)
    records = json.loads((folder / "chat.json").read_text())
    change(records)
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


def test_the_best_by_one_metric_is_not_compared_with_another(tmp_path):
    """A run that had none may get one, or go on without."""
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    (tmp_path / "optimizer.pt").touch()
    for before, now in ((None, "exact_match"), ("loss", None), ("exact_match", "exact_match"), ("loss", "exact_match")):
        write_run(tmp_path, {"flags": {BEST: before}, "batch": args.step_factors, "data": {}})
        if (before, now) != ("loss", "exact_match"):
            check_resumable(tmp_path, args, {BEST: now})
    with pytest.raises(InputError, match="Give --metric_for_best_model loss, or"):
        check_resumable(tmp_path, args, {BEST: "exact_match"})


def test_other_data_is_refused_wherever_it_lies(again, data, tmp_path):
    done, output = again(path=changed(data, tmp_path / "moved", lambda records: None))
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(output / "checkpoint-16")
    fewer = changed(data, tmp_path / "fewer", lambda records: records.__delitem__(slice(52, None)))
    done, _ = again(path=fewer)
    assert done.returncode == 2 and "was trained on 64 records, and here are 52" in done.stderr

    def swap(records):
        first, second = (record["conversations"][1] for record in records[:2])
        first["value"], second["value"] = second["value"], first["value"]

    for name, change in {"swapped": swap, "turned": lambda records: records.reverse()}.items():
        done, _ = again(path=changed(data, tmp_path / name, change))
        assert done.returncode == 2 and "on records with other texts, weights or order" in done.stderr
    done, _ = again(path=f"{data}:2")
    assert done.returncode == 2 and "other texts, weights or order" in done.stderr


def test_another_template_is_refused(again, llava, tmp_path):
    shutil.copytree(llava, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are a helpful assistant", "You are a cat"))
    done, _ = again("--model_name_or_path", tmp_path / "model")
    assert done.returncode == 2 and "with another tokenizer, chat template or --model_max_length" in done.stderr


def test_how_often_it_saves_and_logs_is_obeyed(again):
    done, output = again("--save_steps", 1, "--logging_steps", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--save_steps 1 from here on, 4 until now" in done.stdout and "--logging_steps 2 from" in done.stdout
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in range(12, 17)]
    assert re.findall(r"^step +(\d+)/", done.stdout, re.M) == ["14", "16"]


def test_a_run_at_its_end_says_so(again):
    done, output = again("--num_train_epochs", 1)
    assert done.returncode == 0 and "nothing is left to train: the run ends at step 8" in done.stdout
    done, output = again("--num_train_epochs", 3)  # longer than it was meant to be
    assert done.returncode == 0 and len(losses(output)) == 24


def test_a_checkpoint_of_another_version_goes_on_and_says_so(again, stopped, tmp_path):
    (tmp_path / "run" / "checkpoint-12" / "run.json").unlink()
    done, output = again()
    assert (
        done.returncode == 0 and "has no run.json: whether this run sees its records in the same order" in done.stdout
    )
    assert losses(output) == losses(stopped)


def test_the_fingerprint_of_data(data, tmp_path):
    """The same in other files and formats; another for another text, role, id or boundary between texts."""
    records = json.loads((data / "chat.json").read_text())[:20]
    for record in records:
        del record["image"]
        record["conversations"][0]["value"] = "Say something."
    records[3]["conversations"] *= 2

    def print_of(name, records):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return LlavaDataset(tmp_path / name).fingerprint()

    plain = print_of("plain", records)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "chat.json").write_text(json.dumps(records))
    assert LlavaDataset(tmp_path / "list").fingerprint() == plain
    bad = [{"id": "bad", "conversations": []}, *records]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bad))
    assert LlavaDataset(tmp_path / "bad.jsonl", on_bad_record="skip").fingerprint() == plain
    edits = [
        lambda r: r[3].update(id="other"),
        lambda r: r[3]["conversations"][1].update(value="other"),
        lambda r: r[3]["conversations"].insert(0, {"from": "system", "value": ""}),
        lambda r: (r[3]["conversations"][0].update(value="Say somethin"), r[3]["conversations"][1].update(
            value="g." + r[3]["conversations"][1]["value"])),
        lambda r: r[4].update(conversations=[r[3]["conversations"].pop(i) for i in (-2, -1)] + r[4]["conversations"]),
        lambda r: r.reverse(),
    ]  # fmt: skip
    prints = {plain}
    for i, edit in enumerate(edits):
        copy = json.loads(json.dumps(records))
        edit(copy)
        prints.add(print_of(str(i), copy))
    assert len(prints) == 1 + len(edits)
