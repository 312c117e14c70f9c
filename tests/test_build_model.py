"""A built folder against its sources, and in the hands of plain transformers."""

import json
import shutil
import sys

import pytest
import torch
from conftest import run, run_module
from folders import changed
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from train_llava.build_model import build_llava
from train_llava.cli import InputError
from train_llava.model.folder import save_llava
from train_llava.model.generate import ask, generate
from train_llava.model.load import load
from train_llava.model.verify_build import check_answers, check_weights
from train_llava.processing.images import open_image


@pytest.fixture(scope="module")
def built(old_clip, old_qwen, tmp_path_factory):
    """Through the command, from the old forms, in the dtypes they were published in."""
    folder = tmp_path_factory.mktemp("built") / "llava"
    done = run_module(
        "train_llava.build_model",
        *("--vision_model_name_or_path", old_clip, "--language_model_name_or_path", old_qwen, "--output_dir", folder),
    )
    assert done.returncode == 0, done.stderr
    assert "equal to their sources bit for bit" in done.stdout
    return folder


def test_every_tensor_equals_its_source(built, old_clip, old_qwen):
    saved = load_file(built / "model.safetensors")
    vision = torch.load(old_clip / "pytorch_model.bin", weights_only=True)
    language = {}
    for shard in old_qwen.glob("*.safetensors"):
        language |= load_file(shard)
    assert len(list(old_qwen.glob("*.safetensors"))) > 1
    for name, value in saved.items():
        if "projector" in name:
            continue
        inner = name.replace("vision_tower.", "").replace("language_model.", "", 1)
        source = vision["vision_model." + inner] if "vision_tower" in name else language[inner]
        assert value.dtype == source.dtype and torch.equal(value, source), name
    expected = [n for n in vision if n.startswith("vision_model.") and "position_ids" not in n] + list(language)
    assert len(saved) == len(expected) + 4  # and the projector's two weights and biases


def test_the_folder_needs_nothing_of_ours(built, tmp_path):
    """In a process that cannot import train_llava."""
    script = tmp_path / "ask.py"
    script.write_text(
        "import sys\n"
        "from PIL import Image\n"
        "from transformers import pipeline\n"
        f"pipe = pipeline('image-text-to-text', model={str(built)!r})\n"
        "content = [{'type': 'image', 'image': Image.new('RGB', (50, 40), 'red')}, {'type': 'text', 'text': 'What?'}]\n"
        "out = pipe(text=[{'role': 'user', 'content': content}], max_new_tokens=5, return_full_text=False)\n"
        "assert isinstance(out[0]['generated_text'], str)\n"
        "assert not any(name.startswith('train_llava') for name in sys.modules)\n"
        "print('answered')\n"
    )
    done = run(sys.executable, script, PYTHONPATH="")
    assert "answered" in done.stdout, done.stderr


def test_configs_say_what_the_sources_say(built):
    config = json.loads((built / "config.json").read_text())
    assert config["image_token_index"] == 421  # a free row: the table of 448 was not resized
    assert config["image_seq_length"] == 4 and config["dtype"] == "bfloat16"
    # all patches of the last layer but one, without CLS
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    generation = json.loads((built / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [420, 418] and "top_p" not in generation
    processor = AutoProcessor.from_pretrained(built)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (14, 1)


def test_the_end_of_turn_is_an_end_whatever_the_chat_model_says(old_clip, old_qwen, tmp_path):
    """As of chat models that only name the end of a text."""
    shutil.copytree(old_qwen, tmp_path / "qwen")
    generation = json.loads((old_qwen / "generation_config.json").read_text())
    (tmp_path / "qwen" / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 418}))
    assert build_llava(old_clip, tmp_path / "qwen")[0].generation_config.eos_token_id == [420, 418]


def test_a_larger_vocabulary_is_resized_and_old_rows_stay(old_clip, old_qwen, tmp_path):
    shutil.copytree(old_qwen, tmp_path / "small")
    model = Qwen2ForCausalLM.from_pretrained(old_qwen)
    model.resize_token_embeddings(421)  # exactly the tokens there are: no row for <image>
    shutil.rmtree(tmp_path / "small")
    model.save_pretrained(tmp_path / "small")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(old_qwen / file, tmp_path / "small")
    llava, processor = build_llava(old_clip, tmp_path / "small")
    assert llava.get_input_embeddings().num_embeddings == 448
    assert torch.equal(llava.lm_head.weight[:421], model.lm_head.weight)
    save_llava(llava, processor, tmp_path / "llava")
    check_weights(tmp_path / "llava", llava, (old_clip, tmp_path / "small"))


def test_siglip_and_tied_embeddings(old_clip, old_qwen, tmp_path):
    """A tower without CLS, and a chat model whose head is its embedding table, as Qwen1.5-0.5B-Chat."""
    torch.manual_seed(0)
    tower = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    )
    SiglipVisionModel(tower).save_pretrained(tmp_path / "siglip")
    image_processor = AutoImageProcessor.from_pretrained(old_clip).to_dict()
    image_processor |= {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}
    (tmp_path / "siglip" / "preprocessor_config.json").write_text(json.dumps(image_processor))
    shutil.copytree(old_qwen, tmp_path / "tied")
    for shard in (tmp_path / "tied").glob("model*"):
        shard.unlink()
    config = Qwen2ForCausalLM.from_pretrained(old_qwen).config
    config.tie_word_embeddings = True
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "tied")

    llava, processor = build_llava(tmp_path / "siglip", tmp_path / "tied")
    save_llava(llava, processor, tmp_path / "llava")
    check_weights(tmp_path / "llava", llava, (tmp_path / "siglip", tmp_path / "tied"))
    check_answers(tmp_path / "llava")
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    assert reloaded.lm_head.weight.data_ptr() == reloaded.get_input_embeddings().weight.data_ptr()


def test_random_weights_need_configs_alone(old_clip, old_qwen, tmp_path):
    for source, name in ((old_clip, "clip"), (old_qwen, "qwen")):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.bin", "*.safetensors*"))
    llava, processor = build_llava(tmp_path / "clip", tmp_path / "qwen", torch.bfloat16, random_weights=True)
    save_llava(llava, processor, tmp_path / "llava")
    assert check_weights(tmp_path / "llava", llava, None) == len(llava.state_dict())


def test_the_check_notices_a_changed_weight(built, old_clip, old_qwen, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(built, tmp_path / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(built)
    weights = load_file(built / "model.safetensors")
    for name in ("language_model.model.norm.weight", "vision_tower.pre_layrnorm.bias"):
        changed = {**weights, name: weights[name] + 1}
        save_file(changed, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match="differs from its source"):
            check_weights(tmp_path / "llava", model, (old_clip, old_qwen))
    del weights["language_model.lm_head.weight"]
    save_file(weights, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"not saved, such as language model: lm_head\.weight"):
        check_weights(tmp_path / "llava", model, (old_clip, old_qwen))


def without(folder, target, *patterns):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*patterns))
    return target


def test_errors_name_the_folder_and_the_fix(old_clip, old_qwen, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        build_llava(tmp_path / "nowhere", old_qwen)
    with pytest.raises(InputError, match="not a vision model"):
        build_llava(old_qwen, old_qwen)
    with pytest.raises(InputError, match="not a language model"):
        build_llava(old_clip, old_clip)
    with pytest.raises(InputError, match="no chat template"):
        build_llava(old_clip, without(old_qwen, tmp_path / "base", "chat_template.jinja"))
    with pytest.raises(InputError, match="missing or unreadable"):
        build_llava(without(old_clip, tmp_path / "clip", "*.bin"), old_qwen)
    weights = torch.load(old_clip / "pytorch_model.bin", weights_only=True)
    torch.save(
        {n: v for n, v in weights.items() if "pre_layrnorm.bias" not in n}, tmp_path / "clip" / "pytorch_model.bin"
    )
    with pytest.raises(InputError, match=r"clip: 1 weights are missing, such as .*pre_layrnorm\.bias"):
        build_llava(tmp_path / "clip", old_qwen)
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        build_llava(without(old_clip, tmp_path / "clip2", "preprocessor_config.json"), old_qwen)


def test_no_patch_size(old_clip, old_qwen, tmp_path):
    folder = without(old_clip, tmp_path / "clip", "nothing")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["patch_size"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=str(folder)):
        build_llava(folder, old_qwen)


def test_a_full_folder_or_disk_is_refused(llava, tmp_path, monkeypatch):
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava), AutoProcessor.from_pretrained(llava)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        save_llava(model, processor, tmp_path)
    with pytest.raises(InputError, match="holds no model"):
        save_llava(model, processor, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match=r"the disk has 0\.0 GB free"):
        save_llava(model, processor, tmp_path / "new")


def test_the_command_fails_with_2(old_clip, tmp_path):
    done = run_module(
        "train_llava.build_model",
        *("--vision_model_name_or_path", old_clip, "--language_model_name_or_path", tmp_path / "nowhere"),
        *("--output_dir", tmp_path / "out"),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_a_batch_of_prompts_in_plain_transformers(llava, loaded, data, tmp_path):
    """Four prompts of different lengths at once answer as one by one: of a model as it is built, and of an old one,
    whose tokenizer pads on the right, once it is loaded and saved again."""
    shutil.copytree(llava, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "right"}))
    model, processor = load(tmp_path / "old")
    save_llava(model, processor, tmp_path / "again")
    files = sorted((data / "images").iterdir())
    prompts = ["What?", "What is in this image, and of which colour is it?", "Where?", "Say all that you see."]
    chats = []
    for file, prompt in zip(files, prompts, strict=False):
        content = [{"type": "image", "image": str(file)}, {"type": "text", "text": prompt}]
        chats.append([{"role": "user", "content": content}])
    alone = [
        generate(*loaded, [ask(p, [open_image(f)])], max_new_tokens=12)[0] for f, p in zip(files, prompts, strict=False)
    ]
    assert len(set(alone)) > 1
    for folder in (llava, tmp_path / "again"):
        pipe = pipeline("image-text-to-text", model=str(folder))
        said = pipe(text=chats, batch_size=4, return_full_text=False, max_new_tokens=12, do_sample=False)
        assert [row[0]["generated_text"].strip() for row in said] == alone


def test_a_processor_that_asks_in_another_way_is_noticed(llava, tmp_path):
    """Here with other numbers of image tokens than the tower has features."""
    shutil.copytree(llava, tmp_path / "llava")
    changed(tmp_path / "llava" / "processor_config.json", num_additional_image_tokens=3)
    with pytest.raises(RuntimeError, match="the processor's prompt is not the one of the training, from token"):
        check_answers(tmp_path / "llava")
