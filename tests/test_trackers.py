"""Sample captions in the trackers of --report_to: real ones where they are installed, stand-ins elsewhere."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import get_reporting_integration_callbacks

from train_llava.cli import InputError
from train_llava.pages.caption_sheet import draw_sheet
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.training import flag_checks
from train_llava.training.samples import LogGenerationsCallback
from train_llava.training.trackers import TRACKERS

ROWS = [
    {"id": f"held_out_{i}", "image": Image.new("RGB", (28, 28), colour), "prompt": "<image>\nWhat?", "exact": False}
    | {"reference": "a red seven", "caption": f"a {colour} two"}
    for i, colour in enumerate(("red", "blue"))
]
NAMES = ["samples/held_out_0", "samples/held_out_1"]
MODULES = sorted(set(TRACKERS) - {"tensorboard"})


def show(tmp_path, *names, step=7):
    """As in a training, but for the answers."""
    callback = LogGenerationsCallback([], None, 1)
    callback._show(ROWS, step, tmp_path, [*names])


class StandIn(SimpleNamespace):
    """In place of wandb, swanlab or trackio: `Image` and `log`, as their documentation has them, keep what they get."""

    def __init__(self):
        super().__init__(logged=[], Image=lambda image, caption=None: SimpleNamespace(image=image, caption=caption))

    def log(self, data, step=None):
        self.logged.append((data, step))


@pytest.mark.parametrize("name", MODULES)
def test_a_card_with_its_texts_for_each_example(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, stand_in := StandIn())
    show(tmp_path, name)
    ((data, step),) = stand_in.logged
    assert step == 7 or data["train/global_step"] == 7
    for key, row in zip(NAMES, ROWS, strict=True):
        card = data[key].image
        assert {row["image"].getpixel((0, 0))} <= {colour for _, colour in card.getcolors(1 << 20)}
        assert all(text in data[key].caption for text in (row["prompt"], row["caption"], row["reference"]))
    assert (tmp_path / "samples" / "step_000007.png").is_file() and not (tmp_path / "runs").exists()


def test_every_tracker_that_is_named_and_no_other(tmp_path, monkeypatch):
    stand_ins = {name: StandIn() for name in MODULES}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    show(tmp_path, "swanlab", "wandb", "mlflow")
    assert [bool(stand_ins[name].logged) for name in ("swanlab", "trackio", "wandb")] == [True, False, True]


@pytest.mark.parametrize("names, told", [(["mlflow", "wandb"], True), (["wandb"], False), ([], False)])
def test_a_tracker_without_images_is_named(tmp_path, capsys, names, told):
    """Once, when training begins."""
    args = SimpleNamespace(report_to=names, output_dir=str(tmp_path))
    LogGenerationsCallback([], None, 1).on_train_begin(args, SimpleNamespace(is_world_process_zero=True), None)
    said = capsys.readouterr().out
    assert ("--sample_steps: mlflow gets numbers alone" in said) == told and bool(said) == told


def test_tensorboard_reads_them(tmp_path):
    show(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "runs" / "samples"))
    events.Reload()
    assert events.Tags()["images"] == NAMES and {event.step for event in events.Images(NAMES[0])} == {7}
    (text,) = events.Tensors("samples/text_summary")
    assert all(row["caption"].encode() in text.tensor_proto.string_val[0] for row in ROWS)


OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline", "TRACKIO_DIR": "trackio"}


@pytest.mark.parametrize("name", MODULES)
def test_the_real_ones_keep_images(tmp_path, monkeypatch, name):
    """With transformers' own callback, which begins the run, logs numbers into it and ends it; without a network."""
    monkeypatch.chdir(tmp_path)
    for key, value in OFFLINE.items():
        monkeypatch.setenv(key, value)
    pytest.importorskip(name)
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=name)
    (callback,) = (kind() for kind in get_reporting_integration_callbacks([name]))
    state = SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False, trial_name=None, global_step=7)
    callback.on_train_begin(args, state, None, model=None)
    show(tmp_path, name)
    callback.on_log(args, state, None, logs={"eval_loss": 0.5, "eval_exact_match": 0.25})
    callback.on_train_end(args, state, None)
    if name != "trackio":  # whose callback has ended its run
        sys.modules[name].finish()
    kept = [np.asarray(Image.open(path).convert("RGB")) for path in tmp_path.rglob("*.png")]
    for row in ROWS:
        assert any(np.array_equal(card, np.asarray(draw_sheet([row]))) for card in kept), row["id"]


@pytest.mark.parametrize("fails", [True, False])
def test_a_swanlab_that_transformers_cannot_start_is_refused(tmp_path, monkeypatch, fails):
    """As 0.10 is, which raises where there is no run; 0.7 says None."""

    def get_run():
        if fails:
            raise RuntimeError("No active Run. Call swanlab.init() first.")

    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(get_run=get_run))
    monkeypatch.setattr(flag_checks, "get_reporting_integration_callbacks", lambda names: [])
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=["swanlab"])
    with pytest.raises(InputError, match=r"pip install 'swanlab<0\.8'") if fails else nullcontext():
        flag_checks.check_services(args)
