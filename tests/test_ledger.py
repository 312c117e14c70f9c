"""How often each record is seen, and with which image: counted in what reached the model, against docs/data.md."""

import hashlib
import json
import math
import os
import signal
import sys
from collections import Counter, defaultdict
from pathlib import Path

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run
from PIL import Image
from transformers import AutoProcessor

EPOCHS = 3


def photo(seed):
    """A JPEG unlike all others, also after it was resized."""
    noise = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    path = Path(os.environ["LEDGER"]) / f"{seed}.jpg"
    if not path.is_file():
        Image.fromarray(noise).resize((60, 45)).save(path, quality=95)
    return path.read_bytes()


def conversation(name):
    return [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": f"Thing {name}, " + "really " * (sum(map(ord, name)) % 5)},
    ]


def loose(folder, name, count):
    """Records with an image each in a folder, and one of text alone; of different lengths."""
    records = []
    for i in range(count):
        record = {"id": f"{name}{i}", "messages": conversation(f"{name}{i}")}
        if i != 3:
            layouts.write(folder / "images" / f"{name}{i}.jpg", photo(1000 * ord(name) + i))
            record["images"] = [f"{name}{i}.jpg"]
        records.append(record)
    layouts.write(folder / "data.jsonl", layouts.lines(records))
    return str(folder)


def parquet(folder, name, sizes):
    """Shards of so many records with their images inside, in row groups of four; the last is short, as always."""
    folder.mkdir()
    numbers = iter(range(1000))
    for shard, size in enumerate(sizes):
        rows = []
        for i in (next(numbers) for _ in range(size)):
            image = {"bytes": photo(1000 * ord(name) + i), "path": None}
            rows.append({"id": f"{name}{i}", "messages": conversation(f"{name}{i}"), "images": [image]})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{shard:05}.parquet", row_group_size=4)
    return str(folder)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Kind of data -> flags, and how often each source's records are seen in an epoch."""
    folder = tmp_path_factory.mktemp("ledger")
    os.environ["LEDGER"] = str(tmp_path_factory.mktemp("photos"))
    a, b, p = loose(folder / "a", "a", 21), loose(folder / "b", "b", 10), parquet(folder / "p", "p", [13, 9, 3])
    one = parquet(folder / "q", "q", [11])
    return {
        "map": (["--data_path", a], {"a": (21, 1)}),
        "mixture": (["--data_path", f"{a}:0.5", f"{b}:2.5"], {"a": (21, 0.5), "b": (10, 2.5)}),
        "packing": (["--data_path", a, "--packing", "true"], {"a": (21, 1)}),
        "streaming": (["--data_path", p, f"{one}:2", "--streaming", "true"], {"p": (25, 1), "q": (11, 2)}),
    }


@pytest.fixture(scope="module")
def pixels(llava, kinds):
    """Digest of an image's pixels as plain transformers' processor sees it -> the record it belongs to."""
    processor, known = AutoProcessor.from_pretrained(llava).image_processor, {}
    for path in Path(os.environ["LEDGER"]).iterdir():
        image = Image.open(path).convert("RGB")
        array = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        digest = hashlib.sha1(np.ascontiguousarray(array.transpose(1, 2, 0)).astype(np.uint8).tobytes()).hexdigest()
        known[digest] = f"{chr(int(path.stem) // 1000)}{int(path.stem) % 1000}"
    assert len(known) == 21 - 1 + 10 - 1 + 25 + 11
    return known


def spec(llava, data, output, ranks=1, workers=0, size=2, accumulation=1, kill=None, **flags):
    words = ["--model_name_or_path", llava, *data, "--output_dir", output, "--use_cpu", "true", "--seed", 5]
    words += ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation]
    words += ["--dataloader_num_workers", workers, "--num_train_epochs", EPOCHS, "--logging_steps", 1]
    words += ["--save_strategy", "steps", "--save_steps", 2, "--report_to", "none"]
    words += [] if "--train_type" in data else ["--train_type", "projector"]
    words += [word for name, value in flags.items() for word in (f"--{name}", value)]
    ledger = f"{output}.ledger{'-killed' * bool(kill)}"
    return {"flags": [*map(str, words)], "ranks": ranks, "ledger": ledger, "kill": kill}


def read(one):
    codes = json.loads(Path(f"{one['ledger']}.codes").read_text())
    files = [Path(f"{one['ledger']}.{rank}") for rank in range(one["ranks"])]
    lines = [[json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else [] for file in files]
    return codes, lines


def samples(ranks, pixels):
    """Step -> ids of the records in it, all ranks; each with its own image and its own labels."""
    steps = defaultdict(list)
    for lines in ranks:
        for line in lines:
            text = "".join(conversation(name)[1]["content"] + "<|im_end|>" for name in line["ids"])
            assert line["labels"] == text
            shown = [name for name in line["ids"] if name not in ("a3", "b3")]
            if shown:
                assert [pixels[image] for image in line["images"]] == shown
            else:
                assert len(line["images"]) == 1 and line["images"][0] not in pixels  # the grey one
            steps[line["step"]] += line["ids"]
    return {step: sorted(ids) for step, ids in sorted(steps.items())}


def as_promised(steps, sources, batch):
    """Every epoch has each record `weight` times, the fraction of a time drawn; whole steps but for the last one."""
    length = sum(round(size * weight) for size, weight in sources.values())
    each = math.ceil(length / batch)
    assert len(steps) == EPOCHS * each
    epochs = [Counter(name for step in range(e * each, (e + 1) * each) for name in steps[step + 1]) for e in range(3)]
    assert [len(ids) for ids in list(steps.values())[: each - 1]] == [batch] * (each - 1)
    for seen in epochs:
        for name, (size, weight) in sources.items():
            counts = [seen[f"{name}{i}"] for i in range(size)]
            assert sum(counts) == round(size * weight)
            assert set(counts) <= {math.floor(weight), math.ceil(weight)}
    assert steps[1] != steps[1 + each] != steps[1 + 2 * each]  # another order each time
    return epochs


KINDS = {"map": "none", "mixture": "use_lora", "packing": "freeze_vision", "streaming": "projector"}
SLOW = ("map", "packing")  # a mixture is read as a map, too
# ranks, workers, samples per micro-batch, micro-batches
LAYOUTS = [(1, 0, 4, 1), (1, 1, 2, 2), (1, 3, 4, 1), (2, 0, 2, 1), (2, 2, 1, 2), (2, 3, 3, 2)]
RESUMED = [((2, 1, 2, 1), (2, 0, 2, 1)), ((1, 2, 4, 1), (2, 3, 1, 2))]  # before and after


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS]
)
def runs(request, llava, kinds, tmp_path_factory):
    """Of a kind: its name, all runs without and with a kill, and what was said."""
    kind = request.param
    folder, data = tmp_path_factory.mktemp(kind), kinds[kind][0]
    often = [spec(llava, data, folder / str(i), *way, save_steps=100) for i, way in enumerate(LAYOUTS)]
    # with captions and evaluations on the way
    data = [*data, "--train_type", KINDS[kind], "--sample_steps", 3, "--eval_data_path", kinds["map"][0][1]]
    data += ["--eval_strategy", "steps", "--eval_steps", 3]
    killed = [
        [
            spec(llava, data, folder / f"killed{i}", *before, kill=9),
            spec(llava, data, folder / f"killed{i}", *after, resume_from_checkpoint="true"),
        ]
        for i, (before, after) in enumerate(RESUMED)
    ]
    (folder / "runs.json").write_text(json.dumps([*([one] for one in often), *killed]))
    command = (sys.executable, ROOT / "tests" / "ledger.py", folder / "runs.json")
    return kind, often, killed, run(*command, OMP_NUM_THREADS="1").stderr


def test_each_record_as_often_as_promised(runs, kinds, pixels):
    """One and two ranks, none to three workers, with and without accumulation; one order for all with as many samples
    in a step."""
    kind, often, _, log = runs
    orders = []
    for one, (ranks, _, size, accumulation) in zip(often, LAYOUTS, strict=True):
        codes, lines = read(one)
        assert codes == [0] * ranks, log[-3000:]
        orders.append(samples(lines, pixels))
        as_promised(orders[-1], kinds[kind][1], ranks * size * accumulation)
    assert all(order == orders[0] for order in orders[:-1])


def test_the_same_with_a_kill_in_the_middle(runs, pixels):
    """Killed in the second epoch, then resumed with other workers, other micro-batches and another number of ranks."""
    _, often, killed, log = runs
    expected = samples(read(often[0])[1], pixels)
    for before, after in killed:
        (codes, lines), (codes_after, lines_after) = read(before), read(after)
        assert codes[-1] == -signal.SIGKILL and set(codes_after) == {0}, log[-3000:]
        seen = samples(lines, pixels)
        assert {step: seen[step] for step in range(1, 9)} == {step: expected[step] for step in range(1, 9)}
        assert samples(lines_after, pixels) == {step: ids for step, ids in expected.items() if step > 8}
