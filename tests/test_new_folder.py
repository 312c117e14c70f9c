"""A model or a run takes the place of another: the old one stays until the new one is whole."""

import os
from contextlib import suppress
from pathlib import Path

from conftest import call
from folders import snapshot
from transformers import AutoProcessor, LlavaForConditionalGeneration

from train_llava import infer, train
from train_llava.cli import UNFINISHED
from train_llava.model.folder import (
    LEAVING,
    MODEL_FILES,
    REPLACED,
    check_output_dir,
    new_folder,
    put_in_place,
    recover_model,
)


def model_files(folder, text):
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (folder / name).write_text(text)
    return folder


def test_what_is_not_of_the_model_stays(tmp_path):
    model_files(tmp_path / "m", "old")
    mine = {"README.md": "my notes", "other.safetensors": "my lora", "notes.bin": "mine", "images/a.jpg": "x"}
    for name, content in mine.items():
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_text(content)
    with new_folder(tmp_path / "m", overwrite=True) as new:
        model_files(new, "new")
        (new / "README.md").write_text("trained with train_llava")
        (new / "chat_template.jinja").write_text("new")
    assert {name: (tmp_path / "m" / name).read_text() for name in mine} == mine
    assert (tmp_path / "m" / "config.json").read_text() == "new" and not list((tmp_path / "m").glob(".*"))


class Killed(BaseException):
    """In place of a SIGKILL: nothing behind it runs."""


def test_whatever_moment_a_replacement_ends_one_whole_model_is_left(tmp_path, monkeypatch):
    """Cut off before each of the moves: the folder holds the old model or the new one, never a mixture that loads, and
    the next command brings the old one back."""
    for cut in range(20):
        folder = tmp_path / str(cut)
        model_files(folder, "old")
        (folder / "model-00001-of-00002.safetensors").write_text("old")
        new = model_files(folder / f"{UNFINISHED}x", "new")
        (new / "vocab.json").write_text("new")
        whole = [model_texts(folder), model_texts(new)]
        moves = iter([True] * cut)
        with monkeypatch.context() as patch, suppress(Killed):
            for name in ("replace", "rename"):
                patch.setattr(Path, name, killed_when_out_of(moves, getattr(Path, name)))
            put_in_place(new, folder)
        if (folder / "config.json").exists():
            assert model_texts(folder) in whole, cut
        recover_model(folder)
        assert model_texts(folder) in whole, cut
        assert not [path for path in folder.iterdir() if path.name.startswith((LEAVING, REPLACED, UNFINISHED))]
        if next(moves, False):
            return
    raise AssertionError("more moves than expected")


def killed_when_out_of(moves, plain):
    def move(self, target):
        if not next(moves, False):
            raise Killed
        return plain(self, target)

    return move


def model_texts(folder):
    return {path.name: path.read_text() for pattern in MODEL_FILES for path in folder.glob(pattern)}


def test_a_cut_replacement_is_said_to_whoever_loads(tmp_path):
    model_files(tmp_path / f"{REPLACED}x", "old")
    done = call(infer.main, "--model_name_or_path", tmp_path)
    assert done.returncode == 2 and f"It is whole in {tmp_path}/{REPLACED}x: move its files back" in done.stderr
    check_output_dir(tmp_path, overwrite=False)  # a new command may go on, and mends it first


def test_files_can_be_read_by_others(llava, runs):
    """As any file that a program makes here."""
    mask = os.umask(0)
    os.umask(mask)
    output, _ = runs("use_lora")
    for folder in (llava, output, next(output.glob("checkpoint-*"))):
        for path in folder.glob("*.safetensors"):
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


def trained(llava, data, output, *flags):
    words = ["--model_name_or_path", llava, "--data_path", data, "--output_dir", output, "--train_type", "projector"]
    words += ["--max_steps", 2, "--use_cpu", "true", "--report_to", "none", "--per_device_train_batch_size", 4]
    return call(train.main, *words, *flags)


def test_the_old_run_stays_until_the_new_one_is_whole(llava, data, tmp_path, monkeypatch):
    """Refused before it begins: nothing has changed. Ended in the middle: the old run is whole in a folder of its own.
    Whole: the old one is gone, and what was never of a run is still there."""
    out, again = tmp_path / "out", ("--overwrite_output_dir", "true")
    assert trained(llava, data, out).returncode == 0
    for name in ("notes.txt", "README.md"):
        (out / name).write_text("mine")
    (out / "bad_images.jsonl").write_text('{"id": "7", "reason": "7.jpg: not a readable image."}\n')  # of this run
    before = snapshot(out)
    for flags in (("--data_path", tmp_path / "nowhere"), ("--model_name_or_path", tmp_path / "nowhere")):
        assert trained(llava, data, out, *again, *flags).returncode == 2 and snapshot(out) == before

    with monkeypatch.context() as patch:
        patch.setattr(train.LlavaTrainer, "training_step", lambda *args: 1 / 0)
        done = trained(llava, data, out, *again)
    aside = next(out.glob("_old-run-*"))
    assert done.returncode == 1 and f"the run that was in {out} is in {aside}" in done.stdout
    old = {name: text for name, text in before.items() if name.name not in ("notes.txt", "README.md")}
    assert snapshot(aside) == old and not (out / "config.json").exists()
    assert LlavaForConditionalGeneration.from_pretrained(aside) and AutoProcessor.from_pretrained(aside)

    assert trained(llava, data, out, *again).returncode == 0
    assert not list(out.glob("_old-run-*")) and (out / "config.json").exists()
    assert not (out / "bad_images.jsonl").exists()
    assert (out / "notes.txt").read_text() == (out / "README.md").read_text() == "mine"


def test_a_folder_that_holds_no_run_is_not_replaced(llava, data, tmp_path):
    """Such as that of a project, with a README and samples of its own."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "README.md").write_text("my project")
    before = snapshot(tmp_path)
    done = trained(llava, data, tmp_path, "--overwrite_output_dir", "true")
    assert done.returncode == 2 and "holds no run to replace" in done.stderr and snapshot(tmp_path) == before
