"""A real chat model from its publisher's weights to a LLaVA that reads images it never saw (slow: 13 minutes)."""

import json
import sys

import pytest
import torch
from conftest import ROOT, run_module
from smollm2 import make_chat
from training import losses, zero2
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.make_data import write_records
from train_llava.model.generate import ask, generate
from train_llava.model.load import load

QUESTIONS = [
    "What is the capital of France?", "What is 2 + 3?", "Name three colours.", "Write a sentence about the sea.",
    "Say good morning in French.", "Is fire hot or cold?", "Who wrote Hamlet?", "Count from one to five.",
    "What do cows drink?", "Give me a word that rhymes with cat.",
]  # fmt: skip


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Downloaded once, out of pip's cache later."""
    folder = tmp_path_factory.mktemp("smollm2") / "chat"
    make_chat(folder)
    return folder


@pytest.fixture(scope="module")
def llava(chat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "llava"
    halves = ("--vision_model_name_or_path", ROOT / "demo" / "clip", "--language_model_name_or_path", chat)
    done = run_module("train_llava.build_model", *halves, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_it_says_about_text_what_it_said_before(chat, llava):
    """Ten of ten greedy answers, against plain transformers."""
    tokenizer, alone = AutoTokenizer.from_pretrained(chat), AutoModelForCausalLM.from_pretrained(chat).eval()
    model, processor = load(llava)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            said = alone.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids.input_ids.shape[1] :]
        ours = generate(model, processor, [ask(question, [])], max_new_tokens=16)[0]
        assert ours == tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_it_learns_to_read(llava, tmp_path):
    """Captions of the demo's scenes; held out are handwriting and pairs of a shape and a colour."""
    data, held_out, output = tmp_path / "data", tmp_path / "held_out", tmp_path / "run"
    write_records(data, "captions", "train", 6000, seed=0)
    write_records(held_out, "captions", "held_out", 100, seed=0)
    flags = ["--max_steps", 300, "--learning_rate", "1e-3", "--logging_steps", 10, "--save_strategy", "no"]
    done = zero2(llava, data, output, "use_lora", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    history = losses(output)
    where = ("--model_name_or_path", output, "--data_path", held_out, "--output_dir", tmp_path / "scores")
    done = run_module("train_llava.evaluate", *where)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    print(history, metrics["exact_match"], metrics["loss"], file=sys.stderr)
    assert history[0] > 1 and history[-1] < 0.1, history
    assert metrics["exact_match"] > 0.8
