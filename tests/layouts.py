"""Small data in the exact layouts in which the datasets of docs/data.md are published.

Every writer takes a folder and returns the conversations a reader must find there, as (messages, images), in order.
"""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ASK = "Describe this image in detail."


def image(seed):
    """JPEG bytes, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((50, 40)).save(file, "JPEG")
    return file.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def chat(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def llava_turns(messages, names=("human", "gpt")):
    roles = dict(zip(("user", "assistant"), names, strict=True)) | {"system": "system"}
    return [{"from": roles[message["role"]], "value": message["content"]} for message in messages]


def short(n):
    """Questions with <image> before or after the words, as in CC3M-595K."""
    return [
        (
            chat("<image>\nWhat is it?" if i % 2 else "Write a terse caption.\n<image>", f"thing number {i}"),
            [image(i)],
        )
        for i in range(n)
    ]


def cc3m(folder, n=12, unpacked=False):
    """LLaVA-CC3M-Pretrain-595K: chat.json, metadata.json, and images.zip, which unpacks flat."""
    expected = short(n)
    names = [f"GCC_train_{i:09}.jpg" for i in range(n)]
    records = [
        {"id": name[:-4], "image": name, "conversations": llava_turns(messages)}
        for name, (messages, _) in zip(names, expected, strict=True)
    ]
    write(folder / "chat.json", records)
    write(folder / "metadata.json", [{"id": n[:-4], "image": n, "caption": "a", "blip_caption": "b"} for n in names])
    if unpacked:
        for name, (_, images) in zip(names, expected, strict=True):
            write(folder / "images_dl" / name, images[0])
        return expected
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, (name, (_, images)) in enumerate(zip(names, expected, strict=True)):
            archive.writestr(name, images[0], zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
    return expected


def sharegpt4o(folder, n=12):
    """ShareGPT-4o: JSON Lines in a folder of its own, images where images.zip unpacks to, several turns."""
    expected = []
    records = []
    for i in range(n):
        messages = chat("<image>\nWhat is here?", f"A {i}.", "Sure?", "Yes, quite sure. 🐈")
        expected.append((messages, [image(100 + i)]))
        write(folder / "mnt/petrelfs/wangwenhai/workspace_cef/4o/image" / f"{i}.jpg", image(100 + i))
        records.append(
            {"id": i, "image": f"{i}.jpg", "width": 50, "height": 40, "conversations": llava_turns(messages)}
        )
    write(folder / "image_conversations/gpt-4o.jsonl", lines(records))
    return expected


def mix665k(folder, n=12):
    """llava_v1_5_mix665k: images in several folders, rows without one, keys that only some rows have."""
    places = ["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K"]
    records, expected = [], []
    for i in range(n):
        if i % 4 == 3:
            messages = chat(f"What is {i} and one?", f"It is {i + 1}.")
            records.append({"id": f"t{i}", "model": "", "conversations": llava_turns(messages)})
            expected.append((messages, []))
            continue
        messages = chat("<image>\nName it.", f"It is {i}.", "In one word?", "Number.")
        name = f"{places[i % 5]}/{i:012}.jpg"
        write(folder / name, image(200 + i))
        records.append({"id": f"{i:012}", "image": name, "conversations": llava_turns(messages)})
        expected.append((messages, [image(200 + i)]))
    write(folder / "llava_v1_5_mix665k.json", records)
    return expected


def sharegpt4v(folder, n=12):
    """ShareGPT4V: as LLaVA-Instruct, with images named by their dataset's folder; here with a role of others."""
    records, expected = [], []
    for i in range(n):
        messages = chat("<image>\nDescribe it.", f"Long words about {i}.", system="Be thorough." if i % 2 else None)
        write(folder / f"sam/images/sa_{i}.jpg", image(300 + i))
        turns = llava_turns(messages, ("user", "chatgpt"))
        records.append({"id": f"{i}", "image": f"sam/images/sa_{i}.jpg", "conversations": turns})
        expected.append((messages, [image(300 + i)]))
    write(folder / "sharegpt4v_instruct_gpt4-vision_cap100k.json", records)
    return expected


def textocr(folder, n=12):
    """TextOCR-GPT4o: captions only; the images come from TextOCR and lie beside them."""
    records, expected = [], []
    for i in range(n):
        text = f"DESCRIPTION A sign. TEXT number {i}"
        records.append({"image": f"{i:016x}.jpg", "image_width": 50, "image_height": 40, "caption": text})
        write(folder / f"train_images/{i:016x}.jpg", image(400 + i))
        expected.append((chat(f"<image>\n{ASK}", text), [image(400 + i)]))
    write(folder / "train.jsonl", lines(records))
    return expected


def textocr_gpt4v(folder, n=12):
    """textocr-gpt4v: several kinds of caption per image, used here with --caption_fields."""
    records, expected = [], []
    for i in range(n):
        kinds = {f"caption_{kind}": f"{kind} {i}" for kind in ("image", "text", "condensed")}
        records.append({"filename": f"{i:016x}.jpg", "caption": f"all {i}", **kinds})
        write(folder / f"images/{i:016x}.jpg", image(450 + i))
        expected.append((chat("<image>\nRead it.", f"condensed {i}"), [image(450 + i)]))
    write(folder / "textocr.jsonl", lines(records))
    return expected


def messages_jsonl(folder, n=12):
    """TRL, LLaMA-Factory: content as text or as parts; images as a list, a single one, or none."""
    records, expected = [], []
    for i in range(n):
        write(folder / f"images/{i}.jpg", image(500 + i))
        name, answer = f"images/{i}.jpg", {"role": "assistant", "content": f"Answer {i}."}
        if i % 4 == 0:  # parts, one of them an image
            parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
            records.append({"messages": [{"role": "user", "content": parts}, answer], "images": [name]})
            expected.append((chat("<image>\nWhat?", f"Answer {i}."), [image(500 + i)]))
        elif i % 4 == 1:  # text that says where the images stand, two of them
            question = "<image> and <image>: same?"
            names = [name, f"images/{i - 1}.jpg"]
            records.append({"messages": [{"role": "user", "content": question}, answer], "images": names})
            expected.append((chat(question, f"Answer {i}."), [image(500 + i), image(500 + i - 1)]))
        elif i % 4 == 2:  # a single image, text without placeholder
            records.append({"messages": [{"role": "user", "content": "What?"}, answer], "images": name})
            expected.append((chat("<image>\nWhat?", f"Answer {i}."), [image(500 + i)]))
        else:  # text only
            records.append({"messages": [{"role": "user", "content": "Why?"}, answer], "images": []})
            expected.append((chat("Why?", f"Answer {i}."), []))
    write(folder / "data.jsonl", lines(records))
    return expected


def messages_parquet(folder, n=12):
    """The same as the hub keeps it: parquet with the images inside, held-out split beside the training one."""
    rows, expected = [], []
    for i in range(n):
        parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
        answer = [{"type": "text", "text": f"Answer {i}."}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [{"bytes": image(600 + i), "path": None}]})
        expected.append((chat("<image>\nWhat?", f"Answer {i}."), [image(600 + i)]))
    (folder / "data").mkdir(parents=True)
    half = n // 2
    for k, part in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"data/train-0000{k}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "data/test-00000-of-00001.parquet")
    return expected


def cauldron(folder, n=12):
    """the_cauldron, FineVision: `images` and `texts` in parquet."""
    rows, expected = [], []
    for i in range(n):
        photos = [image(700 + i + k) for k in range(1 + i % 2)]
        texts = [{"user": f"Question {k}?", "assistant": f"Reply {i}.", "source": "VQAv2"} for k in range(1 + i % 3)]
        rows.append({"images": [{"bytes": data, "path": None} for data in photos], "texts": texts})
        words = [word for text in texts for word in (text["user"], text["assistant"])]
        expected.append((chat("<image>\n" * len(photos) + words[0], *words[1:]), photos))
    (folder / "vqav2").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "vqav2/train-00000-of-00001.parquet")
    return expected


def webdataset(folder, n=12):
    """WebDataset shards: images with a .json record or a .txt caption of the same name."""
    expected = []
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard * n // 2, (shard + 1) * n // 2):
                messages = chat("<image>\nWhat?", f"Reply {i}.")
                record = json.dumps({"id": f"{i:06}", "image": "x.jpg", "conversations": llava_turns(messages)})
                for kind, data in ((".jpg", image(800 + i)), (".json", record.encode())):
                    info = tarfile.TarInfo(f"{i:06}{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                expected.append((messages, [image(800 + i)]))
    return expected


def captions_tar(folder, n=12):
    """The simplest WebDataset: an image and its .txt."""
    expected = []
    folder.mkdir(parents=True)
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for i in range(n):
            for kind, data in ((".png", image(900 + i)), (".txt", f"caption {i}".encode())):
                info = tarfile.TarInfo(f"dir/{i:06}{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            expected.append((chat(f"<image>\n{ASK}", f"caption {i}"), [image(900 + i)]))
    return expected


CONDENSED = ["answer=caption_condensed", "image=filename", "instruction=Read it."]
LAYOUTS = {  # name -> (writer, format, caption fields)
    "cc3m": (cc3m, "llava", None),
    "sharegpt4o": (sharegpt4o, "llava", None),
    "mix665k": (mix665k, "llava", None),
    "sharegpt4v": (sharegpt4v, "llava", None),
    "textocr": (textocr, "caption", None),
    "textocr_gpt4v": (textocr_gpt4v, "caption", CONDENSED),
    "messages_jsonl": (messages_jsonl, "messages", None),
    "messages_parquet": (messages_parquet, "messages", None),
    "cauldron": (cauldron, "texts", None),
    "webdataset": (webdataset, "llava", None),
    "captions_tar": (captions_tar, "caption", None),
}


def make(name: str, folder: Path):
    """Writes a layout; returns what must be read and the flags that name it."""
    writer, _, fields = LAYOUTS[name]
    expected = writer(folder)
    return expected, ["--data_path", str(folder), *(["--caption_fields", *fields] if fields else [])]
