"""The original tutorial (zero_nlp, train_llava): its settings, its collator, its folders.

The references are PEFT with the lines of its run.py, a collator that does what its data.py does, plain transformers,
and folders of the versions that it names (tests/old_adapters).
"""

import json
import re
import shlex
import shutil
import sys
from statistics import mean

import pytest
import torch
from conftest import ROOT, SCRIPT_PATH, TOKENS, call, run
from folders import changed, in_float32
from page_client import answer_in, ask_about, served
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.learning import original
from benchmarks.speed.original_way import Original
from train_llava import evaluate, infer, merge_lora
from train_llava.build_model import build_llava
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.folder import save_llava
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.load import load, load_processor

RECIPE = (ROOT / "recipes" / "original.sh").read_text()


def test_the_adapters_are_those_of_the_original():
    """On the demo's model: the same layers, 262,400 trained weights, a scale of 0.25."""
    models = [build_llava(ROOT / "demo" / "clip", ROOT / "demo" / "qwen")[0] for _ in range(2)]
    lines = {
        "r": 32,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "lora_dropout": 0.05,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "modules_to_save": ["multi_modal_projector"],
    }
    theirs = get_peft_model(models[0], LoraConfig(**lines))
    words = shlex.split(re.search(r"ADAPTERS=\((--.*)\)\n", RECIPE)[1])
    flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    numbers = {"lora_r": int(flags["lora_r"]), "lora_alpha": int(flags["lora_alpha"])}
    numbers |= {"lora_dropout": float(flags["lora_dropout"]), "lora_target_modules": [flags["lora_target_modules"]]}
    ours = apply_train_type(models[1], "use_lora", LoraSettings(**numbers))
    shapes = [{name: p.shape for name, p in model.named_parameters() if p.requires_grad} for model in (theirs, ours)]
    assert shapes[0] == shapes[1] and any("vision_tower" in name for name in shapes[0])
    assert sum(shape.numel() for shape in shapes[1].values()) == 262_400
    scales = [
        {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict) and m.scaling}
        for model in (theirs, ours)
    ]
    assert scales == [{0.25}, {0.25}]


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["use_lora", "none"])
def test_the_recipe_as_it_stands(train_type, llava, data, tmp_path):
    """4e-4 whichever the strategy, falling in a line from the first step on."""
    variables = {"MODEL": str(llava), "DATA": str(data), "OUTPUT_DIR": str(tmp_path / "out"), "TRAIN_TYPE": train_type}
    variables["PATH"] = SCRIPT_PATH
    few = ("--num_train_epochs", 4, "--logging_steps", 1, "--save_strategy", "no", "--report_to", "none")
    done = run("bash", ROOT / "recipes" / "original.sh", *few, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    rates = [log["learning_rate"] for log in logs if "loss" in log]
    assert rates == pytest.approx([4e-4, 3e-4, 2e-4, 1e-4])  # 64 records, 4 x 8 on two ranks: a step an epoch
    if train_type == "use_lora":
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (32, 8, 0.05)


def test_left_padding_gives_the_same_loss_and_gradients(llava, data):
    """Its batches, padded on the left with a mask of ids that are not the pad token, and ours, through transformers."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava), load_processor(llava)
    plain = AutoProcessor.from_pretrained(llava)
    dataset, originals = LlavaDataset(data), Original(data, plain)
    order = [0, 3, 5, 7]
    theirs = originals([originals[i] for i in order])
    ours = LlavaCollator(processor, for_trainer=True)([dataset[i] for i in order])
    ours = {name: ours[name] for name in ("input_ids", "labels")} | {"pixel_values": theirs["pixel_values"]}
    pad = plain.tokenizer.pad_token_id
    assert (theirs["input_ids"][:, 0] == pad).any() and (ours["input_ids"][:, -1] == pad).any()
    found = []
    for batch in (theirs, ours):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (our_loss, our_gradients) = found
    torch.testing.assert_close(our_loss, loss)
    scale = max(value.abs().max() for value in gradients.values())
    for name, value in gradients.items():
        torch.testing.assert_close(our_gradients[name], value, rtol=1e-3, atol=float(1e-5 * scale), msg=name)


@pytest.mark.parametrize("old_pair", ["4.41.2"], indirect=True)
def test_base_adapter_and_merged_folder_through_every_command(old_pair, data, files, tmp_path):
    """Equal answers of infer, evaluate and the page, of the adapter on its base and of both merged."""
    base, adapter, *_ = old_pair
    in_float32(base)  # random weights have no favourite answer, which rounding would not change
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    done = call(merge_lora.main, "--adapter_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    answers = {}
    for name in ("base", "adapter", "merged"):
        model = ("--model_name_or_path", {"base": base, "adapter": adapter, "merged": tmp_path / "merged"}[name])
        asked = call(infer.main, *model, "--image", files[0], "--prompt", "What?", "--max_new_tokens", TOKENS)
        assert asked.returncode == 0, asked.stderr
        scores = tmp_path / f"scores-{name}"
        flags = ("--data_path", data, "--max_new_tokens", 4, "--output_dir", scores)
        done = call(evaluate.main, *model, *flags)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line)["answer"] for line in (scores / "samples.jsonl").read_text().splitlines()]
        answers[name] = (asked.stdout.strip(), lines)
    assert answers["adapter"] == answers["merged"] != answers["base"]
    with served(sys.executable, "-m", "train_llava.app", "--model_name_or_path", adapter) as page:
        assert answer_in(ask_about(page[0], "What?", files[0])) == answers["adapter"][0]


def test_a_processor_of_the_wrong_class(llava, tmp_path):
    """As in its issues 185, 197 and 203: the folder names CLIP's processor. Ours is LLaVA's, as is what it saves."""
    shutil.copytree(llava, tmp_path / "llava")
    for name in ("processor_config.json", "tokenizer_config.json"):
        changed(tmp_path / "llava" / name, processor_class="CLIPProcessor")
    model, processor = load(tmp_path / "llava")
    save_llava(model, processor, tmp_path / "saved")
    text = "a red seven at the top left<|im_end|>"
    for one in (processor, AutoProcessor.from_pretrained(tmp_path / "saved")):
        assert type(one).__name__ == "LlavaProcessor"
        assert one.tokenizer.decode(one.tokenizer(text)["input_ids"]) == text


def test_the_kept_results():
    """What docs/training.md says of them: English stays right; Chinese is forgotten, by the language model."""
    result = json.loads((ROOT / "benchmarks" / "results" / "original.json").read_text())
    rows, curves = result["rows"], result["curves"]
    assert rows["use_lora"]["trained_parameters"] == 262_400
    exact = [[round(value) for value in row["exact_percent_of_languages"].values()] for row in rows.values()]
    assert exact == [[0, 0], [99, 88], [100, 85], [100, 23]]

    def percent(language: str) -> list[dict[str, float]]:
        """Of each curve, by rate."""
        return [
            {rate: mean(run["exact_percent_of_languages"][language] for run in runs) for rate, runs in curve.items()}
            for curve in curves.values()
        ]

    assert list(original.CURVES) == list(curves) and len(curves["none, 16 samples a step"]["0.0006"]) == 2
    assert min(value for curve in percent("English") for value in curve.values()) > 97
    none, _, slow_tower, frozen = percent("Chinese")
    assert [round(none[rate]) for rate in ("0.0001", "0.0004", "0.001")] == [73, 37, 0]
    assert [round(curve["0.0004"]) for curve in (slow_tower, frozen)] == [8, 12]
    assert {curve["0.001"] for curve in percent("Chinese")} == {0}
    trained = json.loads((ROOT / "benchmarks" / "results" / "strategies.json").read_text())["rows"]
    kept = [run["exact_percent_of_languages"]["Chinese"] for runs in [*trained.values()][1:] for run in runs]
    assert (round(min(kept)), max(kept)) == (88, 100)
