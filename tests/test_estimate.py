"""What a run will need, against a simulated step, DeepSpeed's own estimators, and the data counted by hand."""

import json
import re
from dataclasses import replace
from unittest import mock

import layouts
import numpy as np
import pytest
import torch
from conftest import ROOT, call
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from trainers import TRAIN_TYPES
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

import train_llava.estimate
import train_llava.train
from benchmarks.memory.simulate import peak_of_step
from train_llava import check_data, train
from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.config import compose_config
from train_llava.model.freeze import LoraSettings
from train_llava.model.load import load_processor
from train_llava.model.loss import CHUNK
from train_llava.planning.activations import Batch
from train_llava.planning.kernels import Way
from train_llava.planning.memory import MemoryModel, ZeroConfig
from train_llava.planning.meta_model import meta_model
from train_llava.planning.speed import hours
from train_llava.planning.workload import Workload, longest_batch
from train_llava.training.sampler import LlavaSampler
from train_llava.training.step import fill_deepspeed_config

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP = CLIPVisionConfig(**SHAPE, image_size=112, patch_size=14)
SIGLIP = SiglipVisionConfig(**SHAPE, image_size=112, patch_size=14)
TEXT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 4096}
QWEN = Qwen2Config(**TEXT, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
LLAMA = LlamaConfig(**TEXT, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False)


def step_of(config, train_type, dtype=torch.bfloat16, lora=None):
    return MemoryModel.of(meta_model(config, dtype, train_type, lora))


DORA = [("use_lora", LoraSettings(use_dora=True, lora_dropout=dropout)) for dropout in (0.0, 0.05)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("train_type", "lora"), [*((train_type, None) for train_type in TRAIN_TYPES), *DORA])
@pytest.mark.parametrize(("config", "dtype"), [((CLIP, QWEN), torch.bfloat16), ((SIGLIP, LLAMA), torch.float32)])
def test_a_simulated_step_needs_what_is_estimated(config, dtype, train_type, lora, checkpointing):
    """Fake tensors: torch itself says what it keeps."""
    batch = Batch(8, 96, 8, 8 * 20)
    simulated = peak_of_step(compose_config(*config), train_type, batch, checkpointing, dtype, lora)
    step = step_of(compose_config(*config), train_type, dtype, lora)
    assert step.weights == simulated["weights"]
    kept = step.activations(batch, checkpointing, until=len(step.stages))
    assert kept == pytest.approx(simulated["kept"], rel=0.1)
    peak = step.weights + step.backward(batch, ZeroConfig(deepspeed=False), checkpointing)
    assert peak == pytest.approx(simulated["peak"], rel=0.1)


def test_the_last_mlp_runs_at_answers_alone():
    """SwiGLU keeps four rows as wide as its inside; the norm before it one in fp32, one normalised, and its output."""
    step = step_of(compose_config(CLIP, QWEN), "none")
    few, all_tokens = (step.activations(Batch(1, 96, 1, answers), False) for answers in (1, 96))
    assert all_tokens - few == 95 * (4 * 2 * 1408 + (4 + 2 + 2) * 512)


def test_stage_1_shares_out_the_optimizer_alone():
    zero = ZeroConfig(1, 8)
    assert (zero.of_weights(80), zero.of_gradients(80), zero.of_optimizer(80)) == (80, 80, 10)


@pytest.mark.parametrize("gpus", [1, 8])
def test_states_are_those_of_deepspeeds_estimator(gpus):
    step = MemoryModel.of(meta_model(compose_config(CLIP, QWEN), torch.bfloat16, "none").requires_grad_(True))
    _, whole = estimate_zero2_model_states_mem_needs(step.all_weights, gpus, cpu_offload=False)
    assert step.states_at_step(ZeroConfig(2, gpus)) == pytest.approx(whole, rel=1e-6)
    host, gpu = estimate_zero2_model_states_mem_needs(step.all_weights, 1, additional_buffer_factor=1)
    offload = ZeroConfig(2, 1, offload=True)
    assert (step.on_host(offload), step.states_at_step(offload)) == (host, gpu)


@pytest.mark.parametrize(("train_type", "bucket"), [("freeze_vision", 2 * 2e8), ("use_lora", 5e7)])
def test_the_repositorys_configs_are_read(train_type, bucket):
    ways = train_llava.estimate.ZERO_CONFIGS
    plain = {way: train_llava.estimate.zero_config(way, 8, 1000, train_type) for way in ways}
    assert [(zero.stage, zero.offload) for zero in plain.values()] == [(0, False), (2, False), (2, True), (3, False)]
    assert plain["ZeRO-2"].bucket == bucket  # two take turns where the whole model is trained
    assert plain["ZeRO-3"].bucket == 2 * 1000**2  # "auto"
    assert [zero.gathered for zero in plain.values()] == [0, 0, 0, 1e9]
    files = {"ZeRO-2": "ds_zero2.json", "offload": "ds_configs/zero2_offload.json", "ZeRO-3": "ds_configs/zero3.json"}
    for way, name in files.items():  # they are not in an installed package
        settings = json.loads((ROOT / name).read_text())
        fill_deepspeed_config(settings, train_type, sums_in_bf16=False)
        assert ZeroConfig.read(settings, 8, 1000) == plain[way]
    own = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 5e7}}
    assert ZeroConfig.read(own, 8).gathered == 5e7


def test_four_bits_take_a_quarter_and_their_scales():
    config = compose_config(CLIP, QWEN)
    model = meta_model(config, torch.bfloat16, "use_lora")
    packed = 6 * (4 * 512 * 512 + 3 * 512 * 1408)
    saved = MemoryModel.of(model).weights - MemoryModel.of(model, in_4bit=True).weights
    assert saved == pytest.approx(packed * (16 - 4.127) / 8, rel=1e-4)  # bits per weight, as the QLoRA paper has them


def test_the_largest_batch_is_the_largest():
    step, zero, one = step_of(compose_config(CLIP, QWEN), "use_lora"), ZeroConfig(2, 4), Batch(1, 96, 1, 20)
    found = []
    for budget in np.linspace(1, 3, 10) * 2**30:
        found.append(step.largest_batch(one, zero, False, budget))
        assert step.peak(one.times(found[-1]), zero, False) <= budget < step.peak(one.times(found[-1] + 1), zero, False)
    assert len(set(found)) == 10 and {most % 2 for most in found} == {0, 1}
    assert step.largest_batch(one, zero, False, step.weights) == 0


def test_a_small_batch_is_at_its_fullest_in_the_optimizers_step():
    """Then gradients, fp32 gradients and optimizer are all there, and no activations."""
    memory, zero, batch = step_of(compose_config(CLIP, QWEN), "none"), ZeroConfig(), Batch(1, 1, 0, 1)
    assert memory.backward(batch, zero, False) < memory.trained * memory.element + 10**6
    assert memory.peak(batch, zero, False) == memory.states_at_step(zero) + memory.buffers(zero)


def test_logits_of_long_answers_come_in_chunks():
    memory = step_of(compose_config(CLIP, QWEN), "use_lora")
    chunk, long = (memory.logits(Batch(1, 9000, 1, answers)) for answers in (CHUNK, 8000))
    assert long == chunk > memory.logits(Batch(1, 9000, 1, CHUNK - 1))


def test_the_workload_is_that_of_the_data(llava, data):
    collator = LlavaCollator(load_processor(llava), for_trainer=True)
    dataset = LlavaDataset(data).filter_by_length(collator.encoder)
    counts = [collator([dataset[i]])["counts"] for i in range(len(dataset))]
    workload = Workload.of(dataset, collator.encoder, 4)
    assert workload.records == 64
    for name, value in workload.average.items():
        assert value == pytest.approx(sum(count[name] for count in counts) / 64)
    longest = sorted(counts, key=lambda count: -count["tokens"])[:4]
    assert workload.batch.length == longest[0]["tokens"] and workload.batch.images == 4
    assert workload.batch.answers <= sum(sorted(count["answer_tokens"] for count in counts)[-4:])


def test_the_largest_batch_is_that_of_the_longest_records(llava, tmp_path):
    """Which may have two images, one or none, and answers of any length."""
    layouts.mix665k(tmp_path / "mix"), layouts.cauldron(tmp_path / "cauldron")
    collator = LlavaCollator(load_processor(llava), for_trainer=True)
    dataset = LlavaDataset([tmp_path / "mix", tmp_path / "cauldron"]).filter_by_length(collator.encoder)
    counts = [collator([dataset[i]])["counts"] for i in range(len(dataset))]
    batch = longest_batch(dataset, collator.encoder, 5)
    longest = sorted(counts, key=lambda count: -count["tokens"])[:5]
    assert {count["images"] for count in counts} == {0, 1, 2}
    assert (batch.samples, batch.length) == (5, longest[0]["tokens"])
    for name, value in (("images", batch.images), ("answer_tokens", batch.answers)):
        assert value == sum(count[name] for count in longest) != sum(count[name] for count in counts[:5])


def test_the_workload_counts_records_as_often_as_they_are_seen(llava, tmp_path):
    """`short long:0.01`: what an epoch of the sampler holds, on average."""
    for name, words, count in (("short", 5, 600), ("long", 400, 400)):
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "word " * words}]
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * count)
    collator = LlavaCollator(load_processor(llava), for_trainer=True)
    dataset = LlavaDataset([tmp_path / "short.jsonl", f"{tmp_path}/long.jsonl:0.01"]).filter_by_length(collator.encoder)
    order = LlavaSampler(dataset.sizes, [1, 0.01], dataset.lengths, 8, False, 0)
    seen = dataset.lengths[list(order)]
    average = Workload.of(dataset, collator.encoder, 4).average
    assert average["tokens"] == pytest.approx(seen.mean()) and average["token_pairs"] == pytest.approx((seen**2).mean())
    assert average["answer_tokens"] == pytest.approx(seen.mean() - (seen.min() - 27), rel=0.5)
    assert f"{seen.mean():.0f} tokens on average" in dataset.summary()


def test_conversations_beyond_the_positions_are_named(llava, tmp_path):
    """By the estimate, by check_data and in the training's summary, with the flag that cuts them."""
    for i, words in enumerate((5, 700)):
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a " * words}]
        turns += [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a " * words}]
        with (tmp_path / "talk.jsonl").open("a") as file:
            file.write(json.dumps({"id": i, "messages": turns}) + "\n")
    where = ("--model_name_or_path", llava, "--data_path", tmp_path / "talk.jsonl")
    done = estimate(*where)
    assert "more than the model's 512 positions: cut such records with --model_max_length 512" in done.stdout
    done = call(check_data.main, *where, "--output_dir", tmp_path / "report", "--workers", 0)
    assert "1 records have more tokens than the model's 512 positions" in done.stdout
    flags = ("--output_dir", tmp_path / "run", "--use_cpu", "true", "--max_steps", 1, "--report_to", "none")
    done = call(train.main, *where, *flags)
    assert done.returncode == 0, done.stderr
    assert "1 records have more tokens than the model's 512 positions" in done.stdout
    for command in (estimate, lambda *f: call(train.main, *f, *flags, "--overwrite_output_dir", "true")):
        assert "positions" not in command(*where, "--model_max_length", 512).stdout


def estimate(*flags):
    return call(train_llava.estimate.main, *flags)


def test_two_config_files_are_enough(tmp_path):
    done = estimate(*config_files(tmp_path, "--train_type", "freeze_vision", "--num_gpus", 4))
    assert done.returncode == 0, done.stderr
    for name in (
        "weights",
        "gradients",
        "optimizer states",
        "activations",
        "logits",
        "temporary",
        "peak",
        "disk",
        "FLOP",
    ):
        assert name in done.stdout
    assert all(kind in done.stdout for kind in train_llava.estimate.GPUS)
    cells = [line.split() for line in done.stdout.splitlines()]
    for strategy in TRAIN_TYPES:  # a model this small fits everywhere
        assert next(row for row in cells if row and row[0] == strategy and len(row) == 7)


def test_a_folder_and_its_data(llava, data):
    """Speed, utilisation and hours belong together."""
    done = estimate("--model_name_or_path", llava, "--data_path", data, "--gpu", "h100-80g")
    assert done.returncode == 0, done.stderr
    assert "epoch of 64" in done.stdout and "as counted" in done.stdout
    each = float(re.search(r"operations: ([\d.e+-]+) TFLOP", done.stdout)[1]) * 1e12
    fits, *_, speed, mfu, hours, limit = row_of(done.stdout, "h100-80g")
    assert fits == "yes" and float(mfu.rstrip("%")) / 100 == pytest.approx(float(speed) * each / 989e12, abs=0.006)
    assert float(hours) == pytest.approx(64 / float(speed) / 3600, rel=0.01) and float(limit) < float(hours)


def row_of(printed, kind):
    """The cells behind the first line that begins with this kind of GPU."""
    return next(line.split() for line in printed.splitlines() if line.startswith(kind))[1:]


def test_hours_and_speed_on_several_gpus(tmp_path):
    """Of one GPU and of four, which are nearly four times as fast."""
    models = config_files(tmp_path, "--gpu", "a100-80g", "--per_device_train_batch_size", 16)
    rows = [row_of(estimate(*models, "--num_gpus", gpus).stdout, "a100-80g") for gpus in (1, 4)]
    (one, hours), (four, fewer) = ((float(row[3]), float(row[5])) for row in rows)
    assert 3.9 < four / one < 4.001 and one * hours * 3600 == pytest.approx(595_375, rel=0.01)
    assert four * fewer * 3600 == pytest.approx(595_375, rel=0.01)
    assert abs(int(rows[0][4][:-1]) - int(rows[1][4][:-1])) <= 1  # MFU, of each GPU


def config_files(folder, *flags):
    """The flags of an estimate for the two small configs."""
    for name, config in (("vision", CLIP), ("language", QWEN)):
        (folder / f"{name}.json").write_text(json.dumps(config.to_dict()))
    models = ("--vision_model_name_or_path", folder / "vision.json")
    return *models, "--language_model_name_or_path", folder / "language.json", *flags


def test_hours_are_those_with_checkpointing_where_nothing_else_fits(tmp_path, monkeypatch):
    """On GPUs with room for a step, for one with checkpointing alone, and for none."""
    config, batch = compose_config(CLIP, QWEN), Batch(4, 620, 4, 4 * (620 - 64))
    padded = replace(batch, length=640)
    zero = train_llava.estimate.zero_config("ZeRO-2", 1, 512, "projector")
    without, with_it = (step_of(config, "projector").peak(batch, zero, on) for on in (False, True))
    rooms = {"a100-80g": without, "a100-40g": (without + with_it) / 2, "rtx4090-24g": with_it * 0.99}
    monkeypatch.setattr(train_llava.estimate, "memory_budget", rooms.get)
    printed = estimate(*config_files(tmp_path, "--train_type", "projector", "--gpu", *rooms)).stdout
    plain, checkpointed, none = (row_of(printed, kind) for kind in rooms)
    assert (plain[0], checkpointed[0], none[0], *none[-4:]) == ("yes", "c", "no", *"----")
    for row, kind, on in ((plain, "a100-80g", False), (checkpointed, "a100-40g", True)):
        wanted = hours(config, "projector", padded, 595_375, 1, kind, way=Way(checkpointing=on))
        assert float(row[5]) == pytest.approx(wanted, rel=0.01)
    assert float(checkpointed[5]) > 1.1 * hours(config, "projector", padded, 595_375, 1, "a100-40g")


def test_wrong_usage_is_named(llava, data, tmp_path):
    def refused(*flags):
        done = estimate(*flags)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "give either --model_name_or_path or both" in refused("--train_type", "none")
    assert "no config.json here" in refused("--model_name_or_path", tmp_path)
    assert "no config to be read there" in refused("--model_name_or_path", tmp_path / "config.json")
    assert "--mfu is gone: hours rest on the kernels" in refused("--model_name_or_path", llava, "--mfu", 0.4)
    assert "start at 1" in refused("--model_name_or_path", llava, "--num_gpus", 0)
    assert "no tokenizer" in refused("--model_name_or_path", llava / "config.json", "--data_path", data)
    assert "goes with --train_type use_lora" in refused(
        "--model_name_or_path", llava, "--train_type", "none", "--load_in_4bit", "true"
    )
    assert "there are rtx4090-24g, l40s-48g" in refused("--model_name_or_path", llava, "--gpu", "abacus")


def test_a_training_says_its_verdict_before_it_loads_weights(llava, data, tmp_path):
    flags = ["--model_name_or_path", llava, "--data_path", data, "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    with mock.patch.object(train_llava.train, "load", side_effect=InputError("now it loads")):
        done = call(train_llava.train.main, *flags)
    assert done.returncode == 2 and "now it loads" in done.stderr
    assert re.search(r"memory: .* GB of .* GB free per rank \(weights .*\): fits; the largest batch", done.stdout)
