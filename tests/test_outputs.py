"""What commands write: never over what they read, one at a time, whole or not at all, readable, and said in a line."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, call
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from train_llava import build_model, check_data, evaluate, infer, merge_lora, show_batch, train
from train_llava.command import InputError, command
from train_llava.model_card import name_of
from train_llava.new_folder import LEAVING, MODEL_FILES, REPLACED, check_output_dir, mend, new_folder, put_in_place
from train_llava.outputs import HELD, UNFINISHED, check_apart, check_same, open_locked, output_folder, whole_file
from train_llava.samples import draw_sheet


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- apart from what is read


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


# ---------------------------------------------------------------- one process at a time


HOLDER = """
import os
import sys
import time
from pathlib import Path
from train_llava.outputs import open_locked, output_folder, whole_file
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


def test_threads_that_write_at_once_leave_one_whole_file(tmp_path):
    path, errors = tmp_path / "page.html", []

    def work(text):
        try:
            with whole_file(path) as new:
                new.write_text(text * 100_000)
        except InputError as error:
            errors.append(error)

    with whole_file(path), pytest.raises(InputError, match="another process is writing"), whole_file(path):
        pass
    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcdefgh"]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(set(path.read_text())) == 1 and len(path.read_text()) == 100_000
    assert os.listdir(tmp_path) == ["page.html"]


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


# ---------------------------------------------------------------- a model takes the place of another


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
        mend(folder)
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


# ---------------------------------------------------------------- results of something else


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


# ---------------------------------------------------------------- a run takes the place of another


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
    assert (out / "notes.txt").read_text() == (out / "README.md").read_text() == "mine"


class Hub:
    """In place of the network: what is there when it would be uploaded."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, *args, **kwargs):
        return SimpleNamespace(repo_id="me/out")

    def upload_folder(self, folder_path, **kwargs):
        self.uploads.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})


def test_what_is_pushed_is_the_whole_model_with_its_card(llava, data, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {})
    done = trained(llava, data, tmp_path / "out", "--push_to_hub", "true", "--save_strategy", "no")
    assert done.returncode == 0, done.stderr
    pushed = hub.uploads[-1]
    assert {"model.safetensors", "config.json", "processor_config.json", "chat_template.jinja"} <= pushed.keys()
    assert b"trained with train_llava" in pushed["README.md"]
    assert pushed["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_folder_that_holds_no_run_is_not_replaced(llava, data, tmp_path):
    """Such as that of a project, with a README and samples of its own."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "README.md").write_text("my project")
    before = snapshot(tmp_path)
    done = trained(llava, data, tmp_path, "--overwrite_output_dir", "true")
    assert done.returncode == 2 and "holds no run to replace" in done.stderr and snapshot(tmp_path) == before


# ---------------------------------------------------------------- terminals, lists and numbers


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1"])
def test_what_a_terminal_cannot_show_ends_nothing(encoding):
    code = "from train_llava.command import command\n@command\ndef main(): print('红 caf\\u00e9 \\U0001f600')\nmain()"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0 and b"\\U0001f600" in done.stdout, done.stderr
    assert ("红".encode("gbk") in done.stdout) == (encoding == "gbk")


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch_size", 0),
        ("--max_new_tokens", 0),
        ("--max_new_tokens", "many"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", -1),
        ("--top_p", 0),
        ("--top_p", 2),
        ("--seed", -1),
    ],
)
def test_numbers_that_mean_nothing(flags, capsys):
    done = call(infer.main, "--model_name_or_path", "none", *flags)
    assert done.returncode == 2 and f"argument {flags[0]}: '{flags[1]}' is not a" in done.stderr


LISTS = {
    "Latin-1": ("caf\u00e9 cr\u00e8me.jpg".encode("latin-1"), "not UTF-8 text"),
    "a null prompt": (b'{"image": "a.jpg", "prompt": null}', "line 1: the names of its images and its prompt"),
    "a number": (b'a.jpg\n{"image": 7}', "line 2: the names of its images"),
    "deep": (b'{"image":' * 50_000, "a line is neither a path"),
    "no image": (b'{"images": "a.jpg"}', "a line is neither a path"),
}


@pytest.mark.parametrize("what", LISTS)
def test_lists_that_cannot_be_asked_about(tmp_path, what):
    content, reason = LISTS[what]
    (tmp_path / "list").write_bytes(content)
    flags = ("--model_name_or_path", "none", "--images", tmp_path / "list", "--output_file", tmp_path / "out.jsonl")
    done = call(infer.main, *flags)
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ["list"]


def test_a_list_with_a_mark_and_hidden_files(llava, files, tmp_path):
    """The mark that Windows puts in front; what macOS leaves beside an image."""
    shutil.copy(files[0], tmp_path / "a.jpg")
    (tmp_path / "._a.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\n")
    flags = ("--model_name_or_path", llava, "--max_new_tokens", 2, "--prompt", "What?")
    for i, source in enumerate((tmp_path / "list.txt", tmp_path)):
        out = tmp_path.with_name(f"{tmp_path.name}-{i}.jsonl")
        done = call(infer.main, *flags, "--images", source, "--output_file", out)
        assert done.returncode == 0, done.stderr
        assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == ["a.jpg"]


def test_without_an_image_it_says_so_and_ctrl_c_ends_a_chat(llava, monkeypatch):
    flags = ("--model_name_or_path", llava, "--max_new_tokens", 2)
    done = call(infer.main, *flags, "--prompt", "Hello")
    assert done.returncode == 0 and "no --image: asked about none" in done.stderr

    def ctrl_c(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", ctrl_c)
    assert call(infer.main, *flags, "--interactive").returncode == 0


def test_an_error_inside_a_command_is_one_line(capsys):
    @command
    def main():
        raise InputError("a\ud800b")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("error: a")


# ---------------------------------------------------------------- what is left to read


def test_the_card_holds_names_and_no_paths_of_this_machine(llava, data, runs):
    output, _ = runs("use_lora")
    card = (output / "README.md").read_text()
    assert not re.search(rf"{re.escape(str(llava.parent))}|{re.escape(str(data.parent))}|{output.parent}", card)
    assert f"| trained from | `{llava.name}` |" in card and f"| data | `{data.name}` |" in card
    assert f'model="{output.name}"' in card
    assert name_of("Qwen/Qwen1.5-4B-Chat") == "Qwen/Qwen1.5-4B-Chat"


def test_the_last_line_of_a_run_can_be_pasted(runs, tmp_path):
    """From any folder, as it is."""
    _, log = runs("use_lora")
    line = log.split("Ask it something:\n")[1].splitlines()[0]
    done = subprocess.run(line, shell=True, cwd=tmp_path, input="/quit\n", capture_output=True, text=True)
    assert done.returncode == 0 and "/quit ends" in done.stderr, done.stderr[-1000:]


FONT = """
import os, sys
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

def square(size):
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, size)), pen.lineTo((size, size)), pen.lineTo((size, 0)), pen.closePath()
    return pen.glyph()

font = FontBuilder(1000, isTTF=True)
letters = {".notdef": 100, "red": 900, "seven": 700, "a": 400}
font.setupGlyphOrder([*letters])
font.setupCharacterMap({ord("\u7ea2"): "red", ord("\u4e03"): "seven", ord("a"): "a"})
font.setupGlyf({name: square(size) for name, size in letters.items()})
font.setupHorizontalMetrics({name: (1000, 0) for name in letters})
font.setupHorizontalHeader(ascent=900, descent=-100)
font.setupNameTable({"familyName": "Two", "styleName": "Regular"})
font.setupOS2(), font.setupPost()
font.save(sys.argv[1])
"""


def test_captions_in_chinese_find_a_font_or_name_a_package(tmp_path):
    """A system with no font, and one with a font that has the two characters of a caption."""
    code = """
import sys
from train_llava import fonts
font = fonts.font_for("\u7ea2\u4e03", 18)
print(font.path if isinstance(font.path, str) else "Pillow's own")
"""
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}
    environment |= {"PATH": str(tmp_path), "HOME": str(tmp_path)}  # no fc-list, so only the folders of X11 are asked
    known = "from matplotlib import font_manager as f\nf.X11FontDirectories[:] = f.X11FontDirectories[-2:]\n"
    (tmp_path / "fonts").mkdir()
    for there in (False, True):
        if there:
            subprocess.run([sys.executable, "-c", FONT, tmp_path / "fonts" / "two.ttf"], check=True)
        command = [sys.executable, "-c", known + code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == (str(tmp_path / "fonts" / "two.ttf") if there else "Pillow's own"), done.stderr
        assert ("apt install fonts-noto-cjk" in done.stderr) == (not there)


def test_a_sheet_wraps_what_has_no_blanks():
    """No line of a caption is wider than its picture, in any script; without a verdict it is drawn in grey."""
    from train_llava.fonts import font_for, wrapped

    for text in ("一个红色的七在左上角\uff0c一个蓝色的一在右下角\u3002" * 3, "word " * 50, "x" * 200, "", "a 红" * 60):
        font = font_for(text, 18)
        lines = wrapped(text, font, 260, 3)
        assert len(lines) <= 3 and all(font.getlength(line) <= 260 + 18 for line in lines)
        assert text == "" or lines[0]
    row = {"image": Image.new("RGB", (9, 9)), "caption": "x" * 40}
    colours = [draw_sheet([{**row, **verdict}]).getcolors(1 << 20) for verdict in ({}, {"exact": True})]
    green = [sum(count for count, (r, g, b) in found if g > r + 40) for found in colours]
    assert green[0] == 0 < green[1]
