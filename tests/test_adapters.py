"""Adapters as old versions and other people saved them, damaged ones, and adapters whose base has changed.

The references are the logits of the old versions themselves, and plain PEFT.
"""

import json
import re
import shutil

import pytest
import torch
from conftest import call
from folders import changed, equal, in_float32, save_safe
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from train_llava import evaluate, infer, merge_lora
from train_llava.cli import InputError
from train_llava.model.load import load
from train_llava.model.verify_merge import check_merge


def logits(model, asked):
    with torch.no_grad():
        return model.float().eval()(**asked).logits


def assert_same(ours, theirs):
    """Of 4.41.2 the logits behind the image: it spread one token over the patches."""
    behind = min(ours.shape[1], theirs.shape[1]) - 4
    torch.testing.assert_close(ours[:, -behind:], theirs[:, -behind:], rtol=1e-4, atol=2e-5)


def test_logits_of_old_versions(old_pair, tmp_path):
    base, adapter, asked, answers = old_pair
    assert_same(logits(load(base, dtype=torch.float32)[0], asked), answers["base"])
    assert_same(logits(load(base, adapter, dtype=torch.float32)[0], asked), answers["adapter"])
    with pytest.raises(AssertionError):
        assert_same(answers["base"], answers["adapter"])
    in_float32(base)
    where = ("--adapter_name_or_path", adapter, "--model_name_or_path", base, "--output_dir", tmp_path / "merged")
    done = call(merge_lora.main, *where)
    assert done.returncode == 0, done.stderr
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_same(logits(merged, asked), answers["adapter"])


def test_every_command_takes_them(old_pair, files, data, tmp_path):
    base, adapter, *_ = old_pair
    model = ("--model_name_or_path", base, "--adapter_name_or_path", adapter)
    done = call(infer.main, *model, "--image", files[0], "--max_new_tokens", 2)
    assert done.returncode == 0, done.stderr
    done = call(evaluate.main, *model, "--data_path", data, "--max_new_tokens", 1, "--output_dir", tmp_path / "scores")
    assert done.returncode == 0, done.stderr
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(base))  # an adapter that knows its base
    assert call(infer.main, "--model_name_or_path", adapter, "--image", files[0], "--max_new_tokens", 2).returncode == 0


def test_pickled_weights(old_pair):
    base, adapter, asked, answers = old_pair
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_same(logits(load(base, adapter, dtype=torch.float32)[0], asked), answers["adapter"])


@pytest.mark.parametrize("old_pair", ["4.41.2"], indirect=True)
def test_layers_named_by_a_pattern_on_old_names(old_pair):
    """As PEFT took it in those days: it matches no layer of today's language model."""
    base, adapter, asked, answers = old_pair
    pattern = r".*(language_model\.model|vision_model\.encoder)\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
    changed(adapter / "adapter_config.json", target_modules=pattern)
    assert_same(logits(load(base, adapter, dtype=torch.float32)[0], asked), answers["adapter"])


@pytest.mark.parametrize("old_pair", ["4.41.2"], indirect=True)
@pytest.mark.parametrize("form", ["safetensors", "bin", "shards", "shards of bin"])
def test_every_form_of_a_whole_model(old_pair, form):
    """Beside what Trainer leaves in its checkpoints; without a shard, a sentence."""
    base, adapter, asked, answers = old_pair
    torch.save({"learning_rate": 1}, base / "training_args.bin")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    kind, save = ("pytorch_model.bin", torch.save) if "bin" in form else ("model.safetensors", save_safe)
    stem, end = kind.split(".")
    parts = [kind] if "shards" not in form else [f"{stem}-0000{i}-of-00002.{end}" for i in (1, 2)]
    names = [[*weights][i :: len(parts)] for i in range(len(parts))]
    for part, own in zip(parts, names, strict=True):
        save({name: weights[name].clone() for name in own}, base / part)
    if len(parts) > 1:
        where = {name: part for part, own in zip(parts, names, strict=True) for name in own}
        (base / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    model, _ = load(base, adapter, dtype=torch.float32)
    assert_same(logits(model, asked), answers["adapter"])
    if form == "bin":  # a pickle cannot be mapped away from under the check
        assert check_merge(model.merge_and_unload(), base, adapter) == 17
    (base / parts[-1]).unlink()
    with pytest.raises(InputError, match=str(base)):
        load(base)


@pytest.fixture
def adapter(llava, tmp_path):
    torch.manual_seed(0)
    settings = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["multi_modal_projector"]
    )
    get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


DAMAGE = {
    "a tensor less": (lambda tensors: tensors.popitem(), "1 tensors of .* are missing"),
    "no projector": (
        lambda tensors: [tensors.pop(name) for name in [*tensors] if "projector" in name],
        "4 tensors of .* are missing",
    ),
    "a tensor more": (
        lambda tensors: tensors.update({"base_model.model.model.x.weight": torch.ones(2)}),
        "fit nowhere",
    ),
    "another shape": (
        lambda tensors: tensors.update({name: torch.ones(3, 3) for name in [*tensors][:1]}),
        "of another shape",
    ),
    "NaN": (lambda tensors: next(iter(tensors.values())).fill_(float("nan")), "hold NaN or infinite values"),
    "infinite": (lambda tensors: [*tensors.values()][-1].view(-1)[-1:].fill_(float("inf")), "hold NaN or infinite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters(llava, adapter, tmp_path, damage):
    assert load(llava, adapter)
    spoil, message = DAMAGE[damage]
    tensors = load_file(adapter / "adapter_model.safetensors")
    spoil(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        load(llava, adapter)
    where = ("--adapter_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    done = call(merge_lora.main, *where)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_that_are_no_numbers(llava, tmp_path, value, dtype):
    shutil.copytree(llava, tmp_path / "llava")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(llava / "model.safetensors").items()}
    name = next(name for name in weights if "o_proj" in name)
    weights[name][-1, -1] = float(value)
    save_file(weights, tmp_path / "llava" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"1 of its tensors hold NaN or infinite values, such as {name}"):
        load(tmp_path / "llava")


def test_configs_that_are_none(llava, adapter, tmp_path):
    config = (adapter / "adapter_config.json").read_text()
    for text in ("{", "[]", json.dumps({"peft_type": "LORA"}), config.replace("LORA", "UNHEARD_OF")):
        (adapter / "adapter_config.json").write_text(text)
        done = call(infer.main, "--model_name_or_path", adapter, "--prompt", "What?")
        assert done.returncode == 2 and "Traceback" not in done.stderr, text


def test_adapters_of_other_models(llava, old_qwen, adapter, tmp_path):
    """One of a text-only model, one of a wider LLaVA's projector, one without weights, and other kinds of PEFT."""
    text = tmp_path / "text"
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(old_qwen), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(text)
    with pytest.raises(InputError, match="a 'qwen2' model, not a LLaVA"):
        load(text)
    with pytest.raises(InputError, match=r"4 tensors fit nowhere into its base.*model\.layers\.0\.self_attn\.q_proj"):
        load(llava, text)
    wide = LlavaForConditionalGeneration.from_pretrained(llava).config
    wide.text_config.hidden_size = 64
    settings = LoraConfig(target_modules=["q_proj"])
    get_peft_model(LlavaForConditionalGeneration(wide), settings).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="4 tensors are of another shape than in its base"):
        load(llava, tmp_path / "wide")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors here"):
        load(llava, adapter)


KINDS = {
    "IA3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": VeraConfig(target_modules=["up_proj"]),  # whose shared matrices belong to no layer
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_peft(llava, tmp_path, kind):
    torch.manual_seed(0)
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), KINDS[kind])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), tmp_path / "adapter")
    assert equal(load(llava, tmp_path / "adapter")[0], plain) and equal(model, plain)


def test_tokens_before_the_prompt_are_refused(llava, tmp_path):
    size = {"token_dim": 48, "num_layers": 2, "num_attention_heads": 4}
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **size)
    get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), settings).save_pretrained(tmp_path / "prompt")
    done = call(infer.main, "--model_name_or_path", tmp_path / "prompt", "--prompt", "What?")
    assert done.returncode == 2 and "PROMPT_TUNING: not an adapter of layers" in done.stderr


def test_weights_without_a_place(llava, tmp_path):
    """Tensors of a whole model that its config knows nothing of, or of another shape than it says."""
    shutil.copytree(llava, tmp_path / "llava")
    weights = load_file(llava / "model.safetensors")
    name = next(name for name in weights if name.endswith("o_proj.weight"))
    for spoilt, message in (
        ({name.replace("weight", "bias"): torch.ones(48)}, r"1 weights fit nowhere, such as .*o_proj\.bias"),
        ({name: torch.ones(48, 12)}, r"cannot be loaded"),
    ):
        save_safe({**weights, **spoilt}, tmp_path / "llava" / "model.safetensors")
        done = call(infer.main, "--model_name_or_path", tmp_path / "llava", "--prompt", "What?")
        assert done.returncode == 2 and re.search(message, done.stderr) and "Traceback" not in done.stderr
    changed(tmp_path / "llava" / "config.json", text_config=None, vision_config=None)
    with pytest.raises(InputError, match="in the form of the repository haotian-liu/LLaVA"):
        load(tmp_path / "llava")


def test_a_processor_beside_an_adapter(llava, adapter):
    """As transformers 4.44 left it there: what it does not say is in the base's config."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llava / name, adapter)
    content = json.loads((llava / "processor_config.json").read_text())
    (adapter / "preprocessor_config.json").write_text(json.dumps(content["image_processor"]))
    old = {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": None}
    (adapter / "processor_config.json").write_text(json.dumps(old | {"vision_feature_select_strategy": None}))
    ours, plain = load(llava, adapter)[1], AutoProcessor.from_pretrained(llava)
    image = Image.new("RGB", (30, 20))
    assert ours(images=image, text="<image> a").input_ids == plain(images=image, text="<image> a").input_ids
