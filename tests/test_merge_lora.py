"""Merged folders against sums worked out by hand, and against plain peft and transformers."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import call
from folders import changed, make_adapter
from hub import files_sent, stand_in
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration, pipeline

from train_llava.data import LlavaDataset
from train_llava.merge_lora import main
from train_llava.model.generate import answers
from train_llava.model.load import load
from train_llava.model.verify_merge import check_merge

LORA = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def adapter(llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    return make_adapter(LlavaForConditionalGeneration.from_pretrained(llava), folder)


def assert_sum(merged, base, adapter):
    """All of W + 12 / 4 B A, the adapter's projector, and everything else of the base, by the names in the files."""
    merged, base = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    added = load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    for name, value in merged.items():
        own = f"base_model.model.model.{name}"
        if name.endswith("q_proj.weight") and "language_model" in name:
            layer = name.split(".")[3]
            a, b = (added[LORA.format(layer, part)].double() for part in "AB")
            expected = base[name].double() + 3 * b @ a
            assert (expected - base[name]).abs().max() > 0.1
            torch.testing.assert_close(value.double(), expected, rtol=4 * torch.finfo(value.dtype).eps, atol=1e-6)
        else:
            assert torch.equal(value, added.get(own, base[name]).to(value.dtype)), name
    assert "base_model.model.model.multi_modal_projector.linear_1.weight" in added


def test_weights_and_answers(llava, adapter, data, tmp_path):
    """Plain peft with one image at a time, ours in batches, and the merged folder in a plain pipeline."""
    done = call(main, "--adapter_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "2 weights equal base + lora_alpha / r x B A within torch.float32" in done.stdout
    assert_sum(tmp_path / "merged", llava, adapter)

    examples = [{**example, "messages": example["messages"][:1]} for example in LlavaDataset(data)]
    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), adapter)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    batched = dict(answers(*load(tmp_path / "merged"), examples, max_new_tokens=8))
    describe = pipeline("image-text-to-text", model=str(tmp_path / "merged"))
    for i, example in enumerate(examples):
        prompt = processor.apply_chat_template(example["messages"], add_generation_prompt=True)
        inputs = processor(images=example["images"], text=prompt, return_tensors="pt")
        ids = plain.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        said = processor.decode(ids, skip_special_tokens=True).strip()
        words = example["messages"][0]["content"]
        content = [{"type": "image", "image": example["images"][0]}]
        content.insert(words.startswith("<image>"), {"type": "text", "text": words.replace("<image>", "").strip()})
        asked = {"text": [{"role": "user", "content": content}], "return_full_text": False, "max_new_tokens": 8}
        assert batched[i] == said == describe(**asked)[0]["generated_text"].strip(), example["id"]
    assert len(set(batched.values())) > 5  # not all alike
    assert batched != dict(answers(*load(llava), examples, max_new_tokens=8))


def test_an_adapter_from_4_bits_is_merged_in_full_precision(llava, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_adapter(load(llava, dtype=torch.float32, in_4bit=True)[0], tmp_path / "adapter")
    done = call(main, "--adapter_name_or_path", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert_sum(tmp_path / "merged", llava, tmp_path / "adapter")


def test_bf16_and_the_old_layout(old_llava, adapter, tmp_path):
    """A base of transformers 4 in bf16, which says nowhere where a turn ends; and a card that the hub can read."""
    weights = {name: value.bfloat16() for name, value in load_file(old_llava / "model.safetensors").items()}
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, old_llava / "model.safetensors", {"format": "pt"})
    changed(old_llava / "config.json", torch_dtype="bfloat16")
    where = ("--adapter_name_or_path", adapter, "--model_name_or_path", old_llava)
    done = call(main, *where, "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "within torch.bfloat16" in done.stdout
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == 420  # <|im_end|>
    card = (tmp_path / "merged" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert f"with the adapter `{adapter.name}` merged into it" in card and str(adapter.parent) not in card


def test_a_wrong_sum_is_found(llava, adapter, tmp_path):
    merged = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), adapter)
    merged = merged.merge_and_unload()
    assert check_merge(merged, llava, adapter) == 2
    layer = merged.model.language_model.layers[1]
    for weight in (layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight, merged.lm_head.weight):
        kept = weight.data[0, 0].item()
        weight.data[0, 0] += 1e-5
        with pytest.raises(RuntimeError, match=r"weight is not that of .*/llava with .*/adapter added"):
            check_merge(merged, llava, adapter)
        weight.data[0, 0] = kept
    shutil.copytree(adapter, tmp_path / "more")
    added = load_file(adapter / "adapter_model.safetensors")
    added["base_model.model.model.unknown.weight"] = torch.zeros(4)
    save_file(added, tmp_path / "more" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"1 tensors were not merged, such as language model: unknown\.weight"):
        check_merge(merged, llava, tmp_path / "more")


KINDS = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5, "up_proj": 3}},
    "rsLoRA, patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "biases": {"bias": "lora_only"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "a head": {"modules_to_save": ["lm_head", "multi_modal_projector"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "fc1"]},
    "all linear": {"target_modules": "all-linear"},
    "embeddings, DoRA": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    "a convolution": {"target_modules": ["patch_embedding", "v_proj"]},
    "biases of the adapters": {"target_modules": ["fc1", "out_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_others(llava, tmp_path, kind):
    """Every weight of the folder equals what PEFT's own merge makes of the same adapter."""
    torch.manual_seed(0)
    plain = ["q_proj", "v_proj", "up_proj"]
    common = {"r": 4, "lora_alpha": 12, "target_modules": plain, "init_lora_weights": False}
    settings = LoraConfig(**common | KINDS[kind])
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), settings)
    for name, parameter in model.named_parameters():
        if (
            "modules_to_save" in name
            or (parameter.requires_grad and "bias" in name)
            or ("lora_B" in name and name.endswith("bias"))
        ):
            torch.nn.init.normal_(parameter)
        elif "magnitude" in name:
            parameter.data *= 1 + torch.rand_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    done = call(main, "--adapter_name_or_path", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    theirs = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), tmp_path / "adapter")
    theirs = theirs.merge_and_unload().state_dict()
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    base = LlavaForConditionalGeneration.from_pretrained(llava).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert sum(not torch.equal(ours[name], base[name]) for name in base) >= 2


def test_what_is_no_lora(llava, tmp_path):
    settings = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), settings).save_pretrained(tmp_path / "ia3")
    done = call(main, "--adapter_name_or_path", tmp_path / "ia3", "--output_dir", tmp_path / "merged")
    assert done.returncode == 2 and "an adapter of the type IA3" in done.stderr and not (tmp_path / "merged").exists()


def test_what_changes_its_base(llava, adapter, tmp_path):
    """PiSSA's adapter is a part of the weights themselves."""
    changed(
        adapter_copy := shutil.copytree(adapter, tmp_path / "pissa") / "adapter_config.json", init_lora_weights="pissa"
    )
    done = call(main, "--adapter_name_or_path", adapter_copy.parent, "--output_dir", tmp_path / "merged")
    assert done.returncode == 2 and "'pissa' changes the base" in done.stderr and not (tmp_path / "merged").exists()


def test_refusals(llava, adapter, tmp_path):
    (tmp_path / "mine.txt").touch()
    done = call(main, "--adapter_name_or_path", adapter, "--output_dir", tmp_path)
    assert done.returncode == 2 and "is not empty" in done.stderr and (tmp_path / "mine.txt").is_file()
    done = call(main, "--adapter_name_or_path", llava, "--output_dir", tmp_path / "merged")
    assert done.returncode == 2 and "adapter_config.json" in done.stderr
    where = ("--adapter_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    done = call(main, *where, "--push_to_hub", "not/an/id")
    assert done.returncode == 2 and "--push_to_hub not/an/id" in done.stderr and not (tmp_path / "merged").exists()


def test_push_to_a_stand_in_for_the_hub(adapter, tmp_path, monkeypatch):
    where = ("--adapter_name_or_path", adapter, "--output_dir", tmp_path / "merged", "--push_to_hub", "me/merged")
    with stand_in(monkeypatch) as kept:
        done = call(main, *where)
    assert done.returncode == 0, done.stderr
    assert files_sent(kept) == {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    assert json.loads(kept[0][1])["name"] == "merged"
    assert 'model="me/merged")' in (tmp_path / "merged" / "README.md").read_text()
