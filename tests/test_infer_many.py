"""Questions about many images, whose answers go into a file: all, what is missing, and nobody else's."""

import json
import re
import shutil

import torch
from conftest import call, user

from train_llava import infer
from train_llava.build_model import build_llava
from train_llava.model.folder import save_llava
from train_llava.processing.images import open_image


def test_a_folder_is_answered_and_resumed(llava, plain, data, tmp_path):
    """Cut off in the middle of a line, the second run asks only what is missing."""
    (tmp_path / "p").mkdir()
    for file in sorted((data / "images").iterdir())[:7]:
        (tmp_path / "p" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "p" / "notes.txt").write_text("no image")
    output = tmp_path / "new" / "answers.jsonl"
    flags = ["--model_name_or_path", llava, "--max_new_tokens", 8, "--batch_size", 3, "--prompt", "What?"]
    flags += ["--images", tmp_path / "p", "--output_file", output]
    done = call(infer.main, *flags)
    assert done.returncode == 0 and "0 of 7 questions are answered" in done.stderr and done.stdout == ""
    whole = output.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    names = sorted(path.name for path in (tmp_path / "p").iterdir() if path.name != "notes.txt")
    assert [line["image"] for line in lines] == names
    for line in lines:
        image = open_image(tmp_path / "p" / line["image"])
        assert line["answer"] == plain(user("<image>\nWhat?"), [image], max_new_tokens=8)
    mark = lines[0] | {"answer": "kept"}
    output.write_text("\n".join([json.dumps(mark), *whole.splitlines()[1:5]])[:-9])
    done = call(infer.main, *flags)
    assert done.returncode == 0 and "4 of 7 questions are answered" in done.stderr
    assert [json.loads(line) for line in output.read_text().splitlines()] == [mark, *lines[1:]]


def test_a_list_with_questions_of_its_own(llava, plain, data, tmp_path):
    names = [str(path) for path in sorted((data / "images").iterdir())[:3]]
    rows = [names[0], json.dumps({"image": names[:2], "prompt": "Which is longer?"}), json.dumps({"image": names[2]})]
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "list.txt").write_text("\n".join(["bad.png", *rows]))
    flags = ["--model_name_or_path", llava, "--max_new_tokens", 8, "--prompt", "What?"]
    flags += ["--images", tmp_path / "list.txt", "--output_file", tmp_path / "out.jsonl"]
    done = call(infer.main, *flags)
    assert done.returncode == 2 and "1 of 4 could not be asked, the first: " in done.stderr
    assert "bad.png: not a readable image" in done.stderr
    said = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert said[0]["image"] == names[:2]  # the longest first
    for line in said:
        images = [open_image(name) for name in ([line["image"]] if isinstance(line["image"], str) else line["image"])]
        asked = user("<image>\n" * len(images) + line["prompt"])
        assert line["answer"] == plain(asked, images, max_new_tokens=8)
    assert sorted(line["prompt"] for line in said) == ["What?", "What?", "Which is longer?"]


def test_answers_of_others_are_not_taken_for_its_own(llava, old_clip, old_qwen, data, tmp_path):
    """Into one file: equal names in another folder, another model, and another one at the same path since; other
    options of generation. Each is asked once and kept beside the others."""
    files = sorted((data / "images").iterdir())
    for name, file in (("a", files[0]), ("b", files[1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(file.read_bytes())
    shutil.copytree(llava, tmp_path / "model")
    output = tmp_path / "answers.jsonl"

    def ask_about(folder, model, *flags):
        where = ["--model_name_or_path", model, "--images", tmp_path / folder, "--output_file", output]
        done = call(infer.main, *where, "--max_new_tokens", 8, *flags)
        assert done.returncode == 0, done.stderr
        return int(re.search(r"(\d) of 1 questions are answered", done.stderr)[1])

    assert ask_about("a", llava) == 0 and ask_about("a", llava) == 1
    assert ask_about("b", llava) == 0 and ask_about("b", llava) == 1
    assert ask_about("a", llava, "--prompt", "Where?") == 0
    assert ask_about("a", llava, "--max_new_tokens", 9) == 0
    assert ask_about("a", llava, "--temperature", 1) == 0 == ask_about("a", llava, "--temperature", 1, "--seed", 1)
    assert ask_about("a", tmp_path / "model") == 0 and ask_about("a", tmp_path / "model") == 1
    torch.manual_seed(17)
    save_llava(*build_llava(old_clip, old_qwen, dtype=torch.float32), tmp_path / "model", overwrite=True)
    assert ask_about("a", tmp_path / "model") == 0 and ask_about("a", tmp_path / "model") == 1
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 8 and {line["folder"] for line in lines} == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert {line["model"] for line in lines} == {str(llava), str(tmp_path / "model")}
