"""What people type and read: numbers, lists, terminals, cards, last lines, captions in any script."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, call, run
from PIL import Image

from train_llava import infer
from train_llava.cli import InputError, command
from train_llava.pages.caption_sheet import draw_sheet
from train_llava.training.model_card import name_of


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1"])
def test_what_a_terminal_cannot_show_ends_nothing(encoding):
    code = "from train_llava.cli import command\n@command\ndef main(): print('红 caf\\u00e9 \\U0001f600')\nmain()"
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
from train_llava.pages import fonts
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
    """No line of a caption is wider than its image, in any script; without a verdict it is drawn in grey."""
    from train_llava.pages.fonts import font_for, wrapped

    for text in ("一个红色的七在左上角\uff0c一个蓝色的一在右下角\u3002" * 3, "word " * 50, "x" * 200, "", "a 红" * 60):
        font = font_for(text, 18)
        lines = wrapped(text, font, 260, 3)
        assert len(lines) <= 3 and all(font.getlength(line) <= 260 + 18 for line in lines)
        assert text == "" or lines[0]
    ends = ("six at the bottom right", "two at the bottom right")  # of four things, told as the demo tells them
    long = "a large purple cross at the top left, a small white star at the top right, a small blue heart"
    rows = [{"image": None, "caption": f"{long} at the bottom left and a small purple {end}"} for end in ends]
    assert draw_sheet(rows[:1]).tobytes() != draw_sheet(rows[1:]).tobytes()  # it is not cut where they differ
    wrong = [{**rows[0], "exact": False, "reference": row["caption"]} for row in rows]
    assert draw_sheet(wrong[:1]).tobytes() != draw_sheet(wrong[1:]).tobytes()  # nor is the right one
    row = {"image": Image.new("RGB", (9, 9)), "caption": "x" * 40}
    colours = [draw_sheet([{**row, **verdict}]).getcolors(1 << 20) for verdict in ({}, {"exact": True})]
    green = [sum(count for count, (r, g, b) in found if g > r + 40) for found in colours]
    assert green[0] == 0 < green[1]


def test_a_run_prints_no_line_of_a_library_and_logs_them(runs):
    output, log = runs("use_lora")
    assert not re.search(r"\[INFO\]|\[WARNING\]|Warning:|mismatch|hostfile|cmd = ", log), log
    assert log.startswith("no GPU: 2 ranks on the CPU\n")
    assert re.search(r"rank 0 .*Python 3\S+, torch 2\S+, transformers 5", (output / "launch.log").read_text())


SPEAKING = """
import logging, sys, warnings
from transformers import logging as theirs
from deepspeed.utils import logger
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.training.run_log import RunLog

warnings.simplefilter("always")
for level, begin in ("passive", True), ("info", True), ("passive", False):
    print(f"== {level}", file=sys.stderr)
    args = LlavaTrainingArguments(output_dir=f"{level}-{begin}", use_cpu=True, log_level=level)
    with RunLog(args) as log:
        theirs.set_verbosity_warning()
        theirs.get_logger("transformers.trainer").warning("one of transformers")
        if begin: log.begin()
        logger.warning("one of DeepSpeed")
        logging.getLogger("accelerate").warning("one of accelerate")
        warnings.warn("one of Python")
        logging.getLogger("peft").error("an error")
logger.warning("behind it")
"""


def test_what_libraries_report_goes_to_the_log(tmp_path):
    """With --log_level info to the terminal, too. A run that is refused leaves no log."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SPEAKING], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and sorted(os.listdir(tmp_path)) == ["info-True", "passive-True"], done.stderr
    for printed in done.stderr.split("== ")[1:3]:
        level = printed.split()[0]
        log = (tmp_path / f"{level}-True/launch.log").read_text()
        for words in ("one of transformers", "one of DeepSpeed", "one of accelerate", "one of Python"):
            words = f'(?<!"){words}'  # Python 3.13 shows the line of the code, too
            found, shown = (len(re.findall(words, text)) for text in (log, printed))
            assert (found, shown) == (1, level == "info"), (words, printed, log)
        assert log.count("an error") == printed.count("an error") == 1 and "behind it" not in log
    assert done.stdout.count("behind it") == 1


def train_line(llava, data, tmp_path):
    flags = f"--model_name_or_path {llava} --data_path {data} --output_dir {tmp_path}/out --max_steps 2 --use_cpu true"
    return f"{shlex.quote(sys.executable)} -u -m train_llava.train {flags} --report_to none --save_strategy no"


def test_a_pipe_that_is_closed_does_not_end_a_training(llava, data, tmp_path):
    line = f"{train_line(llava, data, tmp_path)} | true; echo ${{PIPESTATUS[0]}}"
    done = run("bash", "-c", line)
    assert (done.stdout, done.stderr) == ("0\n", "") and (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_closed_stream_ends_nothing_and_a_closed_pipe_another_command(llava, data, tmp_path):
    """`>&-`, and as in `... | head -1`."""
    done = run("bash", "-c", f"{train_line(llava, data, tmp_path)} >&- 2>&-")
    assert done.returncode == 0 and (tmp_path / "out" / "adapter_model.safetensors").exists()
    check = (
        f"{shlex.quote(sys.executable)} -u -m train_llava.check_data --model_name_or_path {llava} --data_path {data}"
    )
    done = run("bash", "-c", f"{check} | true; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("141\n", "")
