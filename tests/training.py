"""The run script as the tests start it, and what a run leaves behind."""

import json
from pathlib import Path

from conftest import ROOT, SCRIPT_PATH, run
from page_client import free_port
from safetensors.torch import load_file

STEPS = 6
ANY_BATCH = ["--max_steps", STEPS, "--learning_rate", "1e-3", "--logging_steps", 1, "--lr_scheduler_type", "linear"]
ANY_BATCH += ["--seed", 11, "--lora_dropout", 0, "--report_to", "none", "--save_strategy", "steps", "--save_steps", 3]
FLAGS = [*ANY_BATCH, "--gradient_accumulation_steps", 1]


def shared_memory(port):
    """What the run with this port has left in /dev/shm."""
    return list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer*_{port}_*"))


def zero2(llava, data, output, train_type, *flags, base=(*FLAGS, "--per_device_train_batch_size", 4), **variables):
    variables = {"MASTER_PORT": str(free_port()), **variables}
    done = run(
        *("bash", ROOT / "run_zero2.sh", *base, *flags),
        **{"MODEL": str(llava), "DATA": str(data), "TRAIN_TYPE": train_type, "OUTPUT_DIR": str(output), **variables},
        PATH=SCRIPT_PATH,
    )
    assert not shared_memory(variables["MASTER_PORT"])  # where DeepSpeed's own op would leave hundreds of MB
    return done


def weights(folder):
    name = "adapter_model" if (folder / "adapter_model.safetensors").is_file() else "model"
    return load_file(folder / f"{name}.safetensors")


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]
