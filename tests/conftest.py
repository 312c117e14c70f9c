"""Small models in the forms in which the real ones are published, and data in the layout of CC3M-595K."""

import io
import json
import os
import shutil
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from browsers import launched
from folders import changed
from page_client import TOKENS, served
from safetensors.torch import load_file, save_file
from small_world import make_tokenizer, write_split
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests import qwen_tokenizer as qwen
from train_llava.build_model import build_llava
from train_llava.model.folder import save_llava
from train_llava.model.generate import ask, generate
from train_llava.model.load import load
from train_llava.processing.images import open_image

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The Arrow copies of the tests' data go away with the tests."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    import datasets

    datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """Qwen1.5's real tokenizer with its chat template."""
    vocabulary, merges = qwen.qwen_vocabulary()
    assert (len(vocabulary), len(merges)) == (151643, 151387)
    return qwen.qwen_tokenizer()


def clip_model():
    """A CLIP of the real one's shape: its tower ends in a layer and a norm that LLaVA does not read."""
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    vision, text = {"image_size": 28, "patch_size": 14}, {"vocab_size": 64, "eos_token_id": 63, "bos_token_id": 62}
    return CLIPModel(CLIPConfig(vision_config={**size, **vision}, text_config={**size, **text}, projection_dim=16))


@pytest.fixture(scope="session")
def old_clip(tmp_path_factory):
    """Like openai/clip-vit-large-patch14-336 on the hub: pickled fp32 weights with the text tower and position_ids
    buffers, names with `vision_model.`, a sparse config, an image processor config of transformers 4."""
    folder = tmp_path_factory.mktemp("clip")
    model = clip_model()
    weights = model.state_dict()
    for tower, count in (("vision_model", 5), ("text_model", 77)):
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(count)[None]
    torch.save(weights, folder / "pytorch_model.bin")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    text = {"vocab_size": 64, "eos_token_id": 63, "bos_token_id": 62}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 16,
        "torch_dtype": "float32",
        "transformers_version": "4.21.3",
        "text_config": {**size, **text, "model_type": "clip_text_model", "projection_dim": 16},
        "text_config_dict": None,
        "vision_config": {**size, "image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"},
        "vision_config_dict": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = {
        "crop_size": 28,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 28,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="session")
def old_qwen(tmp_path_factory):
    """Like Qwen/Qwen1.5-4B-Chat: bf16 in shards, several ends of turn and sampling settings."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=448,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=418,
        eos_token_id=420,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True, top_p=0.8, repetition_penalty=1.1, bos_token_id=418, pad_token_id=418, eos_token_id=[420, 418]
    )
    model.save_pretrained(folder, max_shard_size="60KB")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory, old_clip, old_qwen):
    """A small built LLaVA folder in fp32, so that comparisons are not blurred by rounding."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    torch.manual_seed(3)
    save_llava(*build_llava(old_clip, old_qwen, dtype=torch.float32), folder)
    return folder


@pytest.fixture
def old_llava(llava, tmp_path):
    """The same model as transformers 4.39 saved it: names with `vision_model.`, a config of old keys, processor files
    without what belongs to images, the chat template inside the tokenizer's config, no end of turn anywhere."""
    folder = tmp_path / "old"
    folder.mkdir()
    weights = load_file(llava / "model.safetensors")
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()}
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((llava / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["torch_dtype"] = part.pop("dtype")
    config["text_config"]["rope_theta"] = config["text_config"].pop("rope_parameters")["rope_theta"]
    del config["image_seq_length"], config["text_config"]["layer_types"], config["text_config"]["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config | {"ignore_index": -100, "transformers_version": "4.39.0"}))
    image = json.loads((llava / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(image | {"processor_class": "LlavaProcessor"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llava / name, folder)
    plain = (llava / "chat_template.jinja").read_text().split("{%- set messages = flat.messages -%}\n")[-1]
    changed(folder / "tokenizer_config.json", chat_template=plain, extra_special_tokens=None)
    return folder


@pytest.fixture(params=["4.41.2", "4.53"])
def old_pair(request, llava, tmp_path):
    """Base and adapter of an old version, the base with the processor of the tests' LLaVA; and what they answered."""
    shutil.copytree(ROOT / "tests" / "old_adapters" / request.param, tmp_path / "old")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llava / name, tmp_path / "old" / "base")
    answers = torch.load(tmp_path / "old" / "logits.pt")
    ids = answers["ids"]
    at = int((ids[0] == 421).nonzero()[0])
    text = ids[0][ids[0] != 421]
    ids = torch.cat([text[:at], torch.full((4,), 421), text[at:]])[None]  # one per patch, as today
    asked = {"input_ids": ids, "pixel_values": answers["pixels"], "attention_mask": torch.ones_like(ids)}
    return tmp_path / "old" / "base", tmp_path / "old" / "adapter", asked, answers


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """64 small images of the demo's world, captions of one or two things; so batches have uneven numbers of labels."""
    folder = tmp_path_factory.mktemp("data")
    write_split(folder, "train", 64, seed=7)
    return folder


@pytest.fixture(scope="session")
def files(data):
    """Images to ask about."""
    return sorted((data / "images").iterdir())[:12]


@pytest.fixture(scope="session")
def page(llava, files, tmp_path_factory):
    """Address and process id of train_llava.app, with examples."""
    examples = tmp_path_factory.mktemp("examples")
    for file in files[:3]:
        shutil.copy(file, examples)
    (examples / "notes.txt").write_text("no image")
    with served(sys.executable, "-m", "train_llava.app", "--model_name_or_path", llava, "--examples", examples) as one:
        yield one


@pytest.fixture(scope="module")
def browser():
    with launched() as one:
        yield one


@pytest.fixture(scope="session")
def loaded(llava):
    return load(llava)


@pytest.fixture(scope="session")
def alone(loaded):
    """What the model answers when nobody else asks."""

    def answer(prompt, *photos, **options):
        images = [open_image(file) for file in photos]
        return generate(*loaded, [ask(prompt, images)], **{"max_new_tokens": TOKENS, **options})[0]

    return answer


@pytest.fixture(scope="session")
def plain(llava):
    """Greedy answers by transformers alone, from a processor's own tensors, one at a time."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava), AutoProcessor.from_pretrained(llava)

    def answer(messages, images, **options):
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        batch = processor(text=text, images=images or None, return_tensors="pt")
        ids = model.generate(**batch, do_sample=False, **options)[:, batch.input_ids.shape[1] :]
        return processor.decode(ids[0], skip_special_tokens=True).strip()

    return answer


def user(content):
    return [{"role": "user", "content": content}]


# where a script finds this Python first, and nothing of the tests' own shell
SCRIPT_PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"


def run(*command, cwd=ROOT, **environment):
    """A command in a process of its own, as a user would type it."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), "TOKENIZERS_PARALLELISM": "false", **environment}
    return subprocess.run([*map(str, command)], env=environment, cwd=cwd, capture_output=True, text=True)


def call(main, *arguments):
    """A command's `main` in this process, which saves the seconds that imports take."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = [main.__module__, *map(str, arguments)]
    with mock.patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def run_module(module, *arguments, **environment):
    return run(sys.executable, "-m", module, *arguments, **environment)


@pytest.fixture(scope="session")
def runs(llava, data, tmp_path_factory):
    return runs_of(llava, data, tmp_path_factory)


def runs_of(llava, data, tmp_path_factory):
    """One run of the script per train_type, made when first asked for."""
    from training import zero2  # which imports this file

    made = {}

    def of(train_type):
        if train_type not in made:
            output = tmp_path_factory.mktemp("runs") / train_type
            done = zero2(llava, data, output, train_type)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            made[train_type] = (output, done.stdout + done.stderr)
        return made[train_type]

    return of
