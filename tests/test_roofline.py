"""Kernels of a step and their times, against torch's own counts, whole depths, hand-made figures and published runs."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trainers import TRAIN_TYPES
from transformers import CLIPVisionConfig, Gemma3TextConfig, Qwen2Config, SiglipVisionConfig

from benchmarks.full_size import kernels as full_size_kernels
from benchmarks.full_size import published
from benchmarks.result import RESULTS
from train_llava.model.config import compose_config
from train_llava.model.freeze import LoraSettings
from train_llava.model.loss import patch_forward
from train_llava.model.structure import llava_in
from train_llava.planning import kernels as kernels_module
from train_llava.planning.activations import Batch
from train_llava.planning.arguments import LlavaTrainingArguments, ModelArguments
from train_llava.planning.foretell import foretell
from train_llava.planning.kernels import Kernel, KernelCounter, Way, count_kernels, inputs_of, micro_step
from train_llava.planning.meta_model import meta_model
from train_llava.planning.roofline import GPUS, gpu_seconds, kernel_seconds, kind_of_gpu, limit_seconds, product_seconds
from train_llava.planning.speed import Speed, hours
from train_llava.planning.workload import Workload, padded_length

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
CLIP = CLIPVisionConfig(**SHAPE, num_hidden_layers=5, image_size=56, patch_size=14)
SIGLIP = SiglipVisionConfig(**SHAPE, num_hidden_layers=3, image_size=56, patch_size=14)
TEXT = SHAPE | {"num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False}
QWEN = Qwen2Config(**TEXT, num_hidden_layers=6)
GEMMA = Gemma3TextConfig(**TEXT, num_hidden_layers=7, head_dim=16, sliding_window=16, sliding_window_pattern=3)
BATCH = Batch(2, 48, 2, 14)
PLAIN = Way(liger=False, fused_lora=False)


@pytest.mark.parametrize(
    ("halves", "train_type", "way"),
    [
        ((CLIP, QWEN), "use_lora", Way()),
        ((CLIP, QWEN), "freeze_vision", Way(checkpointing=True)),
        ((CLIP, QWEN), "none", Way()),
        ((CLIP, QWEN), "projector", PLAIN),
        ((SIGLIP, GEMMA), "none", PLAIN),  # layers of two kinds
        ((CLIP, QWEN), "use_lora", Way(checkpointing=True, lora=LoraSettings(vision_lora=True, train_projector=False))),
    ],
)
def test_a_few_layers_stand_for_all(halves, train_type, way):
    config = compose_config(*halves)
    assert count_kernels(config, train_type, BATCH, way) == micro_step(config, train_type, BATCH, way)


def test_a_pattern_may_choose_single_layers():
    config = compose_config(CLIP, QWEN)
    way = Way(lora=LoraSettings(lora_target_modules=[r".*language_model.*layers\.(1|4)\..*q_proj"]))
    assert count_kernels(config, "use_lora", BATCH, way) == micro_step(config, "use_lora", BATCH, way)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_products_are_those_that_torch_counts(train_type):
    """Without attention, which torch counts as a full square, and of which kernels do half."""
    config = compose_config(CLIP, QWEN)
    model = meta_model(config, torch.bfloat16, train_type).train()
    patch_forward(llava_in(model))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(**inputs_of(config, BATCH)).loss.backward()
    torchs = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    wanted = sum(torchs.get(each, 0) for each in (aten.mm, aten.addmm, aten.convolution, aten.convolution_backward))
    found = micro_step(config, train_type, BATCH, PLAIN)
    ours = sum(times * kernel.flops for kernel, times in found.items() if "attention" not in kernel.name)
    rotary = sum(times * kernel.flops for kernel, times in found.items() if kernel.name == "bmm")  # its angles
    assert ours - rotary == wanted
    for kernel in found:
        m, n, k = kernel.sides or (0, 0, 0)
        assert not kernel.sides or kernel.flops == 2 * m * n * k


def test_attention_is_one_kernel_each_way():
    """16 patches and CLS in two images of four heads of 16; 48 tokens under a causal mask, half of it."""
    found = Counter()
    for kernel, times in micro_step(compose_config(CLIP, QWEN), "none", BATCH, Way()).items():
        found[kernel.name, kernel.flops] += times if "attention" in kernel.name else 0
    tower, text = 4 * 2 * 17**2 * 64, 4 * 2 * 48**2 * 64 // 2
    wanted = {("attention", tower): 4, ("attention_backward", tower * 5 // 2): 4}
    wanted |= {("attention", text): 6, ("attention_backward", text * 5 // 2): 6}
    assert +found == wanted


def test_liger_replaces_what_it_replaces_and_leaves_no_trace():
    """Two norms a layer and the last; a rotation and a gated product a layer. Gradients reach all but the first norm
    of a frozen model."""
    from transformers.models.qwen2 import modeling_qwen2

    plain = modeling_qwen2.apply_rotary_pos_emb, torch.nn.functional.dropout
    found = Counter()
    for kernel, times in micro_step(compose_config(CLIP, QWEN), "freeze_vision", BATCH, Way()).items():
        found[kernel.name] += times
    norms, layers = 2 * 6 + 1, 6
    for name, times in (("rms_norm", norms), ("rotary", layers), ("gated", layers)):
        assert found[name] == found[f"{name}_backward"] == times
    assert not {"rsqrt", "pow", "neg", "silu"} & {*found}
    assert (modeling_qwen2.apply_rotary_pos_emb, torch.nn.functional.dropout) == plain
    eager = Counter(kernel.name for kernel in micro_step(compose_config(SIGLIP, GEMMA), "none", BATCH, PLAIN))
    assert "rsqrt" in eager and "rms_norm" not in eager


@pytest.mark.parametrize(
    ("call", "name", "moved"),
    [
        (lambda x, y, i: x + y, "add", 3 * 800),
        (lambda x, y, i: x.add_(y), "add_", 3 * 800),
        (lambda x, y, i: x.copy_(y), "copy_", 2 * 800),
        (lambda x, y, i: x + y[:1].expand(20, 10), "add", 2 * 800 + 40),  # not 800 more: 10 numbers are there
        (lambda x, y, i: x.sum(), "sum", 800 + 4),
        (lambda x, y, i: x.index_select(0, i), "index_select", 2 * 3 * 40 + 3 * 8),  # three rows and their numbers
        (lambda x, y, i: x.t() @ y, "mm", 2 * 800 + 400),
        (lambda x, y, i: torch.nn.functional.dropout(x, 0.5), "native_dropout", 2 * 800 + 200),  # and a mask of bytes
    ],
)
def test_bytes_that_a_kernel_moves(call, name, moved):
    """20 x 10 numbers of four bytes."""
    x, y = torch.empty(2, 20, 10, device="meta").unbind()
    with kernels_module.like_on_gpu(), KernelCounter() as counter:
        call(x.clone(), y.clone(), torch.empty(3, dtype=torch.long, device="meta"))
    [kernel] = [kernel for kernel in counter.kernels if kernel.name not in ("clone", "empty")]
    assert (kernel.name, kernel.bytes) == (name, moved)


def test_views_and_allocations_are_no_kernels():
    with KernelCounter() as counter:
        x = torch.empty(4, 6, device="meta")
        x.t().reshape(2, 12)[0].unsqueeze(1).expand(12, 3).detach()
        torch.empty_like(x).view(24).split(5)
    assert {kernel.name for kernel in counter.kernels} == {"clone"}  # of the reshape


def test_a_wave_more_takes_a_round_more():
    """NVIDIA's guide (Matrix Multiplication Background, section 4): 108 tiles of 256 x 128 fill an A100 once, and one
    row more asks for another round; here of tiles half as large."""
    gpu = GPUS["a100-80g"]
    full, more = (product_seconds(27 * 256 + rows, 4 * 128, 4096, gpu) for rows in (0, 1))
    assert more == pytest.approx(1.5 * full)
    share = 2 * 27 * 256 * 4 * 128 * 4096 / full / gpu.rate
    assert 0.9 < share < 1  # the pipeline of each tile must fill
    thin = product_seconds(128, 128, 64 * 108, gpu)  # one tile, in which all processors share
    assert thin < product_seconds(27 * 256, 4 * 128, 64, gpu)


def test_a_kernel_takes_the_longest_of_its_limits():
    gpu = GPUS["h100-80g"]
    moving, computing, tiny = Kernel("add", 0, 10**9), Kernel("attention", 10**12, 1), Kernel("add", 0, 8)
    assert kernel_seconds(moving, gpu) == pytest.approx(1e9 / 3.35e12 / 0.83)
    assert kernel_seconds(computing, gpu) == pytest.approx(1e12 / (0.35 * 989e12))
    assert 1e-6 < kernel_seconds(tiny, gpu) < 5e-6
    both = Counter({moving: 2, computing: 1})
    assert gpu_seconds(both, gpu) - limit_seconds(both, gpu) == pytest.approx(2 * kernel_seconds(moving, gpu))


@pytest.mark.parametrize(("moved", "slower"), [(10**5, "host"), (10**9, "GPU")])
def test_the_slower_of_gpu_and_host_decides(moved, slower):
    """A thousand kernels that move a tenth of a MB or a GB each."""
    speed = Speed(Counter({Kernel("add", 0, moved): 990, Kernel("attention", 10**9, 1): 10}), 4, 0, 0, 1, 8)
    on_gpu = 990 * max(2.5e-6, moved / 0.83 / 1555e9) + 10 * 1e9 / 156e12
    assert (speed.on_gpu("a100-40g"), speed.on_host()) == pytest.approx((on_gpu, 1000 * 98e-3 / 8080))
    assert (on_gpu > speed.on_host()) == (slower == "GPU")
    seconds = max(on_gpu, speed.on_host()) + 5e-3
    assert 4 / speed.samples_per_second("a100-40g") == pytest.approx(seconds)
    assert 4 / speed.limit("a100-40g") == pytest.approx(10 * 1e9 / 156e12)


def test_more_gpus_share_the_step_and_pay_for_what_they_send():
    """10^9 weights: 84 bytes each are shared out; 2 are gathered, but for the own part, and twice that reduced."""
    one, four = (Speed(Counter(), 1, 10**9, 0, ranks, 8) for ranks in (1, 4))
    gpu = GPUS["a100-80g"]
    work = 84e9 / (0.83 * gpu.bandwidth)
    assert one.at_step("a100-80g") == pytest.approx(work)
    assert four.at_step("a100-80g") == pytest.approx(work / 4 + 2e9 * 3 / 4 / (0.83 * 300e9))
    micro = (4 + 10 / 4) * 1e9 / (0.83 * gpu.bandwidth) + 5e-3
    sent = 4e9 * 3 / 4 / (0.83 * 300e9)
    assert sent > micro / 2  # there is no backward pass here to hide all of it
    four.samples = 1
    assert 4 / four.samples_per_second("a100-80g") == pytest.approx(micro / 2 + sent + four.at_step("a100-80g") / 8)


def test_hours_are_records_over_speed():
    config = compose_config(CLIP, QWEN)
    speed = Speed.of(config, "projector", BATCH, 2).samples_per_second("l40s-48g")
    assert hours(config, "projector", BATCH, 1e6, 3, "l40s-48g", 2) == pytest.approx(3e6 / speed / 3600)


def test_four_bits_are_unpacked_on_the_way():
    config = compose_config(CLIP, QWEN)
    plain, packed = (
        count_kernels(config, "use_lora", BATCH, Way(fused_lora=False, in_4bit=on)) for on in (False, True)
    )
    more = packed - plain
    assert {kernel.name for kernel in more} == {"dequantize"} and more.total() == 2 * 7 * 6  # matrices and layers


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_padded_length_is_that_of_many_batches(batch_size):
    rng = np.random.default_rng(0)
    lengths, weights = rng.integers(600, 900, 200), rng.random(200)
    drawn = rng.choice(lengths, (50_000, batch_size), p=weights / weights.sum()).max(axis=1)
    assert padded_length(lengths, weights, batch_size) == pytest.approx(drawn.mean(), rel=2e-3)


@pytest.mark.parametrize(
    ("name", "memory", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80g"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80g"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090-24g"),
        ("NVIDIA H100 PCIe", 79.1, None),  # slower than the other
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA L4", 22.0, None),
        ("Tesla T4", 14.7, None),
    ],
)
def test_a_gpu_is_known_by_name_and_memory(name, memory, kind):
    assert kind_of_gpu(name, memory) == kind


def test_a_published_run_is_foreseen():
    """Recomputed; and all rows that can be compared are within 25% in the kept result."""
    kept = json.loads((RESULTS / "published.json").read_text())["rows"]
    run = next(run for run in published.RUNS if run.name.startswith("Qwen-7B"))
    row = published.row(run)
    assert row == next(row for row in kept if row["run"] == run.name)
    comparable = [row for row in kept if row["comparable"]]
    assert len(comparable) >= 6 and all(0.75 < row["published_over_predicted"] < 1.25 for row in comparable)


def test_kernels_of_the_real_model_are_few():
    """As kept, and one row anew; each change leaves fewer kernels than the one before."""
    kept = json.loads((RESULTS / "kernels.json").read_text())["rows"]
    new = full_size_kernels.row("freeze_vision", 4, "Liger")
    assert new in kept and new["kernels"] <= 2300
    lora = [row for row in kept if (row["strategy"], row["batch"]) == ("use_lora", 4)]
    assert all(more["kernels"] > fewer["kernels"] for more, fewer in pairwise(lora)) and lora[-1]["kernels"] <= 2700


def test_a_run_on_a_known_gpu_begins_with_its_hours():
    """Of CC3M-595K in the original's ten epochs, and of some steps; one epoch is recommended where ten take long."""
    config, model_args = compose_config(CLIP, QWEN), ModelArguments(model_name_or_path="", train_type="projector")
    workload = replace(Workload.assumed(4, 620, 64), records=595_375)
    args = LlavaTrainingArguments(output_dir="", use_cpu=True, num_train_epochs=10, per_device_train_batch_size=4)
    printed = foretell("rtx4090-24g", config, workload, model_args, args)
    each = hours(config, "projector", workload.typical, 595_375, 1, "rtx4090-24g", 1, Way(liger=False), 1)
    assert printed.startswith(f"595,375 records x 10 epochs: about {10 * each:.1f} hours")
    assert (f"--num_train_epochs 1 is LLaVA's, and takes {each:.1f}" in printed) == (10 * each > 10)
    more = replace(workload, records=100 * 595_375)
    assert "--num_train_epochs 1 is LLaVA's" in foretell("rtx4090-24g", config, more, model_args, args)
    args.max_steps = 100
    printed = foretell("rtx4090-24g", config, workload, model_args, args)
    assert f"x {400 / 595_375:g} epochs" in printed and "LLaVA's" not in printed
