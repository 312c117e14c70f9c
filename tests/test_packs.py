"""--tokens_per_batch: packs against a packer that looks at every pack, and a run against the plain model."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from trainers import trainer_of
from training import losses, weights
from transformers import LlavaForConditionalGeneration

from train_llava import train
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.ingest.bad_images import BadImages
from train_llava.model.load import load_processor
from train_llava.planning.workload import fullest_pack
from train_llava.processing.packs import Packs, best_fit_decreasing
from train_llava.training.sampler import PackBatches, PackSampler, SetEpochCallback
from train_llava.training.trainer import LlavaTrainer


def one_by_one(lengths, budget):
    """Best fit decreasing, looking at every pack for every conversation."""
    packs = []
    for length in sorted(lengths, reverse=True):
        fits = [pack for pack in packs if sum(pack) + length <= budget]
        max(fits, key=sum).append(length) if fits else packs.append([length])
    return packs


@pytest.mark.parametrize("budget", [1, 7, 60, 400])
def test_packs_are_those_of_a_packer_that_looks_at_all(budget):
    rng = np.random.default_rng(budget)
    for count in (1, 5, 80, 300):
        lengths = rng.integers(1, budget + 1, count) if count % 2 else rng.choice(rng.integers(1, budget + 1, 4), count)
        packs, slow = best_fit_decreasing(lengths, budget), one_by_one(lengths.tolist(), budget)
        assert sorted(map(sum, packs)) == sorted(map(sum, slow))  # equally full packs are interchangeable
        assert Counter(length for pack in packs for length in pack) == Counter(lengths.tolist())


def test_very_many_conversations_are_packed_at_once():
    """By their lengths, not one by one; hardly any room is left."""
    lengths = np.random.default_rng(0).integers(30, 2049, 300_000)
    packs = Packs(lengths, 8192).fill(lengths)
    sums = [int(lengths[pack].sum()) for pack in packs]
    assert max(sums) <= 8192 and lengths.sum() / len(packs) > 0.999 * 8192
    assert sums == sorted(sums, reverse=True) and len(np.unique(np.concatenate(packs))) == 300_000


LENGTHS = np.random.default_rng(1).choice([20, 30, 31, 47, 90, 100, 250], 200)


def packs_of(seed=3, budget=300, batch=8, times=1):
    records = np.repeat(np.arange(200), times)
    return PackSampler(records, LENGTHS[records], budget, batch, seed)


def epoch(order, number):
    order.set_epoch(number)
    return list(order)


@pytest.mark.parametrize("times", [1, 2])
def test_each_epoch_has_every_record_and_as_many_packs(times):
    order = packs_of(times=times)
    epochs = [epoch(order, number) for number in range(4)]
    for packs in epochs:
        assert len(packs) == len(order) and max(LENGTHS[pack].sum() for pack in packs) <= 300
        assert Counter(record for pack in packs for record in pack) == dict.fromkeys(range(200), times)
    shared = [{frozenset(pack) for pack in packs} for packs in epochs]
    assert len(shared[0] & shared[1]) < len(shared[0]) / 2  # others together
    assert epochs[1] == epoch(packs_of(times=times), 1) != epoch(packs_of(4, times=times), 1)


def test_the_fullest_packs_come_first():
    sums = [[int(LENGTHS[pack].sum()) for pack in epoch(packs_of(), number)] for number in (0, 1)]
    assert sums[0][:8] == sorted(sums[0], reverse=True)[:8]
    assert sums[1] != sorted(sums[1], reverse=True) and sorted(sums[1]) == sorted(sums[0])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("accumulation", "ranks"), [(1, 1), (8, 1), (4, 2), (2, 4), (5, 3), (40, 8)])
def test_every_pack_is_in_one_step_of_one_rank(accumulation, ranks, drop_last):
    """Equally many micro-batches everywhere; a step's packs depend on how many it has, not on who has which."""
    step, order = accumulation * ranks, packs_of(batch=accumulation * ranks)
    loaders = [PackBatches(packs_of(batch=step), accumulation, ranks, rank, drop_last) for rank in range(ranks)]
    batches, packs = [list(loader) for loader in loaders], list(order)
    steps = len(order) // step if drop_last else -(-len(order) // step)
    assert {len(each) for each in batches} == {len(loader) for loader in loaders} == {steps * accumulation}
    assert {loader.samples for loader in loaders} == {200}
    for number in range(steps):
        part = [batch for each in batches for batch in each[number * accumulation : (number + 1) * accumulation]]
        assert sorted(filter(None, part)) == sorted(packs[number * step : (number + 1) * step])


@pytest.fixture(scope="module")
def mixed(data, tmp_path_factory):
    """The 64 records with an image, and 40 of text alone, from very short ones to longer ones."""
    talk = tmp_path_factory.mktemp("talk") / "talk.jsonl"
    records = []
    for i in range(40):
        turns = [{"role": "user", "content": "Tell me. " * (i % 4)}, {"role": "assistant", "content": "a zero " * i}]
        turns[0]["content"] += f"Now {i}."
        turns[1]["content"] += "and a nine."
        records.append(json.dumps({"id": f"talk{i}", "messages": turns}))
    talk.write_text("\n".join(records))
    return [data, talk]


def test_an_epoch_has_the_losses_of_the_plain_model(llava, data, mixed, tmp_path):
    """Sum over all supervised tokens at a learning rate of zero: packs of images, of text alone, and the empty
    micro-batches at the end, beside plain transformers on padded batches."""
    flags = {"tokens_per_batch": 220, "gradient_accumulation_steps": 4, "learning_rate": 0.0, "logging_steps": 1}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "none", max_steps=8, **flags)
    processor, seen = load_processor(llava), []
    collate = LlavaCollator(processor, for_trainer=True, packing=True)
    trainer.train_dataset = LlavaDataset(mixed).filter_by_length(collate.encoder)

    def look(examples):
        batch = collate(examples)
        seen.append((batch["counts"], batch["input_ids"].shape))
        return batch

    trainer.data_collator = look
    trainer.train()
    done = trainer.state.log_history[-1]
    assert done["epoch"] == 1 and trainer.num_examples(trainer.get_train_dataloader()) == 104
    assert done["train_samples_per_second"] * done["train_runtime"] == pytest.approx(104, rel=0.01)
    counts = [count for count, _ in seen]
    assert all(shape[0] == 1 and count["tokens"] <= 220 for count, shape in seen)
    assert {count["images"] > 0 for count in counts if count["tokens"]} == {True, False} and counts[-1]["tokens"] == 0
    assert min(count["tokens"] for count in counts[:4]) > 200
    answers = np.reshape([count["answer_tokens"] for count in counts], (-1, 4)).sum(axis=1)
    ours = [log["loss"] for log in trainer.state.log_history if "loss" in log]

    plain, total, tokens = LlavaForConditionalGeneration.from_pretrained(llava), 0.0, 0
    for start in range(0, 104, 26):
        batch = LlavaCollator(processor)([trainer.train_dataset[i] for i in range(start, start + 26)])
        number = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            total, tokens = total + plain(**batch).loss.item() * number, tokens + number
    assert answers.sum() == tokens and np.dot(ours, answers) == pytest.approx(total, rel=1e-5)


def test_the_loader_knows_weights_and_epochs(llava, data, mixed, tmp_path):
    """Each record as often as its source's weight says, in other packs when the trainer begins the next epoch."""
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector", tokens_per_batch=220)
    encoder = LlavaCollator(load_processor(llava)).encoder
    trainer.train_dataset = LlavaDataset([data, f"{mixed[1]}:3"]).filter_by_length(encoder)
    loader, epochs = trainer.get_train_dataloader(), []
    for trainer.state.epoch in (0, 1):
        SetEpochCallback().on_epoch_begin(trainer.args, trainer.state, trainer.control, train_dataloader=loader)
        epochs.append(list(loader.batch_sampler))
        seen = Counter(record for batch in epochs[-1] for record in batch)
        assert [seen[i] for i in range(104)] == [1] * 64 + [3] * 40
        assert loader.batch_sampler.samples == seen.total()
    assert epochs[0] != epochs[1]


def test_the_estimate_knows_the_largest_pack(llava, mixed):
    """Beside every batch of two epochs as the collator makes it, the grey image of a text included."""
    collate = LlavaCollator(load_processor(llava), for_trainer=True, packing=True)
    for paths in (mixed, mixed[:1], mixed[1:]):
        dataset = LlavaDataset(paths).filter_by_length(collate.encoder)
        order = PackSampler(np.arange(len(dataset)), dataset.lengths, 220, 1, 0)
        batches = [collate([dataset[i] for i in pack]) for number in (0, 1) for pack in epoch(order, number)]
        largest = fullest_pack(dataset, collate.encoder, 220)
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        assert largest.length == 1 and longest <= largest.samples <= longest + 4  # an image here is 4 tokens
        assert largest.images == max(len(batch["pixel_values"].data) for batch in batches)
        answers = [batch["counts"]["answer_tokens"] for batch in batches]
        assert 0.9 * max(answers) <= largest.answers <= 220


def test_a_substitute_does_not_outgrow_its_pack(llava, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    encoder = LlavaCollator(load_processor(llava)).encoder
    dataset = LlavaDataset(tmp_path / "data", bad_images=BadImages(tmp_path / "bad.jsonl", 64))
    dataset = dataset.filter_by_length(encoder)
    assert len(set(dataset.lengths[:40])) > 2
    for record in dataset.records.select(range(40)):
        Path(record["images"][0]["path"]).write_bytes(b"no image")
    seen = [len(encoder.encode(dataset[i]["messages"])[0]) for i in range(40)]
    shortest = dataset.lengths[40:].min()  # of those that are left
    assert seen != dataset.lengths[:40].tolist() and (seen <= np.maximum(dataset.lengths[:40], shortest)).all()


FLAGS = ("--use_cpu", "true", "--report_to", "none", "--logging_steps", 1, "--train_type", "use_lora", "--seed", 5)
FLAGS += ("--packing", "true", "--num_train_epochs", 2, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-2)


def start(llava, paths, output, *flags):
    where = ("--model_name_or_path", llava, "--data_path", *paths, "--output_dir", output)
    return call(train.main, *where, *FLAGS, *flags)


@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly(llava, mixed, tmp_path):
    """In the second epoch, with another number of workers; with another budget or none it is refused."""
    budget, saves = ("--tokens_per_batch", 1000), ("--save_strategy", "steps", "--save_steps", 5)
    done = start(llava, mixed, tmp_path / "whole", *budget, *saves)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 packs a step (1 x 2 x 1), each of at most 1,000 tokens" in done.stdout
    assert "the largest --tokens_per_batch that fits is" in done.stdout
    steps = len(losses(tmp_path / "whole"))
    assert 5 > steps / 2 > 2
    again, flags = tmp_path / "again", (*saves, "--resume_from_checkpoint", "true")
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", again / "checkpoint-5")
    done = start(llava, mixed, again, *budget, *flags, "--dataloader_num_workers", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(again) == losses(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(again)[name]), name
    for other in ((), ("--tokens_per_batch", 500)):
        done = start(llava, mixed, again, *other, *flags)
        assert done.returncode == 2 and "Give --tokens_per_batch 1000, or start a new run" in done.stderr
    done = start(llava, mixed, again, *budget, *flags, "--gradient_accumulation_steps", 3)
    assert done.returncode == 2 and "with 2 packs in a step (1 x 2 x 1), this one has 3 (1 x 3 x 1)" in done.stderr
    assert done.stderr.endswith("Give --gradient_accumulation_steps 2.\n")


@pytest.mark.parametrize(
    ("weight", "flags", "sentence"),
    [
        ("", ("--packing", "false"), "Add --packing true, or leave it out"),
        ("", ("--train_sampling_strategy", "group_by_length"), "group_by_length: --tokens_per_batch itself"),
        ("", ("--train_sampling_strategy", "sequential"), "sequential: --tokens_per_batch itself"),
        ("", ("--streaming", "true"), "--streaming true: --tokens_per_batch takes the records"),
        ("", ("--tokens_per_batch", 0), "--tokens_per_batch starts at 1"),
        ("", ("--tokens_per_batch", 48), "Give at least 60, or cut it with --model_max_length 48"),
        (":1.5", (), ":1.5 other records are drawn in each epoch, and there would be more or fewer batches"),
    ],
)
def test_what_has_no_meaning_is_refused(llava, data, tmp_path, weight, flags, sentence, monkeypatch):
    monkeypatch.setattr(train, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    done = start(llava, [f"{data}{weight}"], tmp_path / "run", "--tokens_per_batch", 400, *flags)
    assert done.returncode == 2 and sentence in done.stderr and not (tmp_path / "run").exists(), done.stderr
