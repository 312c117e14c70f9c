"""Kinds of adapters: rsLoRA, DoRA, other starts, LoRA+, against plain PEFT; and noise on the words (NEFTune)."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, call
from folders import equal
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from trainers import assert_close, gradients, plain_and_ours, trainer_of
from training import losses, weights
from transformers import LlavaForConditionalGeneration, Trainer

from train_llava import merge_lora, train
from train_llava.cli import InputError
from train_llava.data import LlavaCollator
from train_llava.estimate import main as estimate
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.load import load, load_processor
from train_llava.planning.arguments import DataArguments, LlavaTrainingArguments, ModelArguments
from train_llava.training.flag_checks import check_flags
from train_llava.training.trainer import LlavaTrainer

KINDS = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA, rsLoRA": {"use_dora": True, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
PATTERN = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_as_peft_makes_it(llava, kind):
    """Every weight, after the same seed; and without effect on what the model says."""
    torch.manual_seed(0)
    ours = apply_train_type(load(llava)[0], "use_lora", LoraSettings(**KINDS[kind]))
    torch.manual_seed(0)
    common = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "modules_to_save": ["multi_modal_projector"]}
    settings = LoraConfig(target_modules=PATTERN, **common, **KINDS[kind])
    base = LlavaForConditionalGeneration.from_pretrained(llava)
    plain = get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), settings)
    assert equal(ours, plain)
    layer = ours.base_model.model.model.language_model.layers[0].self_attn.q_proj
    assert (
        layer.scaling["default"]
        == plain.base_model.model.model.language_model.layers[0].self_attn.q_proj.scaling["default"]
    )
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours.eval()(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["DoRA", "rsLoRA", "DoRA, rsLoRA"])
def test_loss_and_gradients_equal_peft(llava, data, tmp_path, kind, dropout):
    """PEFT's own layers under plain transformers, in all layers that adapters are usual in."""
    flags = {"lora_target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"], "lora_dropout": dropout}
    plain, ours = plain_and_ours(llava, data, tmp_path, "use_lora", **KINDS[kind], **flags)
    examples = [ours.train_dataset[i] for i in range(6)]
    if dropout:  # the last layer's rows are other ones here, and so would be what is dropped
        plain, ours = (trainer.model.base_model.model.model.language_model.layers[0] for trainer in (plain, ours))
        found = []
        for layer in (plain, ours):
            torch.manual_seed(2)
            x = torch.linspace(-1, 1, 5 * 48).view(1, 5, 48).requires_grad_()
            layer.zero_grad()
            layer.self_attn.q_proj(x).square().sum().backward()
            found.append({"x": x.grad, **gradients(layer)})
        assert_close(*found)
        return
    expected = plain.model(**plain.data_collator(examples)).loss
    expected.backward()
    ours.data_collator = LlavaCollator(load_processor(llava), for_trainer=True)
    loss = ours.compute_loss(ours.model, ours.data_collator(examples))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    assert_close(gradients(ours.model), gradients(plain.model))
    assert ("DoRA" in kind) == any("magnitude" in name for name in gradients(ours.model))


FLAGS = ["--use_cpu", "true", "--report_to", "none", "--logging_steps", 1, "--per_device_train_batch_size", 8]
FLAGS += ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--learning_rate", 1e-2]


def start(llava, data, output, *flags):
    return call(train.main, "--model_name_or_path", llava, "--data_path", data, "--output_dir", output, *FLAGS, *flags)


RUNS = {
    "DoRA, rsLoRA, LoRA+": {"use_dora": True, "use_rslora": True, "loraplus_lr_ratio": 16},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("kind", ["DoRA, rsLoRA, LoRA+", pytest.param("orthogonal", marks=pytest.mark.slow)])
def test_saved_merged_and_resumed(llava, data, tmp_path, kind):
    """The adapter in plain PEFT, the merged folder in plain transformers, and a run that was cut off in the middle."""
    flags = [word for name, value in RUNS[kind].items() for word in (f"--{name}", str(value).lower())]
    whole = tmp_path / "whole"
    done = start(llava, data, whole, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((whole / "adapter_config.json").read_text())
    assert all(config[name] == value for name, value in RUNS[kind].items() if "loraplus" not in name)
    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), whole).eval()
    assert equal(load(whole)[0], plain)

    done = call(merge_lora.main, "--adapter_name_or_path", whole, "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(20)[None]
    base = LlavaForConditionalGeneration.from_pretrained(llava)(input_ids=ids).logits
    assert (plain(input_ids=ids).logits - base).abs().max() > 1e-3
    torch.testing.assert_close(merged(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)

    shutil.copytree(whole / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    done = start(llava, data, tmp_path / "again", *flags, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "again") == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(tmp_path / "again")[name]), name
    done = start(llava, data, tmp_path / "again", "--resume_from_checkpoint", "true")
    assert done.returncode == 2 and f"--{next(iter(RUNS[kind]))}" in done.stderr


def rates(optimizer, model):
    """Learning rate and weight decay of each trained weight."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_has_the_rates_of_peft(llava, data, tmp_path, dora):
    """But for the projector, whose weights and biases keep a rate of their own."""
    given = {"learning_rate": 1e-3, "weight_decay": 0.1, "loraplus_lr_ratio": 16, "use_dora": dora}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "use_lora", **given, projector_learning_rate=1e-4)
    ours = rates(trainer.create_optimizer(), trainer.model)
    options = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    plain = rates(create_loraplus_optimizer(trainer.model, torch.optim.AdamW, **options), trainer.model)
    assert ours.keys() == plain.keys() and len(ours) == 4 + 2 * 4 * (3 if dora else 2)
    for name, (rate, decay) in ours.items():
        assert rate == (1e-4 if "projector" in name else plain[name][0])
        assert decay == (0 if name.endswith("bias") else 0.1)
    assert {rate for rate, _ in ours.values()} == {1e-3, 1.6e-2, 1e-4}


def test_noise_on_the_words(llava, data, tmp_path):
    """NEFTune in a PEFT model: the losses of plain Trainer, and other ones than without. An evaluation has no noise."""
    found = []
    for cls, alpha in ((Trainer, 50.0), (LlavaTrainer, 50.0), (LlavaTrainer, None)):
        flags = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
        trainer = trainer_of(cls, llava, data, tmp_path, "use_lora", neftune_noise_alpha=alpha, **flags)
        trainer.train()
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    plain, ours, without = found
    assert ours == pytest.approx(plain, rel=1e-4) and len(ours) == 3
    assert all(abs(a - b) > 1e-3 for a, b in zip(ours, without, strict=True))


def check(model, data=None, **flags):
    args = LlavaTrainingArguments(output_dir="x", use_cpu=True, report_to="none", **flags)
    check_flags(ModelArguments("", **model), DataArguments([], **data or {}), args)
    return args


@pytest.mark.parametrize(
    "model, data, flags, message",
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            {},
            {},
            "--init_lora_weights pissa_niter_4: it changes the frozen weigh",
        ),
        ({"init_lora_weights": "eva"}, {}, {}, "eva: it needs a pass over the data first. There are true, gaussian, o"),
        ({"init_lora_weights": "kaiming"}, {}, {}, "kaiming: not known here. There are true, gaussian, orthogonal"),
        ({"init_lora_weights": "orthogonal", "lora_r": 3}, {}, {}, "--lora_r 3 is not even"),
        (
            {"init_lora_weights": "orthogonal", "load_in_4bit": True},
            {},
            {},
            "orthogonal and --load_in_4bit: PEFT would",
        ),
        ({"train_type": "none", "init_lora_weights": "gaussian"}, {}, {}, "goes with --train_type use_lora alone"),
        ({"train_type": "none", "use_dora": True}, {}, {}, "--use_dora true goes with --train_type use_lora alone"),
        ({"train_type": "none", "use_rslora": True}, {}, {}, "--use_rslora true goes with --train_type use_lora alone"),
        ({"train_type": "none"}, {}, {"loraplus_lr_ratio": 16}, "--loraplus_lr_ratio 16 goes with"),
        ({}, {"packing": True}, {"neftune_noise_alpha": 5}, "--neftune_noise_alpha 5: .* Leave out --packing true"),
    ],
)
def test_refusals(model, data, flags, message):
    check({})
    with pytest.raises(InputError, match=message):
        check(model, data, **flags)


def test_dora_is_refused_with_zero_3(llava, data, tmp_path):
    """Where a rank has only its share of the matrices that it reads; the estimate shows no such way either."""
    done = start(llava, data, tmp_path / "run", "--use_dora", "true", "--deepspeed", ROOT / "ds_configs" / "zero3.json")
    assert done.returncode == 2 and "--use_dora true does not go with --deepspeed" in done.stderr
    assert not (tmp_path / "run").exists()
    done = call(estimate, "--model_name_or_path", llava, "--use_dora", "true", "--gpu", "h100-80g")
    assert done.returncode == 0 and "ZeRO-2" in done.stdout and "ZeRO-3" not in done.stdout, done.stderr


@pytest.mark.parametrize("value", ["0.5", "nan", "x"])
def test_a_ratio_is_a_number_from_1_on(llava, data, tmp_path, value):
    done = start(llava, data, tmp_path / "run", "--loraplus_lr_ratio", value)
    assert done.returncode == 2 and "is not a number from 1 on" in done.stderr and not (tmp_path / "run").exists()


def test_training_on_from_an_adapter_names_the_merge(llava, data, tmp_path):
    """An adapter is no model to start from: nothing is loaded or written."""
    base = LlavaForConditionalGeneration.from_pretrained(llava)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    done = start(tmp_path / "adapter", data, tmp_path / "run")
    assert done.returncode == 2 and "adapter: an adapter. Give --model_name_or_path a whole model" in done.stderr
    assert "train_llava.merge_lora" in done.stderr and not (tmp_path / "run").exists()


def test_dora_in_4_bits(llava, data, tmp_path):
    """The lengths start as those of the matrices as 4 bits hold them."""
    pytest.importorskip("bitsandbytes")
    done = start(llava, data, tmp_path / "run", "--use_dora", "true", "--load_in_4bit", "true", "--max_steps", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    done = call(merge_lora.main, "--adapter_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
