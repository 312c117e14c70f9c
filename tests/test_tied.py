"""Chat models whose head is their embedding table, as Qwen2.5-0.5B's and SmolLM2's: trained, saved once, resumed."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import runs_of
from families import Family, chat_folder
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from trainers import TRAIN_TYPES, assert_close, gradients, plain_and_ours
from training import losses, weights, zero2
from transformers import LlavaForConditionalGeneration

from train_llava.build_model import build_llava
from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.folder import save_llava
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.load import load
from train_llava.model.loss import patch_forward
from train_llava.model.structure import components_table
from train_llava.model.verify_merge import check_mergeable
from train_llava.planning.budget import checkpoint_bytes, model_bytes
from train_llava.planning.flops import StepFlops
from train_llava.planning.memory import MemoryModel

TIED = Family("tied", "Qwen2", {"tie_word_embeddings": True, "vocab_size": 4096}, "qwen2.5")


@pytest.fixture(scope="module")
def tied(old_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(3)
    save_llava(*build_llava(old_clip, chat_folder(TIED, folder / "chat"), dtype=torch.float32), folder / "llava")
    return folder / "llava"


@pytest.fixture(scope="module")
def trained(tied, data, tmp_path_factory):
    return runs_of(tied, data, tmp_path_factory)


def prepared(folder, train_type):
    """The model as a training holds it."""
    return apply_train_type(load(folder)[0], train_type, LoraSettings(lora_dropout=0.0))


def loss_on(data, folder):
    """Of the records that all runs have seen."""
    model, processor = load(folder)
    dataset = LlavaDataset(data)
    with torch.no_grad():
        return model(**LlavaCollator(processor)([dataset[i] for i in range(len(dataset))])).loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_trained_and_saved_once(tied, trained, data, train_type):
    output, log = trained(train_type)
    assert loss_on(data, output) < loss_on(data, tied)
    assert re.search(r"^head +0 +(frozen|[\d,]+)  the embedding table, counted there$", log, re.M)
    assert not any("lm_head" in name for name in [*load_file(tied / "model.safetensors"), *weights(output)])
    model, _ = load(output)
    llava = model.get_base_model() if train_type == "use_lora" else model
    table, old = llava.lm_head.weight, LlavaForConditionalGeneration.from_pretrained(tied).lm_head.weight
    assert table.data_ptr() == llava.get_input_embeddings().weight.data_ptr()
    assert torch.equal(table, old) == (train_type in ("use_lora", "projector"))
    # what the check of the disk says, against what lies there
    model = prepared(tied, train_type)
    for folder in (output, output / "checkpoint-3"):
        size = sum(path.stat().st_size for path in folder.glob("*model*.safetensors"))
        assert size == pytest.approx(model_bytes(model), rel=0.1)
    files = [path for path in (output / "checkpoint-3").rglob("*") if path.suffix in (".safetensors", ".pt")]
    size = sum(path.stat().st_size for path in files if "rng" not in path.name)
    assert size == pytest.approx(checkpoint_bytes(model, deepspeed=True), rel=0.25)


@pytest.mark.slow
def test_resume_is_exact(tied, trained, data, tmp_path):
    output, _ = trained("none")
    shutil.copytree(output / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    done = zero2(tied, data, tmp_path / "run", "none", "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "run") == losses(output)
    whole, resumed = weights(output), weights(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_gradients_and_counts(tied, data, tmp_path, train_type):
    """Gradients of plain transformers; operations by torch's own count; each weight counted once."""
    plain, ours = plain_and_ours(tied, data, tmp_path, train_type)
    examples = [ours.train_dataset[i] for i in range(4)]
    plain.model(**plain.data_collator(examples)).loss.backward()
    ours.compute_loss(ours.model, ours.data_collator(examples)).backward()
    assert_close(gradients(ours.model), gradients(plain.model))

    model = prepared(tied, train_type)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = MemoryModel.of(model)
    assert step.trained == trained
    assert sum(stage.trained for stage in step.stages) == pytest.approx(
        trained, rel=0.35 if "lora" in train_type else 0.02
    )
    total = components_table(model).splitlines()[-1].split()
    kept = sum(p.numel() for name, p in model.named_parameters() if "original_module" not in name)
    assert total[1:3] == [f"{kept:,}", f"{trained:,}"]

    model, processor = load(tied)
    model.config.vision_feature_layer = -1  # as tests/test_flops.py
    model.set_attn_implementation("eager")
    model = apply_train_type(model, train_type, LoraSettings(lora_dropout=0.0))
    same = [example for example in LlavaDataset(data) if " and " in str(example)][:3]
    batch = LlavaCollator(processor, for_trainer=True)(same * 2)
    length = batch["labels"].shape[1]
    patch_forward(model.get_base_model() if train_type == "use_lora" else model)
    with FlopCounterMode(display=False) as counter:
        inputs = {"input_ids": batch["input_ids"], "pixel_values": torch.zeros(6, 3, 28, 28)}
        model(**inputs, labels=batch["labels"]).loss.backward()
    padded = batch["counts"] | {"tokens": 6 * length, "token_pairs": 6 * length**2}
    assert StepFlops.count(model).of(**padded) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_memory_line_and_a_quiet_start(trained):
    """What is said before the run, with the process itself, against what it says while it trains; and no notices."""
    _, log = trained("none")
    said = float(re.search(r"^memory: (\S+) GB of .*the process itself", log, re.M)[1])
    seen = float(re.search(r"^step 6/6 .* (\S+) GB ", log, re.M)[1])
    assert said == pytest.approx(seen, rel=0.35)
    assert "PAD/BOS/EOS" not in log


def test_an_adapter_of_the_shared_table_is_not_merged(tied, tmp_path):
    """Its sum would change the embeddings, too."""
    model = get_peft_model(load(tied)[0], LoraConfig(r=2, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(InputError, match="its base has one table for embeddings and head"):
        check_mergeable(tmp_path, Path(tied))
