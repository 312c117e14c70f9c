"""Every family of chat models and both kinds of towers, tiny: build, text logits, a training step, an answer, a merge.

The references are the chat model by itself and plain transformers' loss.
"""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, call
from families import REFUSED, SUPPORTED, chat_folder, table
from PIL import Image
from safetensors.torch import load_file, save_file
from trainers import assert_close, gradients, plain_and_ours
from transformers import AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from train_llava.build_model import build_llava, main
from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.merge_lora import main as merge
from train_llava.model.config import SUPPORTED as SUPPORTED_IN_HELP
from train_llava.model.config import compose_config, read_text_config, read_vision_config
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.generate import ask, collator_of, generate
from train_llava.model.load import load
from train_llava.model.verify_build import check_logits, text_logits
from train_llava.planning.memory import MemoryModel
from train_llava.planning.meta_model import meta_model

NAMES = {each.name: each for each in SUPPORTED}


def build(vision, language, output, *flags):
    where = ("--vision_model_name_or_path", vision, "--language_model_name_or_path", language, "--output_dir", output)
    return call(main, *where, *flags)


@pytest.mark.parametrize("name", NAMES)
def test_a_family(name, old_clip, data, tmp_path):
    family = NAMES[name]
    language, folder = chat_folder(family, tmp_path / "chat"), tmp_path / "llava"
    done = build(old_clip, language, folder, "--dtype", "float32")
    assert done.returncode == 0, done.stderr

    model, processor = load(folder)
    encoder, alone = collator_of(processor).encoder, AutoModelForCausalLM.from_pretrained(language).eval()
    for text in ("What is 2 + 3?", "Blue or red? Say it in one word, please."):
        ids = torch.tensor([encoder.encode([{"role": "user", "content": text}], add_generation_prompt=True)[0]])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)  # in fp32, from the files

    # a step as training takes it, against plain transformers on the same batch
    plain, ours = plain_and_ours(folder, data, tmp_path, "use_lora")
    examples = [ours.train_dataset[i] for i in range(4)]
    plain.model(**plain.data_collator(examples)).loss.backward()
    ours.data_collator = LlavaCollator(processor, for_trainer=True)
    ours.compute_loss(ours.model, ours.data_collator(examples)).backward()
    assert_close(gradients(ours.model), gradients(plain.model))
    assert any("lora_B" in name and gradient.any() for name, gradient in gradients(ours.model).items())

    answer = generate(model, processor, [ask("What is this?", [Image.new("RGB", (40, 30), "red")])], max_new_tokens=4)
    assert len(answer) == 1
    ours.model.save_pretrained(tmp_path / "adapter")
    adapter = ("--adapter_name_or_path", tmp_path / "adapter", "--model_name_or_path", folder)
    done = call(merge, *adapter, "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr

    # the estimate knows its layers
    config = compose_config(read_vision_config(old_clip), read_text_config(language))
    meta = meta_model(config, torch.float32, "use_lora")
    assert MemoryModel.of(meta).trained == sum(p.numel() for p in ours.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [each.name for each in REFUSED])
def test_what_does_not_fit_is_refused_before_weights_are_read(name, old_clip, tmp_path):
    family = next(each for each in REFUSED if each.name == name)
    language = chat_folder(family, tmp_path / "chat")
    for weights in language.glob("*.safetensors"):
        weights.write_bytes(b"not read")
    done = build(old_clip, language, tmp_path / "llava")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(family.note, done.stderr) and str(language) in done.stderr
    assert not (tmp_path / "llava").exists()
    with pytest.raises(InputError, match=family.note):  # the estimate says so, too
        read_text_config(language)


def test_the_table_in_the_docs():
    assert table() in (ROOT / "docs" / "models.md").read_text()
    assert SUPPORTED_IN_HELP in call(main, "--help").stdout
    shown = SUPPORTED_IN_HELP.removeprefix("Supported are ").split("; all of")[0]
    for name in re.split(r", and dense chat models such as |, | and ", shown):
        assert name.removesuffix(" of fixed size") in table() or name == "3", name  # Llama 2 and 3


def test_logits_that_no_config_tells_of(old_clip, old_qwen):
    """A chat model that works on its logits in a way that nobody foresaw."""
    model, processor = build_llava(old_clip, old_qwen, dtype=torch.float32)
    encoder = collator_of(processor).encoder
    published_logits = text_logits(model, encoder)
    check_logits(model, encoder, published_logits, old_qwen)
    for change in (lambda logits: logits * 1.01, lambda logits: logits + 1e-5, lambda logits: logits.tanh() * 30):
        with pytest.raises(InputError, match=r"gives other logits than by itself"):
            check_logits(model, encoder, [change(logits) for logits in published_logits], old_qwen)
    half = [logits.bfloat16() for logits in text_logits(model.bfloat16(), encoder)]
    check_logits(model, encoder, [logits * (1 + 2**-7) for logits in half], old_qwen)  # a rounding
    with pytest.raises(InputError, match="off by"):
        check_logits(model, encoder, [logits * 1.1 for logits in half], old_qwen)


def test_a_scale_that_is_no_power_of_two_is_refused(old_clip, tmp_path):
    """The head could hold it only rounded."""
    family = NAMES["Granite 3"]
    language = chat_folder(family, tmp_path / "chat")
    config = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps(config | {"logits_scaling": 7.3}))
    with pytest.raises(InputError, match="other logits"):
        build_llava(old_clip, language, dtype=torch.float32)


def siglip(old_clip, folder, image_size=28, processor_size=28):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    SiglipVisionModel(SiglipVisionConfig(**size, image_size=image_size, patch_size=14)).save_pretrained(folder)
    settings = AutoImageProcessor.from_pretrained(old_clip).to_dict()
    settings |= {"image_processor_type": "SiglipImageProcessor", "do_center_crop": False}
    settings |= {"size": {"height": processor_size, "width": processor_size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_an_image_processor_of_another_size(old_clip, old_qwen, tmp_path, tower):
    if tower == "siglip":
        folder = siglip(old_clip, tmp_path / "tower", image_size=28, processor_size=42)
    else:
        folder = tmp_path / "tower"
        shutil.copytree(old_clip, folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"crop_size": 42, "size": 42}))
    done = build(folder, old_qwen, tmp_path / "llava")
    assert done.returncode == 2 and "(3, 42, 42), and the vision tower reads (3, 28, 28)" in done.stderr
    assert not (tmp_path / "llava").exists()


def test_siglip_trains_and_answers(old_clip, old_qwen, data, tmp_path):
    done = build(siglip(old_clip, tmp_path / "siglip"), old_qwen, tmp_path / "llava", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    plain, ours = plain_and_ours(tmp_path / "llava", data, tmp_path, "none")
    examples = [LlavaDataset(data)[i] for i in range(3)]
    plain.model(**plain.data_collator(examples)).loss.backward()
    ours.compute_loss(ours.model, ours.data_collator(examples)).backward()
    assert_close(gradients(ours.model), gradients(plain.model))


def test_code_in_a_folder_never_runs(old_clip, old_qwen, tmp_path):
    """Nor is anybody asked whether it may: of a config, a tokenizer, an image processor, of known and unknown kinds."""
    made = tmp_path / "made"
    for part, kind in (("chat", "Qwen2Config"), ("chat", "unheard_of"), ("tower", "unheard_of")):
        folder = tmp_path / f"{part}-{kind}"
        shutil.copytree(old_qwen if part == "chat" else old_clip, folder)
        (folder / "evil.py").write_text(f"open({str(made)!r}, 'w')\nclass Evil: pass\n")
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            if (folder / name).is_file():
                content = json.loads((folder / name).read_text())
                kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor", "AutoProcessor")
                content["auto_map"] = dict.fromkeys(kinds, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", None]}
                if kind == "unheard_of" and name == "config.json":
                    content |= {"model_type": kind, "vision_config": {"model_type": kind}}
                (folder / name).write_text(json.dumps(content))
        halves = (old_clip, folder) if part == "chat" else (folder, old_qwen)
        done = build(*halves, tmp_path / f"llava-{part}-{kind}")
        assert not made.exists() and "Do you wish" not in done.stdout + done.stderr
        assert done.returncode == (0 if kind == "Qwen2Config" else 2), done.stderr
        assert kind == "Qwen2Config" or "code of its own" in done.stderr


def test_nothing_half_built_stays(old_clip, old_qwen, tmp_path, monkeypatch):
    """A build that fails at its end leaves no folder, or the model that was there."""
    import train_llava.build_model as module

    def fail(folder):
        assert (folder / "model.safetensors").is_file()
        raise RuntimeError("does not answer")

    monkeypatch.setattr(module, "check_answers", fail)
    assert build(old_clip, old_qwen, tmp_path / "deep" / "new").returncode == 1
    assert not (tmp_path / "deep").exists()
    monkeypatch.undo()

    old = tmp_path / "old"
    assert build(old_clip, old_qwen, old).returncode == 0
    (old / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    monkeypatch.setattr(module, "check_answers", fail)
    assert build(old_clip, old_qwen, old, "--overwrite", "--dtype", "float32").returncode == 1
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    monkeypatch.undo()

    (old / "model-00001-of-00002.safetensors").write_bytes(b"of a larger model")  # would be taken for a part
    assert build(old_clip, old_qwen, old, "--overwrite", "--dtype", "float32").returncode == 0
    assert (old / "notes.txt").read_text() == "mine" and not (old / "model-00001-of-00002.safetensors").exists()
    assert {value.dtype for value in load_file(old / "model.safetensors").values()} == {torch.float32}
    assert {path.name for path in old.iterdir()} == before.keys()


def test_a_tokenizer_that_adds_its_own_beginning(old_clip, old_qwen, tmp_path):
    """As Llama's does: transformers' pipelines would put it in front of a template that has none."""
    language = tmp_path / "chat"
    shutil.copytree(old_qwen, language)
    file = json.loads((language / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    rest = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [first, *rest, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [418], "tokens": ["<|endoftext|>"]}}
    kind = {"type": "TemplateProcessing", "single": [first, *rest], "pair": pair, "special_tokens": special}
    (language / "tokenizer.json").write_text(json.dumps(file | {"post_processor": kind}))
    settings = json.loads((language / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "add_bos_token": True}
    (language / "tokenizer_config.json").write_text(json.dumps(settings))
    done = build(old_clip, language, tmp_path / "llava")
    assert done.returncode == 0, done.stderr


def test_weights_of_a_chat_model_that_are_missing(old_clip, old_qwen, tmp_path):
    shutil.copytree(old_qwen, tmp_path / "part")
    shard = sorted((tmp_path / "part").glob("*.safetensors"))[0]
    weights = load_file(shard)
    weights.popitem()
    save_file(weights, shard, {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing|missing or unreadable"):
        build_llava(old_clip, tmp_path / "part")


def test_apply_train_type_names_layers_that_are_there(old_clip, tmp_path):
    language = chat_folder(NAMES["Phi-3, Phi-3.5"], tmp_path / "chat")
    model, _ = build_llava(old_clip, language)
    with pytest.raises(InputError, match=r"--lora_target_modules q_proj: no such layer; there are .*qkv_proj"):
        apply_train_type(model, "use_lora", LoraSettings(lora_target_modules=["q_proj"]))
