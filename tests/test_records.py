"""Records as people have them: what they mean is learned, or they are refused."""

import base64
import io
import json

import layouts
import numpy as np
import pytest
from conftest import call
from own_data import images, record, refusal
from PIL import Image

from train_llava import check_data
from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.ingest.formats import parse
from train_llava.ingest.sources import caption_mapping

FIELDS = caption_mapping(None)


def messages_of(**changes):
    return parse({**record(0), **changes}, "llava", FIELDS)[0]


def test_a_system_prompt_beside_the_turns():
    expected = layouts.chat("<image>\nWhat?", "A thing.", system="Be brief.")
    assert messages_of(system="Be brief.") == messages_of(system_prompt="Be brief.") == expected
    own = layouts.llava_turns(expected)
    assert messages_of(system="Be brief.", conversations=own) == expected
    assert messages_of(system=" ") == messages_of(system=None) == expected[1:]
    for other in ("Be long.", 7):
        with pytest.raises(InputError, match='the field "system"'):
            messages_of(system=other, conversations=own)


def test_an_answer_without_words_is_not_learned_as_silence():
    turns = layouts.llava_turns(layouts.chat("<image>\nWhat?", "A thing.", "And?", " \n"))
    with pytest.raises(InputError, match="an answer without words"):
        messages_of(conversations=turns)


def test_a_placeholder_is_not_guessed():
    """LLaVA's own records always say where the image stands."""
    with pytest.raises(InputError, match="0 <image> in the text, 1 images"):
        messages_of(conversations=layouts.llava_turns(layouts.chat("What?", "A thing.")))


def test_a_system_message_in_the_middle():
    later = layouts.chat("And?", "Two things.", system="Be brief.")
    with pytest.raises(InputError, match="a system message that is not the first"):
        messages_of(conversations=layouts.llava_turns(layouts.chat("<image>\nWhat?", "A thing.") + later))


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    """JSON can hold one, as \\ud800; a file of UTF-8, and so the copy of the data, cannot."""
    images(tmp_path, 2)
    (tmp_path / "chat.json").write_text(json.dumps([record(0), record(1, answer="A \ud800 thing.")]))
    assert "1 of 2 records cannot be trained on" in refusal(tmp_path) and "record '1'" in refusal(tmp_path)
    assert len(LlavaDataset(tmp_path, on_bad_record="skip")) == 1


@pytest.mark.parametrize("field", ["video", "videos", "audio", "audios", "tools"])
def test_what_would_not_be_seen_is_refused(tmp_path, field):
    images(tmp_path, 1)
    (tmp_path / "chat.json").write_text(json.dumps([record(0, **{field: ["a"]})]))
    assert f'the field "{field}"' in refusal(tmp_path)
    done = call(check_data.main, "--data_path", tmp_path, "--output_dir", f"{tmp_path}-report", "--workers", 0)
    assert done.returncode == 2 and f'the field "{field}"' in done.stdout
    assert len(messages_of(**{field: []})) == 2  # as tables have it, where other rows have some


@pytest.mark.parametrize("field, value", [("loss", False), ("weight", 0), ("weight", 0.5), ("train", False)])
def test_turns_that_others_would_not_learn(field, value):
    turns = layouts.llava_turns(layouts.chat("<image>\nWhat?", "A thing."))
    with pytest.raises(InputError, match="a turn with a weight of its own"):
        messages_of(conversations=[turns[0], {**turns[1], field: value}])
    assert messages_of(conversations=[turns[0], {**turns[1], field: 1}]) == messages_of()


def test_turns_as_a_text_and_roles_in_capitals():
    turns = [{"from": "Human", "value": "<image>\nWhat?"}, {"from": "GPT ", "value": "A thing."}]
    assert messages_of(conversations=turns) == messages_of(conversations=json.dumps(turns)) == messages_of()
    with pytest.raises(ValueError):
        messages_of(conversations="[{")


def parts(*own):
    content = [{"type": "image", **({"image": each} if each else {})} for each in own] + [{"type": "text", "text": "?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]


def test_images_in_the_parts_and_beside_them():
    def names(**fields):
        return [image["path"] for image in parse(fields, "messages", FIELDS)[1]]

    assert names(messages=parts("a.jpg")) == names(messages=parts(None), images=["a.jpg"]) == ["a.jpg"]
    assert names(messages=parts("a.jpg", "b.jpg"), images=["a.jpg", "b.jpg"]) == ["a.jpg", "b.jpg"]
    with pytest.raises(InputError, match="both inside the messages and"):
        names(messages=parts("a.jpg"), images=["b.jpg"])
    assert names(messages=layouts.chat("Hi", "Yes."), images=[None]) == names(messages=layouts.chat("Hi", "Yes.")) == []
    with pytest.raises(InputError, match="neither a file name nor"):
        names(messages=layouts.chat("Hi", "Yes."), images=[None, "a.jpg"])


def test_several_captions_of_one_image(tmp_path):
    images(tmp_path, 1)
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "0.jpg", "caption": ["one", "two", "three"]}))
    examples = list(LlavaDataset(tmp_path))
    assert [example["messages"][1]["content"] for example in examples] == ["one", "two", "three"]
    assert [example["id"] for example in examples] == ["0.jpg#0", "0.jpg#1", "0.jpg#2"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "0.jpg", "caption": ["one", 2]}))
    assert "no 'caption' text" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_in_base64(tmp_path, kind):
    """Bare, as an address, and as the bytes of a table that became JSON."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    file = io.BytesIO()
    photo.save(file, kind)
    text = base64.b64encode(file.getvalue()).decode()
    address = f"data:image/{kind.lower()};base64,{text}"
    records = [record(0, image=text), record(1, image=address), record(2, image={"bytes": text, "path": None})]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    for example in LlavaDataset(tmp_path):
        assert np.array_equal(example["images"][0], Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    (tmp_path / "chat.json").write_text(json.dumps([record(0, image="data:image/png;base64,!!!" + "x" * 100_001)]))
    assert len(refusal(tmp_path)) < 1000


def test_a_placeholder_inside_an_answer():
    """Also where the count is right: nothing may be learned to be said there."""
    with pytest.raises(InputError, match="<image> inside an answer"):
        parse(record(0, question="What?", answer="This <image> thing."), "llava", FIELDS)


def test_a_name_that_begins_like_base64_is_a_name():
    name = "/9j/" + "A" * 60 + " of a cat.jpg"
    assert parse({**record(0), "image": name}, "llava", FIELDS)[1] == [{"bytes": None, "path": name}]


def test_a_caption_has_its_own_instruction():
    fields = caption_mapping(["instruction=question"])
    texts = [
        {"image": "a.jpg", "caption": "A cat."},
        {"image": "a.jpg", "caption": "Red.", "question": "Which colour?"},
    ]
    asked = [parse(each, "caption", fields)[0][0]["content"] for each in texts]
    assert asked == ["<image>\nquestion", "<image>\nWhich colour?"]
