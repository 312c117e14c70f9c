"""The counted operations of a step against torch's own counter, and in the log."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trainers import TRAIN_TYPES, trainer_of
from transformers import IntervalStrategy, TrainerCallback

from benchmarks.full_size import flops_limit
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.load import load, load_processor
from train_llava.model.loss import patch_forward
from train_llava.planning.flops import StepFlops
from train_llava.training.trainer import LlavaTrainer


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_flops_equal_torchs_count(llava, data, train_type):
    model, processor = load(llava)
    model.config.vision_feature_layer = -1  # the whole tower: torch also counts a layer that nobody reads
    model.set_attn_implementation("eager")  # torch does not count the CPU's fused attention
    model = apply_train_type(model, train_type, LoraSettings(lora_dropout=0.0))
    dataset = LlavaDataset(data)
    same_length = [example for example in (dataset[i] for i in range(len(dataset))) if " and " in str(example)][:3]
    batch = LlavaCollator(processor, for_trainer=True)(same_length * 2)
    counts, labels = batch["counts"], batch["labels"]
    length = labels.shape[1]
    patch_forward(model.get_base_model() if train_type == "use_lora" else model)
    with FlopCounterMode(display=False) as counter:
        inputs = {"input_ids": batch["input_ids"], "pixel_values": torch.zeros(6, 3, 28, 28)}
        model(**inputs, labels=labels).loss.backward()
    padded = counts | {"tokens": 6 * length, "token_pairs": 6 * length**2}  # torch counts padding, too
    assert StepFlops.count(model).of(**padded) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_attention_of_the_tower_is_among_all_its_positions(llava):
    """The patches and CLS; torch counts its products of activations apart, as bmm."""
    model = load(llava)[0].requires_grad_(False)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.model.get_image_features(torch.zeros(1, 3, 28, 28))
    tower, attention = model.model.vision_tower, counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    used = [tower.embeddings, *tower.encoder.layers[:2], model.model.multi_modal_projector]
    kinds = torch.nn.Linear | torch.nn.Conv2d
    matrices = sum(each.weight.numel() for part in used for each in part.modules() if isinstance(each, kinds))
    # torch runs the third layer as well, which LLaVA does not read
    assert StepFlops.count(model).per_image == 4 * 2 * matrices + attention * 2 / 3


def test_speed_and_utilisation_in_the_log(llava, data, tmp_path):
    """Against the same figures worked out from the run's own length."""
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "use_lora", max_steps=8, logging_steps=8)
    trainer.data_collator = LlavaCollator(load_processor(llava), for_trainer=True)
    peak = 1e9

    class Known(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.throughput.peak = peak  # a CPU's is not in the table

    trainer.add_callback(Known())
    seconds = trainer.train().metrics["train_runtime"]
    logged = next(log for log in trainer.state.log_history if "mfu" in log)
    tokens = sum(len(trainer.data_collator.encoder.encode(e["messages"])[0]) for e in trainer.train_dataset)
    assert logged["samples_per_second"] == pytest.approx(64 / seconds, rel=0.3)
    assert logged["tokens_per_second"] / logged["samples_per_second"] == pytest.approx(tokens / 64, rel=1e-6)
    per_second = StepFlops.count(trainer.model).per_token * logged["tokens_per_second"]
    assert per_second / peak < logged["mfu"] < 2 * per_second / peak
    assert 0 <= logged["data_wait"] < 1


def test_what_is_no_training_is_not_timed(llava, data, tmp_path):
    """Evaluations, captions and saves of 50 ms each, waits for data of 5 ms a batch; with text-only batches, whose grey
    image is no work that was asked for."""
    flags = {"logging_steps": 4, "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    flags |= {"max_steps": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector", **flags)
    collator = LlavaCollator(load_processor(llava), for_trainer=True)

    def slow(examples):
        time.sleep(0.005)
        return collator([example | text_only for example in examples])

    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    text_only = {"messages": messages, "images": []}
    slow.pixels, slow.packing = collator.pixels, False
    trainer.data_collator, trainer.eval_dataset = slow, [trainer.train_dataset[i] for i in range(4)]

    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with trainer.throughput.paused():  # as LogGenerationsCallback
                time.sleep(0.05)

        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(0.05)

        def on_train_begin(self, args, state, control, **kwargs):
            self.logged = [time.perf_counter()]

        def on_log(self, args, state, control, logs, **kwargs):
            self.logged += [time.perf_counter()] * ("loss" in logs)

    slowly = Slow()
    trainer.add_callback(slowly)
    trainer.args.eval_strategy = IntervalStrategy.STEPS
    plain = trainer.save_model
    trainer.save_model = lambda *args, **kwargs: (time.sleep(0.05), plain(*args, **kwargs))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "samples_per_second" in log]
    # four captions in each interval, evaluations and saves at steps 2 and then 4 and 6, the latter behind the log
    for log, since, at, away in zip(logs, slowly.logged[:-1], slowly.logged[1:], (0.3, 0.4), strict=True):
        seconds = 32 / log["samples_per_second"]
        assert log["steps_per_second"] == pytest.approx(4 / seconds) and seconds < at - since - 0.98 * away
        assert 0.04 / seconds < log["data_wait"] < 1
    tokens = len(collator.encoder.encode(text_only["messages"])[0])
    counts = collator([text_only])["counts"]
    assert (counts["images"], counts["tokens"], counts["token_pairs"]) == (0, tokens, tokens**2)
    assert log["tokens_per_second"] / log["samples_per_second"] == pytest.approx(tokens)
    flops = StepFlops.count(trainer.model).of(images=0, tokens=tokens, token_pairs=tokens**2, answer_tokens=4)
    assert trainer.state.total_flos == pytest.approx(64 * flops, rel=0.05)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_a_full_size_step_is_at_its_limit(train_type):
    """torch's count of a step of CLIP-ViT-L/336 + Qwen1.5-4B against the fewest operations there can be."""
    row = flops_limit.compare(train_type)
    assert 0.99 < row["ours_over_limit"] <= 1.02 < row["plain_over_limit"]
