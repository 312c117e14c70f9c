"""The run script with its real command line: real DeepSpeed ZeRO-2 on two ranks, for every train_type."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, run_module
from safetensors.torch import load_file
from test_loss import TRAIN_TYPES
from transformers import LlavaForConditionalGeneration

from train_llava.infer import ask, generate
from train_llava.load import load

STEPS = 6
FLAGS = ["--max_steps", STEPS, "--learning_rate", "1e-3", "--logging_steps", 1, "--lr_scheduler_type", "linear"]
FLAGS += ["--gradient_accumulation_steps", 1, "--seed", 11, "--lora_dropout", 0, "--report_to", "none"]
FLAGS += ["--save_strategy", "steps", "--save_steps", 3]


def shared_memory():
    return set(Path("/dev/shm").glob("deepspeed_allreduce_buffer*"))


def zero2(llava, data, output, train_type, *flags):
    before = shared_memory()
    done = run(
        *("bash", ROOT / "run_zero2.sh", *FLAGS, "--per_device_train_batch_size", 4, *flags),
        **{"MODEL": str(llava), "DATA": str(data), "TRAIN_TYPE": train_type, "OUTPUT_DIR": str(output)},
        PATH=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    )
    assert shared_memory() <= before  # DeepSpeed leaves hundreds of MB there; the script takes its own away
    return done


def weights(folder):
    name = "adapter_model" if (folder / "adapter_model.safetensors").is_file() else "model"
    return load_file(folder / f"{name}.safetensors")


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


@pytest.fixture(scope="module")
def runs(llava, data, tmp_path_factory):
    """One run of the script per train_type, made when first asked for."""
    made = {}

    def of(train_type):
        if train_type not in made:
            output = tmp_path_factory.mktemp("runs") / train_type
            done = zero2(llava, data, output, train_type)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            made[train_type] = (output, done.stdout + done.stderr)
        return made[train_type]

    return of


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_script_trains_with_zero2_on_two_ranks(runs, train_type):
    output, log = runs(train_type)
    assert "DeepSpeedZeroOptimizer ZeRO-2 on 2 ranks" in log
    assert re.search(r"vision tower .*" + (r"\d" if train_type == "none" else "frozen"), log)
    line = r"step 6/6  loss \d+\.\d+  grad \S+  lr \S+  \S+ steps/s  \S+ samples/s  \d+:\d\d:\d\d left"
    assert re.search(line, log)
    assert f"--model_name_or_path {output}" in log  # the command to ask it something
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json", "trainer_state.json"):
        assert (output / name).is_file()


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_two_ranks_equal_one_process(runs, llava, data, tmp_path, train_type):
    output, _ = runs(train_type)
    done = run_module(
        "train_llava.train",
        *(*FLAGS, "--model_name_or_path", llava, "--data_path", data, "--train_type", train_type, "--use_cpu", "true"),
        *("--warmup_steps", 0.03, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "one"),
    )
    assert done.returncode == 0, done.stderr
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one = weights(tmp_path / "one")
    for name, value in weights(output).items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding noise, which Adam makes a step of full size
            torch.testing.assert_close(value, one[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
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
    picture = next((data / "images").iterdir())
    done = run_module(
        *("train_llava.infer", "--model_name_or_path", output, "--image", picture, "--prompt", "What is this?")
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_adapter_and_merged_model_answer_alike(runs, data, tmp_path):
    output, _ = runs("use_lora")
    model, processor = load(output)
    from train_llava.data import LlavaDataset

    dataset = LlavaDataset(data)
    asked = [ask("What do you see?", dataset[i]["images"]) for i in range(16)]
    with_adapter = generate(model, processor, asked, max_new_tokens=20)
    base = generate(model.get_base_model(), processor, asked, max_new_tokens=20)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    merged, processor = load(tmp_path / "merged")
    assert isinstance(merged, LlavaForConditionalGeneration)
    assert generate(merged, processor, asked, max_new_tokens=20) == with_adapter
    assert len(base) == 16


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
        done = run_module("train_llava.train", *flags)
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
