"""What a training can run on here, for run_zero2.sh: `cuda 2` (torch's name, how many), and the same in words.

Exit code 2 with one line on stderr if torch cannot be imported, or cannot use an accelerator that is there: nobody
wants to train on the CPU beside it. DS_ACCELERATOR=cpu, DeepSpeed's own variable, says that somebody does.
"""

import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from glob import glob
from importlib.metadata import PackageNotFoundError, entry_points, version

# Hidden from torch with these, or by an empty value
HIDING = {"cuda": "CUDA_VISIBLE_DEVICES", "hip": "HIP_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
NOT_TRIED = "; this project has not been tried on it"


def main() -> None:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return answer("cpu", 0, "DS_ACCELERATOR=cpu")
    if only_for_cpus():
        check_nothing_is_left_out(f"torch {version('torch')}", None, None, "")
        return answer("cpu", 0, "no GPU")
    try:
        import torch
    except Exception as error:
        refuse(f"the torch of {sys.executable} cannot be imported ({last_line(error)})")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.accelerator.is_available() and torch.accelerator.device_count() > 0
    if not usable:
        cuda, hip = torch.version.cuda, torch.version.hip
        check_nothing_is_left_out(f"torch {torch.__version__}", cuda, hip, " ".join(str(each.message) for each in said))
        return answer("cpu", 0, "no GPU")
    kind, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    if kind == "mps":
        return answer(kind, 1, f"the GPU of a Mac, in one process and without DeepSpeed{NOT_TRIED}")
    module = torch.get_device_module(kind)
    names = Counter(module.get_device_name(i) for i in range(count))
    words = f"{count} {'GPU' if kind in ('cuda', 'xpu') else kind.upper()}{'s' * (count > 1)}: "
    words += ", ".join(name if len(names) == 1 else f"{number} x {name}" for name, number in names.items())
    answer(kind, count, words + NOT_TRIED * (kind != "cuda" or bool(torch.version.hip)))


def only_for_cpus() -> bool:
    """Whether torch is a build for CPUs, and no package adds an accelerator to it: then its import can be spared."""
    try:
        return version("torch").endswith("+cpu") and not entry_points(group="torch.backends")
    except PackageNotFoundError:
        return False


def check_nothing_is_left_out(build: str, cuda: str | None, hip: str | None, said: str) -> None:
    """Refuses a machine with an accelerator that this torch cannot use.

    `cuda` and `hip` are the versions that it was built for, `said` is what it has warned of while it looked.
    """
    gpus = nvidia_gpus() if os.environ.get(HIDING["cuda"], "all") not in ("", "-1", "NoDevFiles") else 0
    if gpus and not cuda:
        refuse(f"nvidia-smi lists {gpus} GPUs, and {build} is not built for them. Install PyTorch with CUDA")
    if gpus:
        reason = said.partition(". ")[0].strip() or "CUDA does not start"
        refuse(f"nvidia-smi lists {gpus} GPUs, and {build} cannot use them ({reason}). Update the driver, or install a "
               f"PyTorch for the CUDA that nvidia-smi shows")  # fmt: skip
    if os.path.exists("/dev/kfd") and os.environ.get(HIDING["hip"], "all") and not hip:
        refuse(f"an AMD GPU is here (/dev/kfd), and {build} is not built for it. Install PyTorch for ROCm")
    if glob("/dev/davinci[0-9]*") and os.environ.get(HIDING["npu"], "all"):
        refuse(f"an Ascend NPU is here (/dev/davinci*), and {build} cannot use it. Install torch_npu")


def nvidia_gpus() -> int:
    """How many GPUs nvidia-smi lists. Without any it prints a sentence, with exit code 0 or another."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def answer(kind: str, count: int, words: str) -> None:
    print(f"{kind} {count}\n{words}")


def refuse(reason: str) -> None:
    print(f"error: {reason}. DS_ACCELERATOR=cpu in front of the command trains on the CPU", file=sys.stderr)
    sys.exit(2)


def last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


if __name__ == "__main__":
    main()
