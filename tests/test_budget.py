"""What of a machine a run may take: its share of the memory, and room on the disk for the checkpoints to come."""

import shutil
from functools import partial

import psutil
import pytest
import torch
from conftest import call
from trainers import trainer_of
from transformers import TrainerControl, TrainerState

from train_llava import train
from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.config import load_llava_config
from train_llava.model.load import load_processor
from train_llava.planning import budget
from train_llava.planning.arguments import LlavaTrainingArguments, ModelArguments
from train_llava.planning.budget import check_memory_budget, checkpoint_bytes, free_memory, model_bytes
from train_llava.planning.workload import longest_batch
from train_llava.training.callbacks import DiskSpaceCallback
from train_llava.training.trainer import LlavaTrainer


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_share_the_memory_of_their_machine(tmp_path, monkeypatch, name):
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv(name, "4")
    assert free_memory(args) == pytest.approx(psutil.virtual_memory().available / 4, rel=0.1)


def test_the_disk_has_room_for_all_that_is_there_at_once(llava, data, tmp_path, monkeypatch):
    """The checkpoints that are kept, one more while it is written, and the model; of a resumed run those to come."""
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "none", save_strategy="steps", save_total_limit=2)
    each, last = checkpoint_bytes(trainer.model, deepspeed=False), model_bytes(trainer.model)

    def begin(step, free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
        state = TrainerState(max_steps=60, global_step=step, save_steps=10)
        DiskSpaceCallback().on_train_begin(trainer.args, state, TrainerControl(), model=trainer.model)

    for step, checkpoints in ((0, 3), (30, 3), (40, 2), (50, 1)):
        begin(step, checkpoints * each + last)
        with pytest.raises(InputError, match=f"{checkpoints} checkpoints of .* will be there at once"):
            begin(step, checkpoints * each + last - 1)


def test_a_full_disk_is_found_before_weights_are_loaded(llava, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("weights were loaded"))
    flags = ("--model_name_or_path", llava, "--data_path", data, "--output_dir", tmp_path / "out")
    done = call(train.main, *flags, "--use_cpu", "true", "--report_to", "none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "the disk has 0 GB free" in done.stderr
    assert not (tmp_path / "out").exists()


def test_auto_leaves_a_tenth_of_the_memory_free(llava, data, tmp_path, monkeypatch):
    """The largest of the sizes that may be given by hand whose bytes are nine tenths of what is free, or less."""
    encoder = LlavaCollator(load_processor(llava)).encoder
    longest = partial(longest_batch, LlavaDataset(data).filter_by_length(encoder), encoder)

    def check(size):
        flags = {"use_cpu": True, "global_batch_size": 32, "per_device_train_batch_size": size}
        args = LlavaTrainingArguments(output_dir=str(tmp_path), **flags)
        given = (load_llava_config(llava), torch.float32, longest, ModelArguments(str(llava)), args)
        return *check_memory_budget(*given), args

    needed = {size: check(size)[1] for size in (1, 2, 4, 8, 16, 32)}
    assert sorted(needed.values()) == [*needed.values()]
    for size, smaller in ((1, 1), (2, 1), (8, 4), (32, 16)):
        for free, expected in ((needed[size] / 0.9 + 1, size), (needed[size] / 0.9 - 1, smaller)):
            monkeypatch.setattr(budget, "free_memory", lambda args, free=free: free)
            line, told, args = check("auto")
            assert (args.train_batch_size, told, args.step_size) == (expected, needed[expected], 32)
            assert line.endswith(f"; --per_device_train_batch_size auto is {expected}")
