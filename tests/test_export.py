"""Exported files read back: the language model by transformers' reader of GGUF files, the tower as clip.cpp does."""

import json
import shutil

import pytest
import torch
from clip_cpp import Mmproj
from conftest import call
from exports import build, export, keys_of
from families import SUPPORTED, Family, chat_folder
from folders import changed, make_adapter, snapshot
from gguf import GGUFReader
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from train_llava import merge_lora
from train_llava.model.load import load_processor
from train_llava.processing.chat_template import CONTENT_PARTS

TEXTS = ("What is 2 + 3?", "  I've 1234 ideas,\n\n\tand you'll HATE'EM... ", "Ünïcödé 漢字 🙂 x_y")
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 64}
FAMILIES = {each.name: each for each in SUPPORTED}
FAMILIES["Llama 3.1"] = Family("Llama 3.1", "Llama", {"rope_parameters": ROPE})
EXPORTED = ("Qwen1.5, Qwen2, Qwen2.5", "Qwen2.5-0.5B to 3B", "Qwen3 (dense)", "SmolLM2", "Llama 3.1")


@pytest.fixture(scope="module")
def exported(llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "gguf"
    done = export(llava, folder)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {"model.gguf", "mmproj.gguf"}
    return folder


@pytest.mark.parametrize("name", EXPORTED)
def test_the_language_model(name, old_clip, tmp_path):
    """transformers' reader gives the chat model back, bit for bit; and the tokenizer, id for id."""
    language = chat_folder(FAMILIES[name], tmp_path / "chat")
    done = export(build(old_clip, language, tmp_path / "llava"), tmp_path / "gguf")
    assert done.returncode == 0, done.stderr
    ours = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    head = ours.model.layers[0].self_attn.head_dim
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    if "qwen3" in ours.config.model_type:
        options["head_dim"] = head  # which the reader leaves out
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", **options)
    values = ours.state_dict()
    assert values.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, values[key]), key
    for key in ("rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "hidden_size", "vocab_size"):
        assert getattr(theirs.config, key) == pytest.approx(getattr(ours.config, key)), key  # the first is in fp32
    keys = keys_of(tmp_path / "gguf" / "model.gguf")
    architecture = keys["general.architecture"]
    assert keys[f"{architecture}.rope.freq_base"] == ours.config.rope_parameters["rope_theta"]
    assert {keys[f"{architecture}.{key}"] for key in ("attention.key_length", "rope.dimension_count")} == {head}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    own = load_processor(tmp_path / "llava").tokenizer
    for text in (*TEXTS, "<|im_start|>user\n<image>\nHi<|im_end|>"):
        assert tokenizer(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids


def test_the_rotary_frequencies_of_llama_3(old_clip, tmp_path):
    """Frequencies as Llama 3.1's own code scales them (llama-models, llama3/reference_impl/model.py)."""
    language = chat_folder(FAMILIES["Llama 3.1"], tmp_path / "chat")
    assert export(build(old_clip, language, tmp_path / "llava"), tmp_path / "gguf").returncode == 0
    [factors] = [each.data for each in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors if "rope" in each.name]
    kinds = set()
    for i, factor in enumerate(factors):
        frequency = 5e5 ** (-2 * i / 12)
        wavelength = 2 * torch.pi / frequency
        if wavelength < 64 / 4:
            kind, expected = "high", frequency
        elif wavelength > 64 / 1:
            kind, expected = "low", frequency / 8
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            kind, expected = "between", (1 - smooth) * frequency / 8 + smooth * frequency
        assert frequency / factor == pytest.approx(expected, rel=1e-5)
        kinds.add(kind)
    assert kinds == {"high", "low", "between"}


def test_every_token_has_a_kind(llava, exported):
    keys, own = keys_of(exported / "model.gguf"), load_processor(llava).tokenizer
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 448 > len(own)
    assert [tokens[i] for i in range(len(own))] == own.convert_ids_to_tokens(range(len(own)))
    special = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"}
    assert {token for token, kind in zip(tokens, kinds, strict=True) if kind == 3} == special  # CONTROL
    assert set(kinds[len(own) :]) == {5} and set(kinds[: len(own) - 4]) == {1}  # UNUSED, NORMAL
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (420, 418)
    assert keys["tokenizer.ggml.add_bos_token"] is False


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    SiglipVisionModel(SiglipVisionConfig(**size, image_size=30, patch_size=14)).save_pretrained(folder)
    square = {"height": 30, "width": 30}
    image = {"image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": square, "resample": 3}
    image |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    image |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return folder


@pytest.mark.parametrize("tower", ["old_clip", "siglip"])
def test_the_tower_as_clip_cpp_computes_it(tower, old_qwen, tmp_path, request):
    """Its features of an image of the tower's size, whole, against plain transformers with its own image processor."""
    folder = build(request.getfixturevalue(tower), old_qwen, tmp_path / "llava")
    assert export(folder, tmp_path / "gguf").returncode == 0
    model, images = LlavaForConditionalGeneration.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    size = model.config.vision_config.image_size
    noise = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    file = Mmproj(tmp_path / "gguf" / "mmproj.gguf")
    with torch.no_grad():
        expected = model.get_image_features(images(image, return_tensors="pt")["pixel_values"]).pooler_output[0]
        ours = file.features(file.pixels(image))
    assert expected.std() > 0.005
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3 * expected.std().item())  # gelu by tanh


def test_types_and_values_of_bf16(old_clip, old_qwen, tmp_path):
    """Matrices as they are stored, bit for bit; vectors and embeddings of the image in fp32."""
    folder = build(old_clip, old_qwen, tmp_path / "llava", dtype=torch.bfloat16)
    assert export(folder, tmp_path / "gguf").returncode == 0
    stored = load_file(folder / "model.safetensors")
    for name in ("model", "mmproj"):
        for each in GGUFReader(tmp_path / "gguf" / f"{name}.gguf").tensors:
            vector = len(each.shape) == 1 or each.name in ("v.patch_embd.weight", "v.position_embd.weight")
            assert each.tensor_type.name == ("F32" if vector else "BF16"), each.name
        assert keys_of(tmp_path / "gguf" / f"{name}.gguf")["general.file_type"] == 32  # MOSTLY_BF16
    up = next(t for t in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors if t.name == "blk.1.ffn_up.weight")
    [own] = [value for name, value in stored.items() if name.endswith("layers.1.mlp.up_proj.weight")]
    assert torch.equal(torch.tensor(up.data.copy()).view(torch.bfloat16).reshape(own.shape), own)


def test_the_prompt_is_that_of_the_training(llava, exported):
    """llama.cpp joins parts without a line break, and writes a marker for an image (common/chat.cpp)."""
    template = keys_of(exported / "model.gguf")["tokenizer.chat_template"]
    processor = AutoProcessor.from_pretrained(llava)
    image, marker = {"type": "image"}, "<__media_Xy1__>"
    for parts in (["i", "What?"], ["Look:", "i"], ["i", "i", "Both?"], ["A", "i", "B __> c"], ["i"], ["No image __>"]):
        theirs = [{"role": "user", "content": "".join(marker if p == "i" else p for p in parts)}]
        ours = [{"role": "user", "content": [image if p == "i" else {"type": "text", "text": p} for p in parts]}]
        for more in ([], [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Sure?"}]):
            options = {"add_generation_prompt": True, "tokenize": False}
            text = processor.tokenizer.apply_chat_template(theirs + more, chat_template=template, **options)
            assert text.replace(marker, "<image>") == processor.apply_chat_template(ours + more, **options)
    written = [{"role": "user", "content": f"{marker}\nWhat?"}]  # by somebody who knows
    text = processor.tokenizer.apply_chat_template(written, chat_template=template, tokenize=False)
    assert f"{marker}\nWhat?" in text


@pytest.fixture(scope="module")
def with_siglip(siglip, old_qwen, tmp_path_factory):
    return build(siglip, old_qwen, tmp_path_factory.mktemp("siglip") / "llava")


def test_a_modelfile(with_siglip, tmp_path):
    done = export(with_siglip, tmp_path / "ollama", "ollama")
    assert done.returncode == 0, done.stderr
    assert (
        (tmp_path / "ollama" / "Modelfile").read_text()
        == r'''FROM ./model.gguf
FROM ./mmproj.gguf
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
PARAMETER temperature 0
TEMPLATE """{{- $before := "first" }}
{{- range .Messages }}
{{- $place := printf "%s %s" $before .Role }}
{{- if eq $place "first user" }}{{ "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" }}
{{- else if eq $place "user assistant" }}{{ "<|im_end|>\n<|im_start|>assistant\n" }}
{{- else if eq $place "assistant user" }}{{ "<|im_end|>\n<|im_start|>user\n" }}
{{- else if eq $place "first system" }}{{ "<|im_start|>system\n" }}
{{- else if eq $place "system user" }}{{ "<|im_end|>\n<|im_start|>user\n" }}
{{- end }}
{{- .Content }}
{{- $before = .Role }}
{{- end }}
{{- "<|im_end|>\n<|im_start|>assistant\n" }}"""
'''
    )
    assert {path.name for path in (tmp_path / "ollama").iterdir()} == {"model.gguf", "mmproj.gguf", "Modelfile"}


def test_a_template_that_no_modelfile_can_hold(with_siglip, tmp_path):
    folder = shutil.copytree(with_siglip, tmp_path / "counting")
    counting = (
        "{%- for m in messages %}<|im_start|>{{ loop.index }} {{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>{{ messages|length + 1 }} assistant\n{%- endif %}"
    )
    (folder / "chat_template.jinja").write_text(CONTENT_PARTS.read_text() + counting)
    weights = (folder / "model.safetensors").rename(tmp_path / "weights")
    done = export(folder, tmp_path / "ollama", "ollama")
    assert done.returncode == 2 and "cannot be written as Ollama's" in done.stderr, done.stderr
    weights.rename(folder / "model.safetensors")
    assert not (tmp_path / "ollama").exists()
    assert export(folder, tmp_path / "gguf").returncode == 0


@pytest.mark.parametrize("kind", ["gguf", "vllm"])
def test_an_adapter_is_merged_on_the_way(llava, tmp_path, kind):
    """Byte for byte what the merged folder becomes, and nothing beside it."""
    adapter = make_adapter(LlavaForConditionalGeneration.from_pretrained(llava), tmp_path / "adapter")
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(llava))
    done = call(merge_lora.main, "--adapter_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    for source, output in ((tmp_path / "merged", "two"), (adapter, "one")):
        done = export(source, tmp_path / output, kind)
        assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged", "one", "two"}


def test_a_folder_for_vllm(llava, old_llava, tmp_path):
    """The names of transformers 4, in one file and in shards; transformers reads equal weights and equal words."""
    plain = LlavaForConditionalGeneration.from_pretrained(llava)
    sharded = tmp_path / "sharded"
    shutil.copytree(llava, sharded, ignore=shutil.ignore_patterns("model.safetensors"))
    plain.save_pretrained(sharded, max_shard_size="60KB")
    (sharded / "notes.txt").write_text("mine")
    for i, folder in enumerate((llava, sharded, old_llava)):
        output = tmp_path / str(i)
        done = export(folder, output, "vllm")
        assert done.returncode == 0, done.stderr
        names = {name for file in output.glob("*.safetensors") for name in load_file(file)}
        assert {"vision_tower.vision_model." in name for name in names if "vision_tower" in name} == {True}
        assert not any("vision_model.vision_model" in name for name in names) and not (output / "notes.txt").exists()
        for index in output.glob("*.index.json"):
            assert set(json.loads(index.read_text())["weight_map"]) == names
        theirs = LlavaForConditionalGeneration.from_pretrained(output).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in plain.state_dict().items())
    assert len(list((tmp_path / "1").glob("model-*.safetensors"))) > 2
    assert (
        AutoProcessor.from_pretrained(tmp_path / "0").chat_template
        == AutoProcessor.from_pretrained(llava).chat_template
    )
