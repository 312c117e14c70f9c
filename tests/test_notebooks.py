"""Every notebook, top to bottom, on the demo's model after a few steps of training."""

from itertools import pairwise

import nbformat
import pytest
from conftest import ROOT, call
from core_time import a_minute_of_one_core
from nbclient import NotebookClient
from PIL import Image

from demo import make_data
from train_llava import build_model, train
from train_llava.model.load import load


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's model and data, and one run of each kind; cut short, since what it learns does not matter here."""
    folder = tmp_path_factory.mktemp("demo")
    demo = ROOT / "demo"
    halves = ("--vision_model_name_or_path", demo / "clip", "--language_model_name_or_path", demo / "qwen")
    model, data = folder / "model", folder / "data"
    few = ("--max_steps", 3, "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no")
    commands = [(make_data.main, "--output_dir", data, "--captions", 64, "--conversations", 64, "--held_out", 13)]
    commands += [(build_model.main, *halves, "--output_dir", model)]
    for train_type in ("use_lora", "freeze_vision"):
        flags = ("--data_path", data / "conversations", "--train_type", train_type, "--output_dir", folder / train_type)
        commands.append((train.main, "--model_name_or_path", model, *flags, *few))
    for command in commands:
        done = call(*command)
        assert done.returncode == 0, done.stderr
    return folder


def one_png(demo):
    """The least that a user's folder may hold: one image, no JPEG, and a file that is none."""
    folder = demo / "mine"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 48), "green").save(folder / "a.PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


PARAMETERS = {
    "code03_build_model_show.ipynb": lambda demo: {},
    "code05_infer.ipynb": lambda demo: {"MODEL": demo / "freeze_vision", "IMAGES": one_png(demo)},
    "code05_infer_lora.ipynb": lambda demo: {
        "ADAPTER": demo / "use_lora",
        "DATA": demo / "data" / "held_out",
        "MERGED": demo / "merged",
    },
}


@pytest.mark.parametrize("folder", [ROOT, pytest.param(ROOT / "tutorial" / "zh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PARAMETERS)
def test_notebook_runs(name, folder, demo, monkeypatch):
    """In its own folder, as Jupyter starts it, and in a minute of one core."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook = nbformat.read(folder / name, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), "outputs are kept in the file"
    kept = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert not any(out.output_type == "error" for out in kept)
    assert any("image/png" in out.get("data", {}) for out in kept)
    # what is printed in pieces is one text, or a page shows each piece in a line of its own
    for cell in notebook.cells:
        kinds = [out.get("name") for out in cell.get("outputs", [])]
        assert ("stdout", "stdout") not in pairwise(kinds)
    values = PARAMETERS[name](demo)
    if values:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        assert all(f"{name} = " in cell.source for name in values)
        cell.source = "\n".join(f"{name} = {str(value)!r}" for name, value in values.items())
    with a_minute_of_one_core():
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    if "MERGED" in values:
        assert load(values["MERGED"])[0].config.model_type == "llava"
