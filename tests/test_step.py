"""What a step leaves out, and that nothing else changes: tests/test_equality.py compares whole runs."""

import re
import sys

import pytest
import torch
from conftest import ROOT, run
from page_client import free_port
from trainers import trainer_of
from training import FLAGS

from train_llava.data import LlavaCollator
from train_llava.model.load import load_processor
from train_llava.training.step import fill_deepspeed_config, walk_once
from train_llava.training.trainer import LlavaTrainer


def start(llava, data, output, train_type, batch, accumulation, *flags, **variables):
    """Two ranks under ZeRO-2, by tests/counted_reductions.py."""
    where = ["--model_name_or_path", llava, "--data_path", data, "--output_dir", output, "--train_type", train_type]
    sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation, "--max_steps", 2]
    launcher = ["timeout", 90, sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", 2]
    launcher += ["--master_port", free_port(), ROOT / "tests" / "counted_reductions.py"]
    where += ["--use_cpu", "true", "--deepspeed", ROOT / "ds_zero2.json", *FLAGS, "--save_strategy", "no"]
    return run(*launcher, *where, *sizes, *flags, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", **variables)


def counted(*args, **variables):
    """What it prints of each step."""
    done = start(*args, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return re.findall(r"(\d+) reductions, sums in torch.(\w+)", done.stdout)


def test_gradients_are_reduced_once_a_step(llava, data, tmp_path):
    """Of adapters. test_zero2_accumulates_as_it_is_told compares losses and weights with those of one micro-batch."""
    found = counted(llava, data, tmp_path / "four", "use_lora", 1, 4, "--bf16", "true")
    assert found == [("1", "float32"), ("2", "float32")]


@pytest.mark.slow
def test_a_rank_that_fails_within_a_step_ends(llava, data, tmp_path):
    """It does not begin the reduction, for which it would wait for the others for ever."""
    done = start(llava, data, tmp_path / "out", "use_lora", 1, 4, "--bf16", "true", FAIL="1")
    assert "as asked for" in done.stderr and done.returncode not in (0, 124)
    assert "gradients of a whole step" not in done.stdout


@pytest.mark.slow
def test_gradients_of_a_whole_model_are_shared_out_after_each_micro_batch(llava, data, tmp_path):
    """As ZeRO-2 promises, so that no rank holds all of them; summed in fp32."""
    found = counted(llava, data, tmp_path / "out", "freeze_vision", 1, 4, "--bf16", "true", SMALL="0")
    assert found == [("4", "float32"), ("8", "float32")]


@pytest.mark.slow
def test_hours_are_foretold_on_one_rank_of_zero3(llava, data, tmp_path):
    """Where a model that is built, even one without weights, would be shared out among all ranks."""
    zero3 = ("--deepspeed", ROOT / "ds_configs" / "zero3.json")
    done = start(llava, data, tmp_path / "out", "use_lora", 4, 1, *zero3, KIND="h100-80g")
    assert done.returncode == 0 and "hours, as estimate counts" in done.stdout, done.stderr[-2000:]


def test_what_a_deepspeed_config_says_stays():
    few, many = {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": 2}}
    fill_deepspeed_config(few, "use_lora", sums_in_bf16=False)
    fill_deepspeed_config(many, "freeze_vision", sums_in_bf16=True)
    assert few == {"zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 5e7}}
    assert many["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 2e8}
    assert many["data_types"] == {"grad_accum_dtype": "fp32"}
    own = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "data_types": {"grad_accum_dtype": "bf16"}}
    fill_deepspeed_config(own, "projector", sums_in_bf16=True)
    assert own["zero_optimization"]["overlap_comm"] and own["data_types"] == {"grad_accum_dtype": "bf16"}
    for other in ({}, {"zero_optimization": {"stage": 0}}):
        before = str(other)
        fill_deepspeed_config(other, "none", sums_in_bf16=True)
        assert str(other) == before


def test_modules_are_walked_through_when_the_mode_changes():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).train()
    model[0].eval()  # as the layers of a model that PEFT has just wrapped
    walks = []
    plain = model.train
    model.train = lambda mode=True: walks.append(mode) or plain(mode)
    walk_once(model)
    assert model.train() is model and model[0].training
    model.train()
    model.eval()
    assert not model[1].training and walks == [True, False]
    model.train(True)
    assert model[0].training and walks == [True, False, True]


def test_a_length_is_rounded_up_and_the_loss_is_the_same(llava, data, tmp_path):
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector")
    examples = [trainer.train_dataset[i] for i in range(3)]
    found = []
    for multiple in (1, 32):
        collator = LlavaCollator(load_processor(llava), for_trainer=True, multiple=multiple)
        batch = collator(examples)
        found.append((batch["input_ids"].shape[1], trainer.compute_loss(trainer.model.train(), batch).item()))
    (length, loss), (rounded, other) = found
    assert rounded == -(-length // 32) * 32 > length and loss == pytest.approx(other, rel=1e-6)
