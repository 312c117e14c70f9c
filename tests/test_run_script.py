"""What run_zero2.sh hands to DeepSpeed's launcher on machines that the tests do not run on.

Stand-ins come first in PATH: an nproc with so many cores, and a python that has the requirements, sees so many GPUs and
prints its arguments, and does what SAY says.
"""

import shlex
import sys
from itertools import pairwise

import pytest
from conftest import ROOT, run

PYTHON = """case "$1" in
    -c) case "$2" in *find_spec*) [ -z "$NO_LIGER" ] || exit 1 ;; *) echo "$0" ;; esac ;;
    *requirements.py) ;;
    *accelerator.py) printf '%s\\n' "$FOUND" ;;
    *check_flags.py) exec REAL "$@" ;;
    *) printf '%s\\n' "$@"; eval "$SAY" ;;
esac
""".replace("REAL", shlex.quote(sys.executable))


def start(tmp_path, *more, gpus=0, kind="cuda", cores=8, **variables):
    """Runs the script up to the launcher."""
    lines = {"python": PYTHON, "nproc": f"echo {cores}\n"}
    for name, text in lines.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    names = {"MODEL": "llava", "DATA": "data", "OUTPUT_DIR": str(tmp_path / "out"), "MASTER_PORT": "29500"}
    names |= {"SAY": "", "MICRO_BATCH_FILE": "", "NO_LIGER": ""}
    names["FOUND"] = f"{kind} {gpus}\n{gpus} GPUs: H100" if gpus else "cpu 0\nno GPU"
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": "", **names, **variables}
    return run("bash", ROOT / "run_zero2.sh", *more, **variables)


def flags(tmp_path, *more, **variables):
    """Each word of the launcher's command line, and the one behind it: a flag and its value."""
    done = start(tmp_path, *more, **variables)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
    return dict(pairwise(words))


@pytest.mark.parametrize(
    "train_type, rate",
    [("use_lora", "4e-4"), ("projector", "1e-3"), ("freeze_vision", "2e-5"), ("none", "2e-5"), (None, "4e-4")],
)
def test_each_strategy_has_its_learning_rate(tmp_path, train_type, rate):
    given = flags(tmp_path, **({"TRAIN_TYPE": train_type} if train_type else {}))
    assert (given["--learning_rate"], given["--train_type"]) == (rate, train_type or "use_lora")


def test_the_schedule_is_that_of_llava(tmp_path):
    given = flags(tmp_path)
    assert (given["--lr_scheduler_type"], given["--warmup_steps"]) == ("cosine", "0.03")


def test_all_gpus_are_used_in_bf16(tmp_path):
    given = flags(tmp_path, gpus=2)
    assert (given["--bf16"], given["--dataloader_pin_memory"]) == ("true", "true")
    assert not {"--use_cpu", "--include", "--num_gpus", "--num_accelerators"} & given.keys()


def test_fused_kernels_are_the_default_on_gpus(tmp_path):
    """Liger's, unless somebody says something else; where it is not installed, the script says so and goes on."""
    assert flags(tmp_path, gpus=1)["--use_liger_kernel"] == "true"
    assert "--use_liger_kernel" not in flags(tmp_path)
    for word in (["--torch_compile", "true"], ["--use_liger_kernel=false"]):
        words = start(tmp_path, *word, gpus=1).stdout.splitlines()
        assert "--use_liger_kernel" not in words and word[0] in words
    done = start(tmp_path, gpus=1, NO_LIGER="1")
    assert done.returncode == 0 and "--use_liger_kernel" not in done.stdout
    assert "no fused kernels: " in done.stdout and "-m pip install liger-kernel" in done.stdout


@pytest.mark.parametrize("ranks", ["", "3"])
def test_without_gpus_two_ranks_share_the_cpu(tmp_path, ranks):
    given = flags(tmp_path, NUM_PROCESSES=ranks)
    assert (given["--use_cpu"], given["--dataloader_pin_memory"]) == ("true", "false")
    assert given["--num_accelerators"] == (ranks or "2")
    assert not {"--bf16", "--include", "--num_gpus"} & given.keys()


def test_some_of_the_gpus(tmp_path):
    """The first ones, or those that are named."""
    given = flags(tmp_path, gpus=8, NUM_PROCESSES="2")
    assert given["--num_gpus"] == "2" and "--include" not in given
    given = flags(tmp_path, gpus=8, NUM_PROCESSES="2", INCLUDE="localhost:4,5")
    assert given["--include"] == "localhost:4,5" and "--num_gpus" not in given


@pytest.mark.parametrize("cores, ranks, workers", [(200, "", "10"), (40, "", "5"), (4, "", "1"), (16, "2", "8")])
def test_the_cores_are_shared_out_among_the_loaders(tmp_path, cores, ranks, workers):
    """Ten workers for each of eight ranks at most, and one at least."""
    given = flags(tmp_path, gpus=8, cores=cores, NUM_PROCESSES=ranks)
    assert (given["--dataloader_num_workers"], given["--dataloader_persistent_workers"]) == (workers, "true")


@pytest.mark.parametrize(
    "gpus, kind, size", [(0, "cpu", "4"), (1, "cuda", "auto"), (8, "cuda", "auto"), (1, "mps", "4")]
)
def test_a_step_has_as_many_samples_on_any_machine(tmp_path, gpus, kind, size):
    """32, or GLOBAL_BATCH; on a GPU as many at a time as fit. The flag behind the script wins, as it comes last."""
    for variables, samples in (({}, "32"), ({"GLOBAL_BATCH": "128"}, "128")):
        words = start(tmp_path, gpus=gpus, kind=kind, **variables).stdout.splitlines()
        given = dict(pairwise(words))
        assert (given["--global_batch_size"], given["--per_device_train_batch_size"]) == (samples, size)
        assert "--gradient_accumulation_steps" not in given
    assert flags(tmp_path, "--global_batch_size", "8", gpus=gpus)["--global_batch_size"] == "8"


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("word", [("--gradient_accumulation_steps", "4"), ("--gradient-accumulation-steps=4",)])
def test_who_gives_the_accumulation_has_decided_on_the_batch(tmp_path, word, gpus):
    """As lines from before --global_batch_size do. Where both are asked for, the training compares them."""
    given = flags(tmp_path, *word, gpus=gpus)
    assert "--global_batch_size" not in given and given["--per_device_train_batch_size"] == "4"
    given = flags(tmp_path, *word, gpus=gpus, GLOBAL_BATCH="64")
    assert given["--global_batch_size"] == "64" and given["--per_device_train_batch_size"] == "4"


@pytest.mark.parametrize("ranks, each, samples", [(1, 16, 16), (2, 8, 16), (3, 6, 18), (4, 4, 16)])
def test_the_demo_has_16_samples_in_a_step(tmp_path, ranks, each, samples):
    """Its rates are chosen for these."""
    for name in ("demo", "train_llava"):
        (tmp_path / name).symlink_to(ROOT / name)
    variables = f"HERE={shlex.quote(str(tmp_path))} RANKS={ranks} TRAIN_TYPE=use_lora PYTHON=true"
    done = run("bash", "-c", f'{variables}; source "$HERE/demo/prepare.sh"; echo $EACH $SAMPLES "${{DEMO_FLAGS[@]}}"')
    words = done.stdout.splitlines()[-1].split()
    assert words[:2] == [str(each), str(samples)] and "--max_steps" in words
    assert not [word for word in words if "batch" in word or "accumulation" in word]


TRIES = """for n in 8 4; do
    [ "$(cat "$MICRO_BATCH_FILE")" -le $n ] 2>/dev/null || { echo $n >"$MICRO_BATCH_FILE"; exit 1; }
done"""


def test_a_run_out_of_memory_starts_again_until_it_fits(tmp_path):
    """The launcher's code may be that of another rank; what counts is the number that was left."""
    done = start(tmp_path, gpus=2, SAY=TRIES)
    assert done.returncode == 0 and done.stdout.count("deepspeed.launcher.runner") == 3, done.stderr
    done = start(tmp_path, gpus=2, SAY="exit 1")  # any other failure
    assert done.returncode == 1 and done.stdout.count("deepspeed.launcher.runner") == 1
    done = start(
        tmp_path, gpus=2, SAY='exit "${#MICRO_BATCH_FILE}"', NNODES="2", NODE_RANK="0", MASTER_ADDR="localhost"
    )
    assert done.returncode == 0  # a machine of several cannot start alone: no file


def test_what_was_found_is_said_first(tmp_path):
    assert start(tmp_path, gpus=2).stdout.startswith("2 GPUs: H100\n")
    assert start(tmp_path).stdout.startswith("no GPU: 2 ranks on the CPU\n")


def test_gpus_that_are_hidden_stay_so(tmp_path):
    """DeepSpeed's launcher overlooks CUDA_VISIBLE_DEVICES when it is told how many GPUs to take."""
    given = flags(tmp_path, gpus=3, CUDA_VISIBLE_DEVICES="2,5,7")
    assert given["--include"] == "localhost:2,5,7"
    given = flags(tmp_path, gpus=3, CUDA_VISIBLE_DEVICES="2,5,7", NUM_PROCESSES="2")
    assert given["--include"] == "localhost:2,5" and "--num_gpus" not in given
    given = flags(tmp_path, gpus=3, CUDA_VISIBLE_DEVICES="2,5,7", INCLUDE="localhost:5")
    assert given["--include"] == "localhost:5"
    done = start(tmp_path, gpus=1, CUDA_VISIBLE_DEVICES="GPU-8932f937")
    assert done.returncode == 2 and "CUDA_VISIBLE_DEVICES=GPU-8932f937: write the numbers" in done.stderr


def test_a_mac_trains_in_one_process_without_deepspeed(tmp_path):
    words = start(tmp_path, gpus=1, kind="mps").stdout.splitlines()
    assert words[1:3] == ["-m", "train_llava.train"]
    assert not {"--deepspeed", "--bf16", "--use_cpu"} & {*words}


@pytest.mark.parametrize("level, launcher", [(None, "critical"), ("warning", "critical"), ("info", "info")])
def test_the_launcher_is_quiet_unless_it_is_asked(tmp_path, level, launcher):
    words = start(tmp_path, *(("--log_level", level) if level else ())).stdout.splitlines()
    assert words[words.index("--log_level") + 1] == launcher


REFUSED = {
    "a strategy": (
        (),
        {"TRAIN_TYPE": "lora"},
        "TRAIN_TYPE=lora: there are use_lora, freeze_vision, none and projector",
    ),
    "half of a pair": ((), {"DATA": ""}, "set both MODEL and DATA"),
    "an abbreviation": (("--learning_rat", "1e-4"), {}, "not known: --learning_rat (do you mean --learning_rate?)"),
    "no flag at all": (("--zzz=1",), {}, "not known: --zzz (--help lists all flags)"),
    "one of transformers 4": (("--evaluation_strategy", "no"), {}, "--evaluation_strategy is now --eval_strategy"),
    "one of LLaVA": (("--mm_projector_lr", "1"), {}, "--mm_projector_lr is here --projector_learning_rate"),
    "too many GPUs": ((), {"gpus": 2, "NUM_PROCESSES": "3"}, "NUM_PROCESSES=3, and there are 2 GPUs"),
    "half of a cluster": ((), {"NNODES": "2"}, "NNODES=2 needs NODE_RANK (0 to 1)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_anything_starts(tmp_path, what):
    more, variables, reason = REFUSED[what]
    done = start(tmp_path, *more, **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and reason in done.stderr, done.stderr
    assert "deepspeed" not in done.stdout


def test_known_flags_pass(tmp_path):
    """Ours, transformers', with dashes, with a value behind `=`, and those that argparse makes of true ones."""
    flags(tmp_path, "--lora_r", "8", "--learning-rate=1e-4", "--no_train_projector", "--max_grad_norm", "-1")


def test_sh_does_as_well_and_help_installs_nothing(tmp_path):
    done = run("sh", ROOT / "run_zero2.sh", TRAIN_TYPE="lora")
    assert done.returncode == 2 and "there are use_lora" in done.stderr
    (tmp_path / "python").write_text('#!/bin/sh\ncase "$1" in -c) echo "$0" ;; *) exit 1 ;; esac\n')
    (tmp_path / "python").chmod(0o755)
    copy = tmp_path / "copy"
    (copy / "scripts").mkdir(parents=True)
    for name in ("run_zero2.sh", "scripts/environment.sh", "scripts/launch.sh"):
        (copy / name).write_text((ROOT / name).read_text())
    done = run("bash", copy / "run_zero2.sh", "--help", PATH=f"{tmp_path}:/usr/bin:/bin", PYTHON="")
    assert done.returncode == 0 and "NUM_PROCESSES" in done.stdout and "docs/flags.md" in done.stdout, done.stderr
    assert "[ -n" not in done.stdout and sorted(path.name for path in copy.iterdir()) == ["run_zero2.sh", "scripts"]
