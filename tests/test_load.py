"""Every kind of folder that holds a model; the reference is the model that plain transformers loads."""

import json
import os
import shutil

import pytest
import torch
from folders import Evil, changed, equal
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

from train_llava.cli import InputError
from train_llava.model.generate import ask, generate
from train_llava.model.load import load, load_processor, take_memory_in_blocks_that_grow
from train_llava.model.weights import take_stored_names

IMAGE = Image.radial_gradient("L").convert("RGB")
NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # torch 2.9 and later read both


@pytest.mark.parametrize(
    "kind, own, seen",
    [
        ("cuda", {}, "expandable_segments:True"),
        ("cuda", {NEW: "x"}, "x"),
        ("cuda", {OLD: "y"}, None),
        ("xpu", {}, None),
        (None, {}, None),
    ],
)
def test_cuda_gets_memory_in_blocks_that_grow(monkeypatch, kind, own, seen):
    """Whoever has set the variable, or its older name, keeps that."""
    for name in (NEW, OLD):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever is set here
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("train_llava.model.load.gpu", lambda: kind)
    take_memory_in_blocks_that_grow()
    assert os.environ.get(NEW) == seen


@pytest.mark.parametrize("form", ["4.39", "chat_template.json", "processor_config.json", "pickled"])
def test_a_folder_of_transformers_4(llava, old_llava, form):
    if form == "chat_template.json":
        template = json.loads((old_llava / "tokenizer_config.json").read_text())["chat_template"]
        (old_llava / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        changed(old_llava / "tokenizer_config.json", chat_template=None)
    elif form == "processor_config.json":
        old = {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": None}
        (old_llava / "processor_config.json").write_text(json.dumps(old | {"vision_feature_select_strategy": None}))
    elif form == "pickled":
        torch.save(load_file(old_llava / "model.safetensors"), old_llava / "pytorch_model.bin")
        (old_llava / "model.safetensors").unlink()
    model, processor = load(old_llava)
    assert equal(model, LlavaForConditionalGeneration.from_pretrained(llava))
    new = AutoProcessor.from_pretrained(llava)
    ours, theirs = (p(images=IMAGE, text="<image> a", return_tensors="pt") for p in (processor, new))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]
    asked = {"text": [{"role": "user", "content": content}], "return_full_text": False, "max_new_tokens": 12}
    said = pipeline("image-text-to-text", model=str(llava))(**asked)[0]["generated_text"]
    assert generate(model, processor, [ask("What?", [IMAGE])], max_new_tokens=12) == [said.strip()]


def test_an_old_folder_stops_at_the_end_of_turn(old_llava):
    model, processor = load(old_llava)
    assert model.generation_config.eos_token_id is None
    model.lm_head = torch.nn.Linear(48, 448)  # can say nothing but the end of turn
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = 100.0 * torch.eye(448)[420]
    said = []
    model.register_forward_hook(lambda *_: said.append(1))
    assert generate(model, processor, [ask("What?", [IMAGE])]) == [""] and len(said) == 1


@pytest.fixture
def adapter(llava, tmp_path):
    """As peft itself saves one, without a processor; its B is not zero."""
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), settings)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_is_loaded_is_ready_to_answer(llava):
    """In eval mode: the adapters' dropout would change every answer."""
    model = load(llava)[0]
    assert not any(module.training for module in model.modules())


def test_an_adapter_with_its_base(llava, adapter, tmp_path):
    expected = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), adapter)
    assert equal(load(adapter)[0], expected) and equal(load(llava, adapter)[0], expected)
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(InputError, match=f"--model_name_or_path BASE --adapter_name_or_path {adapter}"):
        load(adapter)
    assert equal(load(llava, adapter)[0], expected)


def test_a_hub_id(llava, tmp_path, monkeypatch):
    """Out of the hub's cache, in its layout; without it and without a network, a sentence."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="some/llava: no such folder, nor to be had from the Hugging Face hub"):
        load("some/llava")
    (tmp_path / "models--some--llava" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--llava" / "refs" / "main").write_text("0" * 40)
    shutil.copytree(llava, tmp_path / "models--some--llava" / "snapshots" / ("0" * 40))
    model, _ = load("some/llava")
    assert equal(model, LlavaForConditionalGeneration.from_pretrained(llava))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "some/llava"  # not a folder in the cache of one user


def test_what_is_not_a_whole_model(llava, old_qwen, tmp_path):
    for folder, message in ((old_qwen, "not a LLaVA"), (tmp_path, r"no config\.json")):
        with pytest.raises(InputError, match=message):
            load(folder)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load(llava, tmp_path)
    for step in (3, 12, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (3, 12):  # the third was cut off while it was written
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    with pytest.raises(InputError, match=r"has not ended\. Give its newest whole checkpoint, .*/checkpoint-12"):
        load(tmp_path)
    shutil.copytree(llava, tmp_path / "part")
    weights = load_file(llava / "model.safetensors")
    del weights["multi_modal_projector.linear_1.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing, such as .*projector.linear_1.weight"):
        load(tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(tmp_path / "part")
    (tmp_path / "part" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        load_processor(tmp_path / "part")


def test_a_llava_with_another_kind_of_tower(llava, tmp_path):
    """Pixtral is a model of type llava, too, and marks the rows of its images with tokens of its own."""
    shutil.copytree(llava, tmp_path / "pixtral")
    changed(tmp_path / "pixtral" / "config.json", vision_config={"model_type": "pixtral", "hidden_size": 32})
    with pytest.raises(InputError, match="a vision tower of kind pixtral, not CLIP or SigLIP"):
        load_processor(tmp_path / "pixtral")


def test_no_code_of_a_folder_runs(llava, tmp_path):
    folder, made = tmp_path / "llava", tmp_path / "made"
    shutil.copytree(llava, folder)
    (folder / "evil.py").write_text(f"open({str(made)!r}, 'w')\nclass Evil: pass\n")
    for name, kind in (("config.json", "AutoModel"), ("processor_config.json", "AutoProcessor")):
        changed(folder / name, auto_map={kind: "evil.Evil", "AutoConfig": "evil.Evil"})
    assert equal(load(folder)[0], LlavaForConditionalGeneration.from_pretrained(llava))
    torch.save({"lm_head.weight": Evil(made)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder)
    assert not made.exists()
    with pytest.raises(OSError, match="not readable"):
        torch.load(folder / "pytorch_model.bin", weights_only=False)["lm_head.weight"].read()
    assert made.exists()  # the trap works


# llava-hf/llava-1.5-7b-hf and llava-v1.6-mistral-7b-hf, in short: parts alone, and no text
LLAVA_HF = {
    "vicuna": (
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "USER: <image>\nWhat? ASSISTANT:",
        "USER: <image>\nWhat? ASSISTANT: A cat.<|im_end|>USER: Sure? ASSISTANT:",
    ),
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
        "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0].text + '<|im_end|>' }}{% endif %}{% endfor %}",
        "[INST] <image>\nWhat? [/INST]",
        "[INST] <image>\nWhat? [/INST] A cat.<|im_end|>[INST] Sure? [/INST]",
    ),
}


@pytest.mark.parametrize("kind", LLAVA_HF)
def test_folders_of_llava_hf(llava, tmp_path, kind):
    """Their templates read lists of parts, and LLaVA-1.5's ends no answer; asked as plain transformers asks them."""
    template, once, twice = LLAVA_HF[kind]
    shutil.copytree(llava, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(template)
    plain, processor = (
        LlavaForConditionalGeneration.from_pretrained(llava),
        AutoProcessor.from_pretrained(tmp_path / "hf"),
    )
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True).strip() == once
    model, ours = load(tmp_path / "hf")
    more = [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
    for asked, text in ((messages, once), (messages + more, twice)):
        assert ours.apply_chat_template(asked, add_generation_prompt=True) == text
    inputs = processor(images=IMAGE, text=once, return_tensors="pt")
    ids = plain.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said = processor.decode(ids, skip_special_tokens=True).strip()
    assert generate(model, ours, [ask("What?", [IMAGE])], max_new_tokens=8) == [said]


def test_a_weight_in_a_checkpoint_that_fits_nowhere(llava):
    """Trainer asks torch to pass over it. Those of a pooling head are passed over."""
    model = load(llava)[0]
    take_stored_names(model)
    state = model.state_dict()
    model.load_state_dict(state | {"model.vision_tower.vision_model.head.probe": torch.ones(1)}, strict=False)
    with pytest.raises(RuntimeError, match=r"fits nowhere: model\.language_model\.layers\.9\.weight"):
        model.load_state_dict(state | {"model.language_model.layers.9.weight": torch.ones(1)}, strict=False)
