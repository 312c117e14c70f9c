"""Asking: prompts, batches, streams, the command's three ways, ends and errors. Reference: plain transformers."""

import io
import resource
from pathlib import Path
from threading import Event

import pytest
import torch
from conftest import call, user
from PIL import Image
from transformers import pipeline

from train_llava import infer
from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.generate import answers, ask, collator_of, generate, stream
from train_llava.model.load import load
from train_llava.processing.chat import IGNORE_INDEX
from train_llava.processing.images import open_image

IMAGE = Image.radial_gradient("L").convert("RGB")


@pytest.fixture(scope="module")
def loaded(llava):
    return load(llava)


def test_prompts_are_those_of_training(loaded, data):
    collator = LlavaCollator(loaded[1])
    for example in LlavaDataset(data):
        trained = collator([example])
        answer = int((trained["labels"][0] != IGNORE_INDEX).int().argmax())
        asked = collator_of(loaded[1]).prompts([{**example, "messages": example["messages"][:1]}])
        assert asked["input_ids"].tolist() == trained["input_ids"][:, :answer].tolist()
        assert torch.equal(asked["pixel_values"], trained["pixel_values"])


def test_many_answer_as_plain_transformers_one_at_a_time(loaded, plain, data):
    """Two windows of batches, prompts of many lengths, with two images, one or none."""
    dataset = LlavaDataset(data)
    examples = []
    for i in range(11):
        images = [*dataset[i]["images"], *dataset[i + 1]["images"]][: i % 3]
        examples.append(ask("What? " * (i * 5 % 7) + "Say!", images))
    said = dict(answers(*loaded, examples, batch_size=2, max_new_tokens=12))
    assert sorted(said) == list(range(11))
    expected = [plain(example["messages"], example["images"], max_new_tokens=12) for example in examples]
    assert [said[i] for i in range(11)] == expected and len(set(expected)) > 3


def test_the_collator_is_made_once(loaded):
    assert collator_of(loaded[1]) is collator_of(loaded[1])


def test_prompts_made_at_the_same_time_are_whole(loaded, monkeypatch):
    """What another thread of a server gets, while the first one renders a kind of conversation never seen before."""
    encoder, turns = LlavaCollator(loaded[1]).encoder, user("What?") * 3
    template, meanwhile = encoder.template, []
    render = template.render

    def interrupted(*args):
        monkeypatch.setattr(template, "render", render)
        meanwhile.append(encoder.encode(turns, True))
        return render(*args)

    monkeypatch.setattr(template, "render", interrupted)
    text = loaded[1].apply_chat_template(turns, add_generation_prompt=True)
    assert encoder.encode(turns, True)[0] == meanwhile[0][0] == loaded[1].tokenizer(text).input_ids


def test_a_stream_is_the_answer_and_can_be_stopped(loaded, plain):
    example = ask("What?", [IMAGE])
    pieces = list(stream(*loaded, example, max_new_tokens=12))
    assert len(pieces) > 1 and "".join(pieces).strip() == plain(example["messages"], [IMAGE], max_new_tokens=12)
    stop = Event()
    stop.set()
    few = "".join(stream(*loaded, example, stop, max_new_tokens=400))
    assert len(few) < 20 and "".join(pieces).startswith(few)
    with pytest.raises(InputError, match="of the model's 512 positions"):
        list(stream(*loaded, ask("word " * 600, []), max_new_tokens=4))


def test_closing_a_stream_ends_its_thread(loaded):
    forwards = []
    hook = loaded[0].register_forward_hook(lambda *_: forwards.append(1))
    pieces = stream(*loaded, ask("What?", [IMAGE]), max_new_tokens=400, eos_token_id=447)
    next(pieces)
    pieces.close()
    hook.remove()
    assert len(forwards) < 100


def test_generation_stops_at_the_end_of_turn(llava):
    model, processor = load(llava)
    head = torch.nn.Linear(48, 448)  # can say nothing but the end of turn
    torch.nn.init.zeros_(head.weight)
    head.bias.data = 100.0 * torch.eye(448)[420]
    model.lm_head = head
    prompt = processor(images=Image.new("RGB", (9, 9)), text="<image>", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=9)
    assert ids[0, prompt.input_ids.shape[1] :].tolist() == [420]
    said = []
    model.register_forward_hook(lambda *_: said.append(1))
    assert generate(model, processor, [ask("What?", [Image.new("RGB", (9, 9))])]) == [""] and len(said) == 1


def test_placeholders(loaded):
    image = Image.new("RGB", (9, 9))
    assert ask("What?", [image, image])["messages"][0]["content"] == "<image>\n<image>\nWhat?"
    assert ask("What is <image>?", [image])["messages"][0]["content"] == "What is <image>?"
    with pytest.raises(InputError, match="has 2 <image>, but the number of images given is 1"):
        ask("<image> <image>", [image])
    with pytest.raises(InputError, match="has 0 <image>, but the number of images given is 1"):
        generate(*loaded, [{"messages": user("What?"), "images": [image]}])


def test_the_positions_of_the_model_end_prompt_and_answer(loaded):
    model, processor = loaded
    word = len(processor.tokenizer(" a").input_ids)
    used = collator_of(processor).prompts([ask("a", [])])["input_ids"].shape[1]
    almost = ask("a" + " a" * ((509 - used) // word), [])
    length = collator_of(processor).prompts([almost])["input_ids"].shape[1]
    seen = []
    hook = model.register_forward_hook(lambda *_: seen.append(1))
    generate(model, processor, [almost], eos_token_id=447)
    hook.remove()
    assert 500 < length < 512 and len(seen) == 512 - length
    full = ask("a" + " a" * ((512 - used) // word), [])
    assert collator_of(processor).prompts([full])["input_ids"].shape[1] == 512
    with pytest.raises(InputError, match="takes 512 of the model's 512 positions"):
        generate(model, processor, [full])
    with pytest.raises(InputError, match=r"takes 5\d\d of the model's 512 positions"):
        generate(model, processor, [ask(almost["messages"][0]["content"] + " a" * 9, [])])


def test_out_of_memory_is_said_in_words(loaded):
    """With the address space all but used up, torch's own allocator fails."""
    examples = [ask("What is it? " * 60, [])] * 1500
    generate(*loaded, examples[:2], max_new_tokens=2)  # threads and kernels have their memory now
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    try:
        with pytest.raises(InputError, match=r"out of memory\. Lower --batch_size .*, --max_new_tokens"):
            generate(*loaded, examples, max_new_tokens=2)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_one_question(llava, data, plain):
    files = sorted((data / "images").iterdir())[:2]
    flags = ["--model_name_or_path", llava, "--prompt", "What?", "--max_new_tokens", 12]
    done = call(infer.main, *flags, "--image", files[0], "--image", files[1])
    expected = plain(user("<image>\n<image>\nWhat?"), [open_image(file) for file in files], max_new_tokens=12)
    assert (done.returncode, done.stdout.strip()) == (0, expected)


def test_sampling_is_seeded(llava, loaded, plain):
    flags = ["--model_name_or_path", llava, "--prompt", "What?", "--max_new_tokens", 12]
    hot = [call(infer.main, *flags, "--temperature", 2, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    torch.manual_seed(1)
    options = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 12}  # from all words
    assert generate(*loaded, [ask("What?", [])], **options) == [hot[0].strip()]
    narrow = call(infer.main, *flags, "--temperature", 2, "--top_p", 1e-6).stdout.strip()
    assert narrow == plain(user("What?"), [], max_new_tokens=12) != hot[0].strip()


def test_a_chat_remembers(llava, plain, data, monkeypatch):
    files = sorted((data / "images").iterdir())[:2]
    first, second = (open_image(file) for file in files)
    typed = [
        "What?",
        "<image>",
        f"/image {files[1]}",
        "/image none.png",
        "/jump",
        "And this?",
        "/new",
        "Hello",
        "/quit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*typed, "never asked"])))
    flags = ["--model_name_or_path", llava, "--interactive", "--image", files[0], "--max_new_tokens", 8]
    done = call(infer.main, *flags)
    turns = user("<image>\nWhat?")
    said = [plain(turns, [first], max_new_tokens=8)]
    turns += [{"role": "assistant", "content": said[0]}, *user("<image>\nAnd this?")]
    said += [plain(turns, [first, second], max_new_tokens=8), plain(user("Hello"), [], max_new_tokens=8)]
    assert done.returncode == 0, done.stderr
    assert [text for line in done.stdout.splitlines() if (text := line.replace(">", "").strip())] == said
    assert "error: the prompt has 1 <image>" in done.stderr and "none.png: no such image" in done.stderr
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert call(infer.main, *flags).returncode == 0  # the end of the input ends it, too


def test_it_answers_as_a_pipeline(llava, loaded):
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is this?"}]
    pipe = pipeline("image-text-to-text", model=str(llava))
    said = pipe(text=user(content), return_full_text=False, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert generate(*loaded, [ask("What is this?", [IMAGE])], max_new_tokens=12) == [said.strip()]


def test_bad_images_and_flags(llava, data, tmp_path):
    with pytest.raises(InputError, match="no such image"):
        open_image(tmp_path / "none.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = call(infer.main, "--model_name_or_path", llava, "--image", tmp_path / "bad.png")
    assert done.returncode == 2 and "bad.png: not a readable image" in done.stderr

    def refused(*flags):
        done = call(infer.main, "--model_name_or_path", llava, *flags)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "goes with --output_file" in refused("--images", data / "images")
    out = ["--output_file", tmp_path / "out.jsonl"]
    assert "no such folder or list" in refused("--images", tmp_path / "none", *out)
    (tmp_path / "empty").mkdir()
    assert "no images here" in refused("--images", tmp_path / "empty", *out)
    (tmp_path / "list").write_text('{"file": 1}')
    assert "a line is neither a path nor" in refused("--images", tmp_path / "list", *out)
    mine = (data / "chat.json").read_bytes()
    (tmp_path / "mine").write_bytes(mine)
    assert "something else than answers" in refused("--images", data / "images", "--output_file", tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == mine


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    image = Image.new(mode, (20, 10))
    image.save(tmp_path / ("p.tif" if mode == "CMYK" else "p.png"))
    opened = open_image(next(tmp_path.glob("p.*")))
    assert (opened.mode, opened.size) == ("RGB", (20, 10))
