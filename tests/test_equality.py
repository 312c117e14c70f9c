"""However a step is shared out, its losses and weights are those of one process: micro-batch, DDP, ZeRO-2 and ZeRO-3.

Captions of one and two digits make batches with uneven numbers of labels.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, run
from torch.utils.cpp_extension import TORCH_LIB_PATH
from trainers import TRAIN_TYPES
from training import ANY_BATCH, FLAGS, losses, weights, zero2

from train_llava.model.load import load
from train_llava.train import main

PLAIN = [*FLAGS, "--use_cpu", "true", "--warmup_steps", 0.03]


@pytest.fixture(scope="module")
def alone(llava, data, tmp_path_factory):
    """One process with eight samples a step, per train_type, made when first asked for."""
    made = {}

    def of(train_type):
        if train_type not in made:
            made[train_type] = tmp_path_factory.mktemp("alone") / train_type
            flags = ["--model_name_or_path", llava, "--data_path", data, "--train_type", train_type]
            flags += ["--per_device_train_batch_size", 8, "--output_dir", made[train_type]]
            done = call(main, *PLAIN, *flags)
            assert done.returncode == 0, done.stderr
        return made[train_type]

    return of


def assert_equal_runs(output, reference):
    assert losses(output) == pytest.approx(losses(reference), rel=1e-5)
    trained, expected = load(output)[0].state_dict(), load(reference)[0].state_dict()
    assert trained.keys() == expected.keys()
    for name, value in trained.items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding noise, which Adam makes a step of full size
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_accumulated_batches_of_one(alone, llava, data, tmp_path, train_type):
    flags = ["--model_name_or_path", llava, "--data_path", data, "--train_type", train_type]
    flags += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8, "--output_dir", tmp_path / "out"]
    done = call(main, *PLAIN, *flags)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / "out", alone(train_type))


@pytest.mark.parametrize("train_type", [pytest.param(t, marks=[pytest.mark.slow] * (t == "none")) for t in TRAIN_TYPES])
def test_two_ranks_with_zero2(runs, alone, train_type):
    output, _ = runs(train_type)
    assert weights(output).keys() == weights(alone(train_type)).keys()  # in the files, too
    assert_equal_runs(output, alone(train_type))


@pytest.mark.parametrize("size, share", [(4, "4 x 2 x 1"), ("auto", "8 x 1 x 1")])
def test_the_global_batch_in_one_process(alone, llava, data, tmp_path, size, share):
    """A batch of one is above."""
    flags = ["--model_name_or_path", llava, "--data_path", data, "--use_cpu", "true", "--warmup_steps", 0.03]
    flags += ["--global_batch_size", 8, "--per_device_train_batch_size", size, "--output_dir", tmp_path / "out"]
    done = call(main, *ANY_BATCH, *flags)
    assert done.returncode == 0, done.stderr
    assert f"8 samples a step ({share})\n" in done.stdout
    assert_equal_runs(tmp_path / "out", alone("use_lora"))


ON_TWO_RANKS = {1: "1 x 4 x 2", 2: "2 x 2 x 2", 4: "4 x 1 x 2", "auto": "4 x 1 x 2"}


@pytest.mark.parametrize(
    "size", [size if size == 2 else pytest.param(size, marks=pytest.mark.slow) for size in ON_TWO_RANKS]
)
def test_the_global_batch_on_two_ranks(alone, llava, data, tmp_path, size):
    """And accelerate, which counts for itself, has nothing to warn of."""
    sizes = ("--global_batch_size", 8, "--per_device_train_batch_size", size)
    done = zero2(llava, data, tmp_path / "out", "use_lora", *sizes, base=ANY_BATCH)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"8 samples a step ({ON_TWO_RANKS[size]})\n" in done.stdout
    assert_equal_runs(tmp_path / "out", alone("use_lora"))
    assert "mismatch" not in (tmp_path / "out" / "launch.log").read_text()
    batch = json.loads((tmp_path / "out" / "checkpoint-6" / "run.json").read_text())["batch"]
    assert " x ".join(map(str, batch.values())) == ON_TWO_RANKS[size]
    args = torch.load(tmp_path / "out" / "checkpoint-6" / "training_args.bin", weights_only=False)
    config = args.hf_deepspeed_config.config
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [config[name] for name in names] == [*batch.values()][:2] and config["train_batch_size"] == 8
    assert config["zero_optimization"]["reduce_bucket_size"] == 5e7  # what training/step.py adds


SLOW_TYPES = [pytest.param(t, marks=pytest.mark.slow) for t in TRAIN_TYPES]


@pytest.mark.parametrize("train_type", SLOW_TYPES)
def test_torchrun(alone, llava, data, tmp_path, train_type):
    flags = ["--model_name_or_path", llava, "--data_path", data, "--train_type", train_type]
    flags += ["--per_device_train_batch_size", 4, "--output_dir", tmp_path / "out"]
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", 2, "-m", "train_llava.train"]
    done = run(*torchrun, *PLAIN, *flags, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(tmp_path / "out", alone(train_type))


@pytest.mark.parametrize("train_type", SLOW_TYPES)
def test_zero3(alone, llava, data, tmp_path, train_type):
    """Whole weights in the saved folder; captions are written on the way, all ranks together, and change nothing."""
    flags = ["--deepspeed", ROOT / "ds_configs" / "zero3.json", "--sample_steps", 3]
    done = zero2(llava, data, tmp_path / "out", train_type, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DeepSpeedZeroOptimizer_Stage3 on 2 ranks" in done.stdout
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 2
    assert_equal_runs(tmp_path / "out", alone(train_type))


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["use_lora", "freeze_vision"])
def test_zero3_in_bf16(llava, data, tmp_path, train_type):
    """As ZeRO-2, but for rounding; two micro-batches, whose gradients are summed in fp32."""
    sizes = ("--bf16", "true", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    for name in ("ds_zero2.json", "ds_configs/zero3.json"):
        done = zero2(llava, data, tmp_path / name, train_type, *sizes, "--deepspeed", ROOT / name)
        assert done.returncode == 0, done.stderr[-3000:]
    found = [losses(tmp_path / name) for name in ("ds_zero2.json", "ds_configs/zero3.json")]
    assert found[0] == pytest.approx(found[1], rel=5e-3)


@pytest.mark.slow  # DeepSpeed compiles its Adam for the CPU, minutes the first time
@pytest.mark.skipif(" " in TORCH_LIB_PATH, reason="which fails here: see tests/test_flags.py")
@pytest.mark.parametrize("train_type", ["use_lora", "none"])
def test_zero2_with_the_optimizer_offloaded(alone, llava, data, tmp_path, train_type):
    done = zero2(llava, data, tmp_path / "out", train_type, "--deepspeed", ROOT / "ds_configs" / "zero2_offload.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(tmp_path / "out", alone(train_type))


def test_deepspeed_settings_differ_only_where_they_say():
    plain = json.loads((ROOT / "ds_zero2.json").read_text())
    for name in ("zero2_offload", "zero3"):
        other = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        assert {key for key in plain | other if plain.get(key) != other.get(key)} == {"zero_optimization"}
    offload = json.loads((ROOT / "ds_configs" / "zero2_offload.json").read_text())["zero_optimization"]
    assert {k: v for k, v in offload.items() if k != "offload_optimizer"} == plain["zero_optimization"]
