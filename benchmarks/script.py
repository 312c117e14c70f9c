"""One training by the real script, as a user starts it, and what it logged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def short_run(model: Path, data: Path, output: Path, variables: dict[str, Any], flags: dict[str, Any]) -> list[dict]:
    """The logs with a loss of a run of some steps that saves nothing on the way; `variables` are run_zero2.sh's."""
    flags = {"gradient_accumulation_steps": 1, "save_strategy": "no", "report_to": "none"} | flags
    words = [str(text) for name, value in flags.items() for text in (f"--{name}", value)]
    names = {"MODEL": model, "DATA": data, "OUTPUT_DIR": output} | variables
    names["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {name: str(value) for name, value in names.items()}
    command = ["bash", str(ROOT / "run_zero2.sh"), "--overwrite_output_dir", "true", *words]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return [log for log in read_log(output) if "loss" in log]


def read_log(folder: Path) -> list[dict[str, float]]:
    """What a training logged."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]
