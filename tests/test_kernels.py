"""What GPUs are given to run, as far as a CPU can tell: flags refused in time, and equal losses on every way."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import call
from trainers import assert_close, gradients, mixed_examples, trainer_of
from training import FLAGS, losses
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import liger

from train_llava.data import LlavaCollator
from train_llava.model.load import load
from train_llava.train import main
from train_llava.training.trainer import LlavaTrainer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attn_implementation", "flash_attention_2"], "pip install flash-attn"),
        (["--use_liger_kernel", "true"], "needs a GPU and pip install liger-kernel"),
        (["--tf32", "true"], "--tf32 requires Ampere"),
    ],
)
def test_what_cannot_run_here_is_refused_before_the_weights_are_read(llava, data, tmp_path, flags, message):
    (tmp_path / "model").mkdir()  # nothing is in it, so reading it would be the error
    where = ["--model_name_or_path", tmp_path / "model", "--data_path", data, "--output_dir", tmp_path / "out"]
    done = call(main, *where, *flags, "--use_cpu", "true")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_attention_reaches_the_tower_and_the_language_model(llava):
    for name in ("eager", "sdpa"):
        model, _ = load(llava, attn_implementation=name)
        assert model.model.vision_tower.config._attn_implementation == name
        assert model.model.language_model.config._attn_implementation == name
    default, _ = load(llava)
    assert default.model.language_model.config._attn_implementation == "sdpa"


def attend(query, key, value, causal):
    """Attention by its definition on (length, heads, width)."""
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@pytest.fixture
def flash_attention(monkeypatch):
    """The flash-attn package's two functions, by definition; remembers who was called."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        calls.append("plain")
        return torch.stack([attend(*row, causal) for row in zip(q, k, v, strict=True)])

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        calls.append("varlen")
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths) and sum(lengths) == len(q)
        rows = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*row, causal) for row in rows])

    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2")
    functions = {"_flash_fn": flash_attn_func, "_flash_varlen_fn": varlen}
    functions |= {"_pad_fn": flash._pad_input, "_unpad_fn": flash._unpad_input}
    functions["_process_flash_kwargs_fn"] = flash._lazy_define_process_function(varlen)
    for name, function in functions.items():
        monkeypatch.setattr(flash, name, function)
    return calls


@pytest.mark.parametrize("packing", [True, False])
def test_flash_attention_gives_the_same_gradients(llava, data, tmp_path, flash_attention, monkeypatch, packing):
    """Padded and packed; a packed batch says where its conversations end, which no layer then has to find out, and the
    tower, whose images have no such ends, is not told."""
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "none")
    examples, processor = mixed_examples(data), load(llava)[1]
    trainer.model(**LlavaCollator(processor)(examples)).loss.backward()  # SDPA, padded with a mask
    expected = gradients(trainer.model)
    trainer.model.zero_grad()

    tower, language_model = trainer.model.model.vision_tower, trainer.model.model.language_model
    for part in (tower, language_model):
        part.config._attn_implementation = "flash_attention_2"
    batch = LlavaCollator(processor, for_trainer=True, packing=packing)(examples)
    if packing:
        monkeypatch.setattr(flash, "_prepare_from_posids", lambda *_: pytest.fail("a layer works out the ends"))
    trainer.compute_loss(trainer.model, batch).backward()
    read = len(tower.encoder.layers) - 1
    kind = "varlen" if packing else "plain"  # padding is on the right, where no token looks
    assert flash_attention == ["plain"] * read + [kind] * len(language_model.layers)
    assert_close(gradients(trainer.model), expected)


def test_liger_leaves_the_loss_to_us(llava, data, tmp_path, monkeypatch):
    """Its own forward pass would take the place of ours; what it is told is told here, by transformers' own hook."""
    told = []
    kernels = SimpleNamespace(_apply_liger_kernel_to_instance=lambda model, **config: told.append((model, config)))
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=kernels))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", kernels)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    flags = {"max_steps": 1, "per_device_train_batch_size": 2, "use_liger_kernel": True}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "use_lora", **flags)
    trainer.train()
    assert told == [(trainer.model.get_base_model(), {"fused_linear_cross_entropy": False})]
    held_out = torch.utils.data.Subset(trainer.train_dataset, range(8))
    with_liger = trainer.evaluate(held_out)["eval_loss"]  # where Trainer asks Liger's forward for no logits
    trainer.args.use_liger_kernel = False
    assert trainer.evaluate(held_out)["eval_loss"] == with_liger


@pytest.mark.parametrize("train_type", ["use_lora", pytest.param("none", marks=pytest.mark.slow)])
def test_compiled_layers_give_the_same_losses(llava, data, tmp_path, train_type):
    """With batches of several lengths, dropout off. The graphs are captured whole, but not made into machine code."""
    flags = ["--model_name_or_path", llava, "--data_path", data, "--use_cpu", "true", *FLAGS, "--max_steps", 3]
    flags += ["--train_type", train_type, "--per_device_train_batch_size", 4, "--save_strategy", "no", "--output_dir"]
    done = call(main, *flags, tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    torch._dynamo.utils.counters.clear()
    compiled = ["--torch_compile", "true", "--torch_compile_backend", "eager"]
    done = call(main, *flags, tmp_path / "compiled", *compiled)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    counts = torch._dynamo.utils.counters
    assert counts["stats"]["unique_graphs"] > 0 and not counts["graph_break"]


@pytest.mark.parametrize("train_type", ["use_lora", "freeze_vision"])
def test_a_frozen_tower_runs_once_under_checkpointing(llava, data, tmp_path, train_type):
    """transformers would ask for gradients at its patches, run it twice and send gradients through it."""
    flags = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_checkpointing": True}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, train_type, **flags)
    inner = getattr(trainer.model, "get_base_model", lambda: trainer.model)().model
    calls = {"tower": 0, "language model": 0}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    inner.vision_tower.encoder.layers[0].mlp.register_forward_pre_hook(count("tower"))
    inner.language_model.layers[0].mlp.register_forward_pre_hook(count("language model"))
    trainer.train()
    assert calls == {"tower": 1, "language model": 2}
