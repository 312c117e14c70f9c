"""Each recipe starts as it stands: its flags are known, and its first steps run."""

import json

import pytest
from conftest import ROOT, SCRIPT_PATH, run

RECIPES = sorted((ROOT / "recipes").iterdir())
SIZES = {"llava15_pretrain": 256, "llava15_finetune": 128, "llava15_lora": 128}  # as published, on 8 GPUs


# on request: tests/test_original.py starts the fourth always
CASES = [pytest.param(r, id=r.stem, marks=[pytest.mark.slow]) for r in RECIPES if r.stem in SIZES]


@pytest.mark.parametrize("recipe", CASES)
def test_recipe(recipe, llava, data, tmp_path):
    text = recipe.read_text()
    per_device = int(text.split("--per_device_train_batch_size ")[1].split()[0])
    accumulation = int(text.split("--gradient_accumulation_steps ")[1].split()[0])
    assert 8 * per_device * accumulation == SIZES[recipe.stem]
    variables = {"MODEL": str(llava), "DATA": str(data), "OUTPUT_DIR": str(tmp_path / "out")}
    done = run(
        "bash", recipe, "--max_steps", 2, "--logging_steps", 1, "--report_to", "none", PATH=SCRIPT_PATH, **variables
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert all(log["grad_norm"] > 0 for log in logs if "loss" in log)
