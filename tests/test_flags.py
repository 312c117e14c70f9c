"""Every flag of a training is classed, and does what its class says: beside plain transformers, or refused by name."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import ROOT, call
from flag_classes import EQUAL, NO_EFFECT, OURS, table
from torch.utils import cpp_extension
from trainers import trainer_of
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from train_llava import train
from train_llava.cli import InputError
from train_llava.estimate import main as estimate
from train_llava.planning.arguments import DataArguments, LlavaTrainingArguments, ModelArguments
from train_llava.training.flag_checks import REFUSED, check_flags
from train_llava.training.renamed import RENAMED
from train_llava.training.trainer import LlavaTrainer

FIELDS = {f.name for kind in (ModelArguments, DataArguments, LlavaTrainingArguments) for f in dataclasses.fields(kind)}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # transformers 5.17 lacks these
BASE = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3, "seed": 5}
BASE |= {"train_sampling_strategy": "sequential"}


def test_every_flag_is_in_one_class():
    """So that a new version of transformers cannot bring one that nobody has looked at."""
    classed = [*EQUAL, *OURS, *NO_EFFECT, *REFUSED]
    assert sorted(classed) == sorted(set(classed))
    assert set(classed) - FIELDS in (set(), NEWER) and set(classed) >= FIELDS


def test_the_table_in_the_docs():
    assert table() in (ROOT / "docs" / "flags.md").read_text()


def test_flags_of_older_scripts(tmp_path):
    """The original's own, and others of transformers 4: the error says what they are called today."""
    base = ("--model_name_or_path", "m", "--data_path", "d", "--output_dir", tmp_path)
    done = call(train.main, *base, "--evaluation_strategy", "no", "--warmup-ratio=0.03")
    assert done.returncode == 2 and "--evaluation_strategy is now --eval_strategy; " in done.stderr
    assert "--warmup_ratio is now --warmup_steps (below 1: a share of all steps); " in done.stderr
    done = call(train.main, *base, "--optimizer", "adafactor")  # a value, not the flag of that name
    assert done.returncode == 2 and "--optim adafactor" not in done.stderr
    done = call(estimate, *base[:2], "--no_cuda")  # which has no --use_cpu
    assert done.returncode == 2 and "--no_cuda (--help" in done.stderr
    assert not RENAMED.keys() & FIELDS
    today = {match for text in RENAMED.values() for match in re.findall(r"^is (?:now|here) --(\w+)", text)}
    assert today and today <= FIELDS


def test_the_tests_that_are_named_exist():
    there = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").glob("*.py")), re.M))
    assert set(OURS.values()) - {"gpu"} <= there


def outcome(cls, llava, data, tmp_path, flags):
    trainer = trainer_of(cls, llava, data, tmp_path, "freeze_vision", **{**BASE, **flags})
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def without(llava, data, tmp_path_factory):
    return outcome(Trainer, llava, data, tmp_path_factory.mktemp("run"), {})


@pytest.mark.parametrize("name", [name for name in EQUAL if name in FIELDS])
@pytest.mark.filterwarnings("ignore")
def test_equal_to_plain_trainer(llava, data, tmp_path, without, name):
    flags, seen = EQUAL[name]
    try:
        ours, theirs = (outcome(cls, llava, data, tmp_path, flags) for cls in (LlavaTrainer, Trainer))
    finally:
        torch.use_deterministic_algorithms(False)
    rounding = 2e-2 if "bf16" in flags else 1e-4
    assert len(ours[0]) > 1 and ours[0] == pytest.approx(theirs[0], rel=rounding)
    moved = max((theirs[1][key] - value).abs().max().item() for key, value in without[1].items())
    assert (moved > 1e-5 or len(theirs[0]) != len(without[0])) == seen
    for key, value in theirs[1].items():
        # Adam divides by the gradient's size: where that is rounding, so is the step, at most one learning rate
        torch.testing.assert_close(ours[1][key], value, rtol=1e-3, atol=3e-3 if "bf16" in flags else 1e-4, msg=key)


OTHER = {  # a value that is not the one allowed
    "accelerator_config": {"split_batches": True}, "include_for_metrics": ["loss"], "label_names": ["labels"],
    "include_num_input_tokens_seen": "all", "length_column_name": "size", "optim_target_modules": ["q_proj"],
    "hub_strategy": "every_save",
}  # fmt: skip


ASKED = {"eval_generate": True, "eval_data_path": ["held_out"]}


def refused(**flags):
    given = {"output_dir": "x", "use_cpu": True, "report_to": "none", **flags}
    data = DataArguments([], eval_data_path=given.pop("eval_data_path", None))
    check_flags(ModelArguments(""), data, LlavaTrainingArguments(**given))


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"parallelism_config"}))
def test_refused_by_name(name):
    refused()
    fine = REFUSED[name][0]
    with pytest.raises(InputError, match=f"--{name} .*: .+\\.$"):
        refused(**{name: OTHER.get(name, not fine)})


def test_refused_parallelism():
    args = LlavaTrainingArguments(output_dir="x", use_cpu=True, report_to="none")
    args.parallelism_config = object()  # which transformers builds on machines with several GPUs alone
    with pytest.raises(InputError, match="--parallelism_config"):
        check_flags(ModelArguments(""), DataArguments([]), args)


def test_an_adam_that_cannot_be_compiled_is_refused(monkeypatch):
    """Where a folder of PyTorch's own has a blank in its name; only an optimizer in host memory needs a compiler."""
    configs = ("zero2_offload.json", "zero3.json")
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", "/opt/with/torch/lib")
    offload, other = (
        LlavaTrainingArguments("x", use_cpu=True, report_to="none", deepspeed=str(ROOT / "ds_configs" / name))
        for name in configs
    )
    check_flags(ModelArguments(""), DataArguments([]), offload)
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", "/opt/with a blank/torch/lib")
    check_flags(ModelArguments(""), DataArguments([]), other)
    with pytest.raises(InputError, match=r"zero2_offload.json: .* cannot be compiled, .* name, /opt/with a blank/"):
        check_flags(ModelArguments(""), DataArguments([]), offload)
    unset_hf_deepspeed_config()


def test_several_gpus_in_one_process_are_refused(llava, data):
    """By the command, and by the trainer itself before it wraps the model."""
    args = LlavaTrainingArguments(output_dir="x", use_cpu=True, report_to="none")
    args._n_gpu = 2  # as torch counts them; there is no other way to say it here
    with pytest.raises(InputError, match="2 GPUs in one process: start a process for each"):
        check_flags(ModelArguments(""), DataArguments([]), args)
    for given in ((None, args), (None,)):
        with pytest.raises(InputError, match="2 GPUs in one process"):
            LlavaTrainer(*given, **({} if len(given) == 2 else {"args": args}))


def test_what_is_the_case_anyway_may_be_said():
    refused(metric_for_best_model="eval_loss", greater_is_better=False, include_for_metrics=[])


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"metric_for_best_model": "exact_match"}, "--metric_for_best_model exact_match: add --eval_generate true"),
        ({"metric_for_best_model": "exact_match", "greater_is_better": False, **ASKED}, "--greater_is_better false"),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, "--greater_is_better true"),
        ({"save_strategy": "best", **ASKED}, "--save_strategy best: add"),
        ({"eval_generate": True}, "--eval_generate true needs --eval_data_path"),
        ({"deepspeed": str(ROOT / "ds_configs" / "zero3.json"), **ASKED}, "--eval_generate true: each rank answers"),
    ],
)
def test_scores_that_nobody_measures(flags, message):
    """Before anything is loaded; Trainer would look for them at the first evaluation."""
    try:
        with pytest.raises(InputError, match=message):
            refused(**flags)
    finally:
        unset_hf_deepspeed_config()
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    for metric in ("exact_match", "eval_exact_match"):
        refused(metric_for_best_model=metric, **best, **ASKED)
        refused(metric_for_best_model=metric, greater_is_better=True, **best, **ASKED)


def test_what_nobody_would_read(llava, data, tmp_path):
    """Weights of sources in an order that takes each record once; an optimizer in DeepSpeed's JSON."""
    done = start(llava, f"{data}:2.0", tmp_path / "run", "--train_sampling_strategy", "sequential")
    assert done.returncode == 2 and "leave out the weights" in done.stderr
    config = json.loads((ROOT / "ds_zero2.json").read_text()) | {"optimizer": {"type": "AdamW", "params": {"lr": 1}}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    done = start(llava, data, tmp_path / "run", "--deepspeed", tmp_path / "ds.json")
    assert done.returncode == 2 and "leave optimizer and scheduler out" in done.stderr


def start(llava, data, output, *flags):
    where = ("--model_name_or_path", llava, "--data_path", data, "--output_dir", output, "--use_cpu", "true")
    return call(train.main, *where, "--max_steps", 2, *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--deepspeed", "gone.json"), "gone.json"),
        (("--deepspeed", ROOT / "README.md"), "README"),
        (("--deepspeed", ROOT / "ds_zero2.json", "--save_only_model", "true", "--load_best_model_at_end", "true",
          "--eval_strategy", "steps", "--save_strategy", "steps"), "--save_only_model and --load_best_model_at_end"),
        (("--streaming", "true", "--train_sampling_strategy", "group_by_length"), "--train_sampling_strategy"),
        (("--train_sampling_strategy", "batch_rebalance"), "there are random, sequential, group_by_length"),
        (("--report_to", "swanlab"), "--report_to swanlab"),
        (("--report_to", "wandb"), "--report_to wandb"),
        (("--report_to", "tensorbord"), "--report_to tensorbord"),
        (("--optim", "lomo"), "--optim lomo"),
        (("--optim", "adamw_torc"), "--optim"),
        (("--eval_strategy", "steps"), "need --eval_data_path"),
        (("--save_strategy", "best"), "--save_strategy best need --eval_data_path"),
        (("--push_to_hub", "true"), "--push_to_hub"),
        (("--learning_rate", "abc"), "--learning_rate.*: invalid float value: 'abc'"),
        (("--learning_rat", "1", "--bogus", "1"), "not known: --learning_rat 1 --bogus 1"),  # no abbreviations
        (("--train_type", "lora"), "--train_type"),
        (("--fp16", "true"), "fp16"),
        (("--lr_scheduler_type", "cosin"), "lr_scheduler_type"),
        (("--eval_delay", "x"), "--eval_delay"),
    ],
)  # fmt: skip
def test_services_and_files_that_are_not_there(llava, data, tmp_path, flags, message, monkeypatch):
    """One sentence and exit code 2, before any weight is loaded and before anything is written."""
    monkeypatch.setattr(train, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    done = start(llava, data, tmp_path / "run", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(message, done.stderr) and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert len(done.stderr.strip().splitlines()) < 4 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [("--bogus", 1), ("--num_gpus", 2, 4, 8), ("--num_gpus", "two")])
def test_the_estimate_says_what_it_does_not_know(llava, flags):
    done = call(estimate, "--model_name_or_path", llava, *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert str(flags[-1]) in done.stderr


def test_a_text_stream_shows_samples(llava, tmp_path):
    """Without a single image."""
    turns = [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Fine, thank you."}]
    lines = [json.dumps({"id": str(i), "conversations": turns}) for i in range(6)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    flags = ("--model_name_or_path", llava, "--data_path", tmp_path / "talk.jsonl", "--output_dir", tmp_path / "run")
    flags += ("--streaming", "true", "--max_steps", 2, "--sample_steps", 1, "--use_cpu", "true", "--report_to", "none")
    done = call(train.main, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2 and "(reference: Fine, thank you.)" in done.stdout
    )
