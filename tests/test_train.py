"""The run script with its real command line: real DeepSpeed ZeRO-2 on two ranks, for every train_type."""

import json
import re
import shutil
import sys
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, call, run
from deepspeed.runtime.zero.config import ZeroStageEnum
from folders import Evil
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from trainers import SLOW, TRAIN_TYPES
from training import FLAGS, STEPS, losses, weights, zero2
from transformers import LlavaForConditionalGeneration

from train_llava import infer
from train_llava.cli import InputError
from train_llava.model.generate import ask, generate
from train_llava.model.load import load
from train_llava.train import main


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_script_trains_with_zero2_on_two_ranks(runs, train_type):
    output, log = runs(train_type)
    assert "DeepSpeedZeroOptimizer ZeRO-2 on 2 ranks" in log
    assert re.search(r"vision tower .*" + (r"\d" if train_type == "none" else "frozen"), log)
    speed = r"\S+ samples/s  [\d,]+ tokens/s  data \d+%  \S+ GB  \d+:\d\d:\d\d left"
    assert re.search(rf"^step 6/6  loss \d+\.\d+  grad \S+  lr \S+  {speed}$", log, re.M)
    assert "8 samples a step (4 x 1 x 2)" in log
    assert f"--model_name_or_path {output}" in log  # the command to ask it something
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json", "trainer_state.json"):
        assert (output / name).is_file()
    card = (output / "README.md").read_text()
    assert (
        f"| strategy | `--train_type {train_type}` |" in card
        and f"| loss, at the end | {losses(output)[-1]:.4f}" in card
    )
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    assert np.asarray(Image.open(output / "curves.png").convert("L")).std() > 5  # not an empty sheet


@pytest.mark.parametrize("train_type", ["use_lora", pytest.param("none", marks=pytest.mark.slow), *SLOW])
def test_resume_is_exact(runs, llava, data, tmp_path, train_type):
    """From the newest whole checkpoint: the newest of all was cut off while it was written."""
    output, _ = runs(train_type)
    shutil.copytree(output / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    shutil.copytree(output / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").unlink()
    done = zero2(llava, data, tmp_path / "run", train_type, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-6 was not written to its end and is passed over" in done.stdout
    assert losses(tmp_path / "run") == losses(output)
    resumed = weights(tmp_path / "run")
    for name, value in weights(output).items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("train_type", ["use_lora", "freeze_vision"])
def test_the_output_folder_is_used_alone(runs, data, train_type):
    output, _ = runs(train_type)
    image = next((data / "images").iterdir())
    done = call(infer.main, *("--model_name_or_path", output, "--image", image, "--prompt", "What is this?"))
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_adapter_and_merged_model_answer_alike(runs, data, tmp_path):
    output, _ = runs("use_lora")
    model, processor = load(output)
    from train_llava.data import LlavaDataset

    dataset = LlavaDataset(data)
    asked = [ask("What do you see?", dataset[i]["images"]) for i in range(16)]
    with_adapter = generate(model, processor, asked, max_new_tokens=20)
    with model.disable_adapter():
        base = generate(model, processor, asked, max_new_tokens=20)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    merged, processor = load(tmp_path / "merged")
    assert isinstance(merged, LlavaForConditionalGeneration)
    assert generate(merged, processor, asked, max_new_tokens=20) == with_adapter != base


def test_lora_moves_its_projector_and_saves_it(runs, llava):
    saved = weights(runs("use_lora")[0])
    base = load_file(llava / "model.safetensors")
    projector = [name for name in saved if "projector" in name]
    assert len(projector) == 4
    for name in projector:
        assert not torch.equal(saved[name], base["multi_modal_projector." + name.split("projector.")[1]])


def test_a_run_is_not_written_over(runs, llava, data):
    output, _ = runs("projector")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    done = zero2(llava, data, output, "projector")
    assert done.returncode == 2 and "holds another run" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_bad_flags_and_folders(llava, data, tmp_path):
    def train(**changes):
        flags: dict = {
            "model_name_or_path": llava,
            "data_path": data,
            "output_dir": tmp_path / "out",
            "use_cpu": "true",
        }
        flags = [text for name, value in {**flags, **changes}.items() for text in (f"--{name}", value)]
        done = call(main, *flags)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    message = train(train_type="lora")
    assert all(name in message for name in TRAIN_TYPES)
    assert "no config.json here" in train(model_name_or_path=tmp_path)
    assert "no such file" in train(data_path=tmp_path / "nowhere")
    assert "no whole checkpoint" in train(resume_from_checkpoint="true")


def test_the_script_wants_both_or_neither():
    done = run(
        "bash", ROOT / "run_zero2.sh", MODEL="somewhere", DATA="", PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin"
    )
    assert done.returncode == 2 and "set both MODEL and DATA" in done.stderr


@pytest.mark.slow
def test_four_formats_are_mixed_on_two_ranks(llava, tmp_path):
    """Different formats, one with a weight, text-only records among them, all from the run script."""
    names = ["cc3m", "mix665k", "messages_jsonl", "cauldron"]
    for name in names:
        layouts.make(name, tmp_path / name)
    data = " ".join([*(str(tmp_path / name) for name in names[:3]), f"texts={tmp_path / names[3]}:1.5"])
    done = zero2(llava, data, tmp_path / "out", "use_lora", "--train_sampling_strategy", "group_by_length")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 records (texts) x 1.5 from" in done.stdout and "48 records together" in done.stdout
    assert len(losses(tmp_path / "out")) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["use_lora", "none"])
def test_a_rank_without_images_neither_hangs_nor_changes_the_result(llava, tmp_path, train_type):
    """In every step one rank gets four images and the other none; one process with all eight is the reference."""
    expected = layouts.short(24)
    records = []
    for i, (messages, images) in enumerate(expected):
        if i % 8 < 4:
            layouts.write(tmp_path / "d" / "images" / f"{i}.jpg", images[0])
            records.append({"id": str(i), "image": f"{i}.jpg", "conversations": layouts.llava_turns(messages)})
        else:
            words = layouts.chat(f"What is {i}?", f"A number, {i}.")
            records.append({"id": str(i), "conversations": layouts.llava_turns(words)})
    layouts.write(tmp_path / "d" / "chat.json", records)
    flags = ["--train_sampling_strategy", "sequential"]
    done = zero2(llava, tmp_path / "d", tmp_path / "two", train_type, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    done = call(
        main,
        *(*FLAGS, *flags, "--model_name_or_path", llava, "--data_path", tmp_path / "d"),
        *("--train_type", train_type, "--use_cpu", "true", "--warmup_steps", 0.03),
        *("--per_device_train_batch_size", 8, "--output_dir", tmp_path / "one"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one = weights(tmp_path / "one")
    for name, value in weights(tmp_path / "two").items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(value, one[name], rtol=1e-3, atol=2e-4, msg=name)


def test_broken_images_are_passed_over_and_listed(llava, data, tmp_path):
    """1% of the files are broken: the run ends, names every one of them once, and is the same twice."""
    shutil.copytree(data, tmp_path / "d")
    chat = json.loads((data / "chat.json").read_text())
    many = [{**record, "id": f"{record['id']}-{k}"} for k in range(4) for record in chat][:200]
    for k, name in enumerate(("gone.jpg", "empty.jpg")):
        many[50 + 100 * k]["image"] = name
    layouts.write(tmp_path / "d" / "images" / "empty.jpg", b"")
    layouts.write(tmp_path / "d" / "chat.json", many)

    def train(name, most):
        flags = [*FLAGS, "--model_name_or_path", llava, "--data_path", tmp_path / "d", "--use_cpu", "true"]
        flags += ["--max_steps", 25, "--per_device_train_batch_size", 8, "--dataloader_num_workers", 2]
        done = call(main, *flags, "--output_dir", tmp_path / name, "--max_bad_images", most)
        return done, tmp_path / name

    done, first = train("first", 0.02)
    assert done.returncode == 0, done.stderr[-2000:]
    report = [json.loads(line) for line in (first / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in report) == sorted([many[50]["id"], many[150]["id"]])
    assert {reason.split("/")[-1][:9] for reason in (line["reason"] for line in report)} == {"gone.jpg:", "empty.jpg"}
    _, second = train("second", 2)
    assert losses(first) == losses(second) and len(losses(first)) == 25
    done, _ = train("third", 1)
    assert done.returncode == 2
    assert "2 images cannot be read, more than --max_bad_images 1 allows" in done.stderr
    assert "Traceback" not in done.stderr.split("error: ")[-1]


@pytest.mark.slow
def test_a_stream_resumes_exactly_under_zero2(llava, tmp_path):
    """Images in parquet, and others in folders; packed, with workers."""
    layouts.messages_parquet(tmp_path / "inside", 24)
    layouts.mix665k(tmp_path / "mix")
    data = f"{tmp_path / 'inside'} {tmp_path / 'mix'}:0.5"
    flags = ["--streaming", "true", "--dataloader_num_workers", 2, "--packing", "true"]
    done = zero2(llava, data, tmp_path / "out", "use_lora", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(tmp_path / "out" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    done = zero2(llava, data, tmp_path / "again", "use_lora", *flags, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "again") == losses(tmp_path / "out") and len(losses(tmp_path / "out")) == STEPS
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, weights(tmp_path / "again")[name]), name


def test_what_is_too_long_is_cut_or_left_out(llava, data, tmp_path):
    flags = ["--model_name_or_path", llava, "--data_path", data, "--use_cpu", "true", *FLAGS, "--model_max_length"]
    done = call(main, *flags, 40, "--max_steps", 2, "--output_dir", tmp_path / "a")
    assert done.returncode == 0 and "too long and left out" in done.stdout, done.stderr[-2000:]
    done = call(main, *flags, 10, "--output_dir", tmp_path / "b")
    assert done.returncode == 2 and "no record has an answer that fits into --model_max_length 10" in done.stderr


@pytest.mark.slow
def test_sample_captions_do_not_change_the_run(runs, llava, data, tmp_path):
    """Printed, drawn and in TensorBoard, under ZeRO-2 with two ranks; losses and weights stay equal bit for bit."""
    output, _ = runs("use_lora")
    flags = ["--sample_steps", 2, "--report_to", "tensorboard", "--eval_data_path", data]
    done = zero2(llava, data, tmp_path / "out", "use_lora", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^  train_\d+: .*reference: ", done.stdout, re.M)) == 3 * 4
    sheets = sorted((tmp_path / "out" / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step_000002.png", "step_000004.png", "step_000006.png"]
    assert list((tmp_path / "out" / "runs" / "samples").glob("events*"))
    assert losses(tmp_path / "out") == losses(output)
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, weights(output)[name]), name


class Attribute:
    """Unpickled, it asks for an attribute of something else than DeepSpeed's stages."""

    def __reduce__(self):
        return getattr, (torch.optim.AdamW, "__init__")


def test_checkpoints_are_loaded(runs, tmp_path, monkeypatch):
    """As the Trainer saved them; and from DeepSpeed's shards alone, which may carry no code."""
    adapter = runs("use_lora")[0] / "checkpoint-3"
    saved, loaded = weights(adapter), get_peft_model_state_dict(load(adapter)[0])
    assert all(torch.equal(loaded[name], saved[name]) for name in saved if "lora" in name)
    whole = runs("freeze_vision")[0] / "checkpoint-3"
    expected = LlavaForConditionalGeneration.from_pretrained(whole).state_dict()
    shutil.copytree(whole, tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "shards", tmp_path / "shards of Python 3.11.2")
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda stage, _: (getattr, (ZeroStageEnum, stage.name)))
    for shard in tmp_path.glob("*3.11.2/*/*optim_states.pt"):
        torch.save(torch.load(shard, weights_only=False), shard)
        assert b"getattr" in shard.read_bytes()
    for folder in (whole, tmp_path / "shards", tmp_path / "shards of Python 3.11.2"):
        loaded = load(folder)[0].state_dict()
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)
    (shard, *_) = (tmp_path / "shards" / "global_step3").glob("*rank_1*optim_states.pt")
    for evil in (Evil(tmp_path / "made"), Attribute()):
        torch.save({"optimizer_state_dict": evil}, shard)
        with pytest.raises(InputError, match="cannot be loaded"):
            load(tmp_path / "shards")
    assert not (tmp_path / "made").exists()
