"""What commands write: never over what they read, one at a time, whole or not at all."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from conftest import ROOT, call
from folders import snapshot
from transformers import AutoProcessor, LlavaForConditionalGeneration

from train_llava import build_model, check_data, evaluate, infer, merge_lora, show_batch, train
from train_llava import cli as outputs
from train_llava.cli import (
    HELD,
    UNFINISHED,
    InputError,
    check_apart,
    check_same,
    open_locked,
    output_folder,
    whole_file,
)


@pytest.fixture
def copied(llava, data, runs, tmp_path):
    """A base, an adapter, data, and the two halves, each in a folder of its own that may be spoiled."""
    shutil.copytree(llava, tmp_path / "base")
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(runs("use_lora")[0], tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    return tmp_path


def places(folder):
    """The folder itself, the one it is in, and itself through a link."""
    link = folder.with_name(f"link-to-{folder.name}")
    link.symlink_to(folder)
    return [folder, folder.parent, link]


SAID = "which is read here|is no page|holds no model to overwrite"


def test_no_command_writes_over_into_or_above_what_it_reads(copied, old_clip, old_qwen):
    base, adapter, data = (copied / name for name in ("base", "adapter", "data"))
    halves = {name: copied / name for name in ("clip", "qwen")}
    shutil.copytree(old_clip, halves["clip"]), shutil.copytree(old_qwen, halves["qwen"])
    (copied / "q.jsonl").write_text(json.dumps({"image": "data/images/train_000000.jpg"}))
    before = snapshot(copied)
    merge = ["--adapter_name_or_path", adapter, "--model_name_or_path", base, "--overwrite"]
    build = [
        "--vision_model_name_or_path",
        halves["clip"],
        "--language_model_name_or_path",
        halves["qwen"],
        "--overwrite",
    ]
    asked = ["--model_name_or_path", base, "--images", copied / "q.jsonl"]
    scored = ["--model_name_or_path", base, "--data_path", data]
    trained = [*scored, "--overwrite_output_dir", "true", "--use_cpu", "true"]
    cases = [(merge_lora.main, [*merge, "--output_dir", place]) for place in (*places(base), *places(adapter))]
    cases += [(build_model.main, [*build, "--output_dir", place]) for half in halves.values() for place in places(half)]
    cases += [(evaluate.main, [*scored, "--output_dir", place]) for place in (base, data, copied)]
    cases += [(check_data.main, ["--data_path", data, "--output_dir", place]) for place in (data, copied)]
    cases += [(show_batch.main, [*scored, "--output", place]) for place in (data / "chat.json", base / "b.html")]
    cases += [(infer.main, [*asked, "--output_file", place]) for place in (copied / "q.jsonl", base / "answers.jsonl")]
    cases += [(train.main, [*trained, "--output_dir", place]) for place in (base, data, copied)]
    for main, flags in cases:
        done = call(main, *flags)
        assert done.returncode == 2 and re.search(SAID, done.stderr), (flags, done.stderr)
    assert snapshot(copied) == before


def test_apart_follows_links_and_knows_neighbours(tmp_path):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for fine in (tmp_path / "model2", tmp_path / "mode", tmp_path / "new" / "deep"):
        check_apart(fine, tmp_path / "model", tmp_path / "link", None, "someone/on-the-hub")
    for bad in (tmp_path / "model", tmp_path / "link", tmp_path, tmp_path / "model" / ".." / "model"):
        with pytest.raises(InputError, match="is read here"):
            check_apart(bad, tmp_path / "model")
    check_apart(tmp_path / "link" / "deep" / "new.html", tmp_path / "model", is_file=True)
    for bad in (tmp_path / "model" / "new.html", tmp_path / "link" / "new.html"):
        with pytest.raises(InputError, match="lies in"):
            check_apart(bad, tmp_path / "model", is_file=True)


HOLDER = """
import os
import sys
import time
from pathlib import Path
from train_llava.cli import open_locked, output_folder, whole_file
how = {"folder": output_folder, "file": open_locked, "whole": whole_file}[sys.argv[1]]
with how(Path(sys.argv[2])):
    if not os.fork():  # a worker, which lives on for a while
        os.close(1)
        time.sleep(3)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("kind, hold", [("folder", output_folder), ("file", open_locked), ("whole", whole_file)])
def test_a_second_process_is_refused_until_the_first_ends(tmp_path, kind, hold):
    """Also when the first is killed; a process may enter what it holds again."""
    path = tmp_path / "new" / "out"
    command = [sys.executable, "-c", HOLDER, kind, str(path)]
    for end in ("it ends", "it is killed"):
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout.readline() == "held\n"
            with pytest.raises(InputError, match="another process is writing there"), hold(path):
                pass
            if end == "it is killed":
                first.kill()
            else:
                first.stdin.write("\n")
        with hold(path), hold(path) if kind == "folder" else nullcontext():
            pass
    assert not HELD and not list(tmp_path.rglob(f"{UNFINISHED}*"))


def test_what_was_moved_to_its_place_meanwhile_is_left_alone(tmp_path, monkeypatch):
    """Between the opening of an unfinished file and its lock, its writer ends, and another one may begin."""
    path, unfinished = tmp_path / "page.html", tmp_path / f"{UNFINISHED}page.html"
    for another in (False, True):
        unfinished.write_text("whole")

        def finish(place, how, another=another, lock=outputs.fcntl.flock):
            os.replace(unfinished, path)
            if another:
                unfinished.touch()
            lock(place, how)

        with monkeypatch.context() as patch:
            patch.setattr(outputs.fcntl, "flock", finish)
            with pytest.raises(InputError, match="another process is writing there"), whole_file(path):
                pass
        assert path.read_text() == "whole" and unfinished.exists() == another
    assert not HELD


@pytest.mark.filterwarnings("error")  # as pytest tells of what ends a thread
def test_threads_that_write_at_once_leave_one_whole_file(tmp_path, capsys):
    path = tmp_path / "page.html"

    def work(text):
        with suppress(InputError), whole_file(path) as new:
            new.write_text(text * 100_000)

    with whole_file(path), pytest.raises(InputError, match="another process is writing"), whole_file(path):
        pass
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns so often that they meet in the middle of anything
    try:
        for _ in range(100):
            threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcdefgh"]
            [thread.start() for thread in threads], [thread.join() for thread in threads]
            assert len(set(path.read_text())) == 1 and len(path.read_text()) == 100_000
            assert os.listdir(tmp_path) == ["page.html"]
    finally:
        sys.setswitchinterval(usual)
    assert not capsys.readouterr().err


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a.txt") as new:
        new.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(RuntimeError), output_folder(tmp_path / "x" / "y"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("place", ["/proc/here", "/dev/null/here", "file/inside", "dangling"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere/at/all")
    for hold in (output_folder, open_locked, whole_file):
        if place != "dangling" or hold is output_folder:
            with pytest.raises(InputError, match=r"cannot be written|is no file"), hold(Path(place)):
                pass
    assert sorted(os.listdir()) == ["dangling", "file"]


@pytest.mark.parametrize("how", ["link", "dot", "relative"])
def test_links_and_the_current_folder_can_be_written_to(llava, runs, tmp_path, monkeypatch, how):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "disk")
    place = {"link": tmp_path / "link", "dot": ".", "relative": "deep/er"}[how]
    done = call(merge_lora.main, "--adapter_name_or_path", runs("use_lora")[0], "--output_dir", place)
    assert done.returncode == 0, done.stderr
    assert LlavaForConditionalGeneration.from_pretrained(place) and AutoProcessor.from_pretrained(place)
    assert (tmp_path / "link").is_symlink()


def test_an_evaluation_is_not_written_over_by_another_models(llava, data, tmp_path):
    out = tmp_path / "out"
    flags = ["--data_path", data, "--max_new_tokens", 1, "--output_dir", out]
    assert call(evaluate.main, "--model_name_or_path", llava, *flags).returncode == 0
    before = snapshot(out)
    shutil.copytree(llava, tmp_path / "other")
    done = call(evaluate.main, "--model_name_or_path", tmp_path / "other", *flags)
    assert done.returncode == 2 and "holds results about {'model'" in done.stderr and snapshot(out) == before
    assert call(evaluate.main, "--model_name_or_path", llava, *flags).returncode == 0  # its own are made anew


def test_reports_of_other_data_and_files_of_others_stay(data, tmp_path):
    for content in ("mine", "{}", '{"data": ["other"]}'):
        (tmp_path / "report.json").write_text(content)
        done = call(check_data.main, "--data_path", data, "--output_dir", tmp_path)
        assert done.returncode == 2 and "holds results about" in done.stderr
        assert (tmp_path / "report.json").read_text() == content
    (tmp_path / "report.json").unlink()
    (tmp_path / "lengths.png").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        check_same({"data": []}, tmp_path / "report.json", tmp_path / "lengths.png")


def test_results_have_places_of_their_own_by_default(llava, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(data, tmp_path / name)
        shutil.copytree(llava, tmp_path / f"model-{name}")
        assert call(check_data.main, "--data_path", name, "--workers", 0).returncode == 0
        flags = ("--model_name_or_path", f"model-{name}", "--data_path", "one", "--max_new_tokens", 1)
        assert call(evaluate.main, *flags).returncode == 0
    assert sorted(os.listdir("output/check_data")) == ["one", "two"]
    assert sorted(os.listdir("output/evaluation")) == ["model-one", "model-two"]


def test_a_page_is_not_written_over_another_file(llava, data, tmp_path):
    (tmp_path / "mine.html").write_text("<title>mine</title>")
    flags = ["--model_name_or_path", llava, "--data_path", data, "--output"]
    done = call(show_batch.main, *flags, tmp_path / "mine.html")
    assert done.returncode == 2 and (tmp_path / "mine.html").read_text() == "<title>mine</title>"
    assert [call(show_batch.main, *flags, tmp_path / "own.html").returncode for _ in range(2)] == [0, 0]
