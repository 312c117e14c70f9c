"""What each train_type trains, as promised in the table of freeze.py."""

import re

import pytest
import torch
from conftest import call
from peft import LoraConfig, get_peft_model
from trainers import TRAIN_TYPES, trainer_of
from transformers import TrainerCallback

from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.load import load, load_processor
from train_llava.model.structure import components_table
from train_llava.train import main
from train_llava.training.trainer import LlavaTrainer


def promised(name, train_type):
    """Whether a parameter of this name is promised to move."""
    if train_type == "use_lora":
        # q, k, v and o of the language model; the projector's trained copy, not the original that PEFT keeps
        return "lora_" in name or ("projector" in name and "modules_to_save" in name)
    if "vision_tower" in name:
        # LLaVA reads the last layer but one. What comes after it, the third of this tower's three layers and the
        # final norm, never meets the loss, so its gradient is zero, and weight decay must not move it either.
        return train_type == "none" and "encoder.layers.2." not in name and "post_layernorm" not in name
    return "projector" in name or train_type in ("none", "freeze_vision")


@pytest.mark.parametrize("train_type", [*TRAIN_TYPES, "use_lora, in the tower, too"])
def test_exactly_the_promised_parameters_move(llava, data, tmp_path, train_type):
    train_type, _, in_the_tower = train_type.partition(",")
    flags = {"max_steps": 3, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "weight_decay": 0.1}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, train_type, vision_lora=bool(in_the_tower), **flags)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    kept = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert sum("projector" in name for name in kept) == 4  # in all of them
    assert sum("vision_tower" in name and "lora_" in name for name in kept) == bool(in_the_tower) * 2 * 2 * 4
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        # softmax does not see a bias that all keys share, so its gradient is rounding noise: either is right
        if not name.endswith("k_proj.bias"):
            assert moved == promised(name, train_type), name
        assert parameter.requires_grad == promised(name, train_type), name


def test_lora_adapts_the_language_model_alone(llava):
    model, _ = load(llava)
    model = apply_train_type(model, "use_lora")
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 2 * 4 and all("language_model" in name for name in adapted)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.05)


def test_lora_may_leave_the_projector(llava):
    model, _ = load(llava)
    model = apply_train_type(model, "use_lora", LoraSettings(train_projector=False))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_the_table_counts(llava):
    model, _ = load(llava)
    model = apply_train_type(model, "freeze_vision")
    table = components_table(model)
    rows = {line[:15].strip(): line[15:].split() for line in table.splitlines()[1:]}
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert rows["vision tower"][:2] == [f"{tower:,}", "frozen"]
    assert rows["total"][:2] == [f"{everything:,}", f"{everything - tower:,}"]


def test_parts_have_learning_rates_of_their_own(llava, data, tmp_path):
    """Every trained parameter once, biases and norms without weight decay, and the rates that were asked for."""
    rates = {"learning_rate": 1e-3, "projector_learning_rate": 1e-4, "vision_learning_rate": 1e-5}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "none", weight_decay=0.1, **rates)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = (group["lr"], group["weight_decay"])
    assert set(seen) == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    for key, (rate, decay) in seen.items():
        part = "vision" if "vision_tower" in names[key] else "projector" if "projector" in names[key] else "rest"
        assert rate == {"vision": 1e-5, "projector": 1e-4, "rest": 1e-3}[part]
        assert decay == (0 if names[key].endswith("bias") or "norm" in names[key] else 0.1), names[key]


def test_lora_in_other_layers_and_in_the_tower(llava):
    def adapted(**flags):
        model = apply_train_type(load(llava)[0], "use_lora", LoraSettings(**flags))
        return {
            name.split(".lora_A")[0] for name, p in model.named_parameters() if "lora_A" in name and p.requires_grad
        }

    names = adapted(lora_target_modules=["gate_proj", "up_proj"])
    assert len(names) == 4
    assert all("language_model" in name and name.endswith(("gate_proj", "up_proj")) for name in names)
    tower = {name for name in adapted(vision_lora=True) if "vision_tower" in name}
    # three layers, of which LLaVA reads two; four projections each
    assert len(tower) == 8 and not any("layers.2." in name for name in tower)
    with pytest.raises(InputError, match="--lora_target_modules c_attn: no such layer; there are down_proj, gate_proj"):
        adapted(lora_target_modules=["c_attn"])


SUFFIXES = r".*\.[qkvo]_proj"  # as PEFT finds layers by the ends of their names


def test_lora_by_a_regular_expression(llava, data):
    """The layers that PEFT would take; those of the tower learn, but for the layer that LLaVA does not read."""
    settings = LoraSettings(lora_target_modules=[SUFFIXES])
    model = apply_train_type(load(llava, dtype=torch.float32)[0], "use_lora", settings)
    plain = get_peft_model(load(llava)[0], LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    adapted = [
        {name.split(".lora_A")[0] for name, _ in m.named_parameters() if ".lora_A" in name} for m in (model, plain)
    ]
    assert adapted[0] == adapted[1] and len(adapted[0]) == 2 * 4 + 3 * 3
    batch = LlavaCollator(load_processor(llava))([LlavaDataset(data)[i] for i in range(2)])
    model(**batch).loss.backward()
    moved = {
        name.split(".lora_B")[0] for name, p in model.named_parameters() if ".lora_B" in name and p.grad is not None
    }
    assert adapted[0] - moved == {name for name in adapted[0] if "vision_tower.encoder.layers.2." in name}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (".*(", "not a regular expression"),
        (".*c_attn.*", "matches no layer. Give names with blanks between them .down_proj, gate_proj"),
        ("q_proj,v_proj", "matches no layer. Give names with blanks between them"),
        (".*", "matches the whole model"),
        (".*(q_proj|lm_head)", "matches lm_head. Adapters go into linear layers of the vision tower and the language"),
        (".*linear_1", "matches model.multi_modal_projector.linear_1"),
        (r".*layers\.0", r"matches model.*layers\.0"),
    ],
)
def test_regular_expressions_that_name_something_else(llava, pattern, message):
    settings = LoraSettings(lora_target_modules=[pattern])
    with pytest.raises(InputError, match=message):
        apply_train_type(load(llava)[0], "use_lora", settings)


@pytest.mark.parametrize("train_type", [*TRAIN_TYPES, "use_lora, projector frozen", "use_lora, tower adapted"])
def test_gradient_checkpointing_changes_no_gradient(llava, data, tmp_path, train_type):
    """Frozen embeddings and a frozen projector leave a checkpointed layer inputs that ask for no gradient."""
    found = []
    for checkpointing in (False, True):
        name, _, kind = train_type.partition(",")
        flags = {"max_steps": 1, "gradient_checkpointing": checkpointing, "train_projector": "frozen" not in kind}
        flags["lora_target_modules"] = [SUFFIXES] if "tower" in kind else None
        trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, name, **flags)
        norms = []
        trainer.add_callback(Norms(norms))
        trainer.train()
        found.append(norms[0])
    assert found[0].keys() == found[1].keys() and any(norm > 0 for norm in found[0].values())
    for name, norm in found[0].items():
        assert found[1][name] == pytest.approx(norm, rel=1e-4, abs=1e-9), name


class Norms(TrainerCallback):
    def __init__(self, norms):
        self.norms = norms

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters = kwargs["model"].named_parameters()
        self.norms.append({name: p.grad.norm().item() for name, p in parameters if p.grad is not None})


def test_four_bits(llava, data, tmp_path):
    """QLoRA: the language model's layers are held in 4 bits and stay as they are; adapters and projector move."""
    pytest.importorskip("bitsandbytes")
    flags = ["--model_name_or_path", llava, "--data_path", data, "--use_cpu", "true", "--load_in_4bit", "true"]
    flags += ["--max_steps", 3, "--learning_rate", 1e-2, "--report_to", "none", "--output_dir", tmp_path / "out"]
    done = call(main, *flags, "--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", 1)
    assert done.returncode == 0, done.stderr
    assert (
        len(re.findall(r"held-out loss", done.stdout)) == 3
    )  # bitsandbytes would repack weights for the first of them
    assert re.search(r"language model .* frozen  float32, uint8", done.stdout)
    plain, _ = load(llava)
    in_4bit, _ = load(llava, in_4bit=True)
    assert components_table(in_4bit).splitlines()[-1].split()[1] == components_table(plain).splitlines()[-1].split()[1]
    kinds = {name: type(module).__name__ for name, module in in_4bit.named_modules()}
    assert kinds["model.language_model.layers.0.self_attn.q_proj"] == "Linear4bit"
    assert {kind for name, kind in kinds.items() if "vision_tower" in name or "projector" in name} & {
        "Linear4bit"
    } == set()
    assert kinds["lm_head"] == "Linear"
    adapter, _ = load(tmp_path / "out")  # on the base in its full precision
    moved = {name: p for name, p in adapter.named_parameters() if "lora_B" in name}
    assert moved and all(p.abs().sum() > 0 for p in moved.values())
