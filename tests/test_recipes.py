"""Each recipe starts as it stands: its flags are known, and its first steps run."""

import json
import shutil

import pytest
from conftest import ROOT, SCRIPT_PATH, run
from folders import padding

RECIPES = sorted((ROOT / "recipes").iterdir())
SIZES = {
    "llava15_pretrain": 256,
    "llava15_finetune": 128,
    "llava15_lora": 128,
    "lora_fast": 32,
}  # as published, and ours


# on request: tests/test_original.py starts the fifth always
CASES = [pytest.param(r, id=r.stem, marks=[pytest.mark.slow]) for r in RECIPES if r.stem in SIZES]


@pytest.mark.parametrize("recipe", CASES)
def test_recipe(recipe, llava, data, tmp_path):
    model = padding(shutil.copytree(llava, tmp_path / "model")) if "llava15" in recipe.stem else llava
    variables = {"MODEL": str(model), "DATA": str(data), "OUTPUT_DIR": str(tmp_path / "out")}
    done = run(
        "bash", recipe, "--max_steps", 2, "--logging_steps", 1, "--report_to", "none", PATH=SCRIPT_PATH, **variables
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f" {SIZES[recipe.stem]} samples a step (4 x " in done.stdout
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert all(log["grad_norm"] > 0 for log in logs if "loss" in log)
