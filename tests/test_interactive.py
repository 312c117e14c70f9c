"""The interactive pages of the tutorial in a real browser. References: the package itself, PEFT, and numpy."""

import re
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, SiglipVisionConfig

from benchmarks.memory.estimate_check import PAIRS
from train_llava.model.backbones import load_tokenizer
from train_llava.model.config import compose_config
from train_llava.model.freeze import LoraSettings
from train_llava.model.structure import STRATEGIES, patches_per_image, positions_per_image
from train_llava.planning.memory import MemoryModel, ZeroConfig
from train_llava.planning.meta_model import meta_model
from train_llava.planning.roofline import GPUS
from train_llava.processing.chat import IGNORE_INDEX, ChatEncoder

FOLDER = ROOT / "tutorial" / "interactive"
PAGES = sorted(path.stem for path in FOLDER.glob("*.html"))
ENGLISH, CHINESE = re.compile(r"\b[a-z]{2,} [a-z]{2,} [a-z]{2,}"), re.compile("[\u3400-\u9fff]")
# all that a page shows or says to a screen reader
WORDS = """() => [document.title, document.body.innerText,
  ...[...document.querySelectorAll("[aria-label]")].map(each => each.ariaLabel)].join("\\n")"""
ENDS = """() => { for (const each of document.querySelectorAll("input[type=range]"))
  for (const end of [each.min, each.max]) { each.value = end; each.dispatchEvent(new Event("input")); } }"""


@contextmanager
def opened(browser, name, locale="en-US", width=1200, query=""):
    """A tab with the page; at its end the page must have asked for nothing, and not complained."""
    tab = browser.new_page(locale=locale, viewport={"width": width, "height": 900})
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.set_default_timeout(20_000)
    address = (FOLDER / f"{name}.html").as_uri() + query
    tab.goto(address)
    yield tab
    tab.close()
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert said == []


def number(tab, name):
    return float(re.sub(r"[^\d.]", "", tab.inner_text(f"#n-{name}")))


def test_there_are_four_pages_in_one_style():
    assert PAGES == ["lora", "patches", "tokens", "zero"]
    texts = [(FOLDER / f"{name}.html").read_text() for name in PAGES]
    styles = {text.partition("<style>")[2].partition("\n\n")[0] for text in texts}
    assert len(styles) == 1 and len(styles.pop().splitlines()) > 30
    assert all(len(text.splitlines()) <= 300 for text in texts)


@pytest.mark.parametrize("name", PAGES)
def test_both_languages_are_whole(browser, name):
    with opened(browser, name) as tab:
        texts = tab.evaluate("TEXTS")
        assert texts["en"].keys() == texts["zh"].keys()
        symbols = [text for text in texts["zh"].values() if not CHINESE.search(text)]
        assert max(len(re.sub(r"\{\w+\}|[^A-Za-z]", "", text)) for text in symbols) < 8 and all(texts["zh"].values())
        holes = {language: [re.findall(r"\{(\w+)\}", text) for text in texts[language].values()] for language in texts}
        assert [*map(sorted, holes["en"])] == [*map(sorted, holes["zh"])]
        keys = tab.evaluate("[...document.querySelectorAll('[data-t], [data-a]')].map(e => e.dataset.t ?? e.dataset.a)")
        assert keys and set(keys) <= texts["en"].keys()
        english, heading = tab.evaluate(WORDS), tab.inner_text("h1")
        assert CHINESE.findall(english) == ["中", "文"]  # the button
        tab.click("#language")
        chinese = tab.evaluate(WORDS).replace("python -m train_llava.estimate", "")
        assert ENGLISH.findall(chinese) == [] and tab.evaluate("document.documentElement.lang") == "zh-CN"
        assert CHINESE.search(tab.inner_text("h1")) and CHINESE.search(tab.title())
        tab.click("#language")
        assert tab.inner_text("h1") == heading and tab.evaluate(WORDS) == english


@pytest.mark.parametrize(
    ("locale", "query", "language"), [("zh-TW", "", "zh"), ("fr", "", "en"), ("zh-CN", "?lang=en", "en")]
)
def test_the_readers_language_comes_first(browser, locale, query, language):
    with opened(browser, "patches", locale=locale, query=query) as tab:
        assert tab.evaluate("language") == language


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize("name", PAGES)
def test_a_telephone_shows_it_whole(browser, name, locale):
    """Also with each slider at its ends."""
    with opened(browser, name, locale, width=360) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        tab.evaluate(ENDS)
        assert tab.evaluate("document.documentElement.scrollWidth") == 360


def test_patches_are_counted_as_the_towers_do(browser):
    towers = {"CLIP-L/224": (224, 14, True), "CLIP-L/336": (336, 14, True), "SigLIP/384": (384, 14, False)}
    with opened(browser, "patches") as tab:
        for name, (size, patch, cls) in {**towers, "The demo": (112, 28, True)}.items():
            tab.click(f"#presets >> text='{name}'")
            vision = (CLIPVisionConfig if cls else SiglipVisionConfig)(image_size=size, patch_size=patch)
            assert number(tab, "patches") == number(tab, "tokens") == patches_per_image(vision)
            assert number(tab, "positions") == positions_per_image(vision)
            assert tab.locator("#presets [aria-pressed=true]").inner_text() == name
            assert tab.inner_text("#left")[:4] == ("6 px" if size == 384 else "")
        tab.fill("#size", "200")
        tab.fill("#patch", "16")
        tab.set_checked("#cls", False)
        assert [number(tab, each) for each in ("patches", "each", "positions", "pairs")] == [144, 768, 144, 144**2]
        assert tab.inner_text("#left").startswith("8 px")
        with torch.device("meta"):
            kernel = nn.Conv2d(3, 1, 16, stride=16)  # a tower's first layer
            assert kernel(torch.empty(1, 3, 200, 200)).numel() == 144 and kernel.weight.numel() == 768


def test_a_patch_is_chosen_by_key_and_by_pointer(browser):
    with opened(browser, "patches") as tab:
        tab.focus("#picture")
        tab.hover("#picture", position={"x": 3, "y": 3})
        tab.keyboard.press("ArrowLeft")  # which the edge stops
        assert tab.inner_text("#chosen").startswith("Patch 1 of 576: row 1, column 1.")
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#chosen").startswith("Patch 26 of 576: row 2, column 2.")
        assert "position 26 " in tab.inner_text("#chosen")
        side = tab.locator("#picture").bounding_box()["width"]
        tab.hover("#picture", position={"x": side - 3, "y": side - 3})
        assert tab.inner_text("#chosen").startswith("Patch 576 of 576: row 24, column 24.")
        tab.set_checked("#cls", False)
        assert "position 575 " in tab.inner_text("#chosen")


@pytest.fixture(scope="module")
def encoder(qwen_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    qwen_tokenizer.save_pretrained(folder)
    return ChatEncoder(load_tokenizer(folder), 16)


def test_the_record_is_that_of_training(browser, encoder):
    question = {"role": "user", "content": "<image>\nWhat are these?"}
    ids, labels = encoder.encode([question, {"role": "assistant", "content": "Two cats."}])
    with opened(browser, "tokens") as tab:
        record = tab.evaluate("RECORD")
        assert [token["id"] for token in record] == ids and [token["label"] for token in record] == labels
        assert [token["text"] for token in record] == [encoder.tokenizer.decode([i]) for i in ids]
        assert number(tab, "tokens") == len(ids) and number(tab, "images") == 16
        assert number(tab, "taught") == len(ids) - labels.count(IGNORE_INDEX)
        written = tab.locator(".chip .label").all_inner_texts()
        assert [int(label.replace("\u2212", "-")) for label in written] == labels


def test_a_token_shows_what_it_has_to_do_with_the_others(browser, encoder):
    """The loss compares position i with label i + 1; a causal mask lets i see 0 to i."""
    mask = torch.ones(45, 45).tril()
    with opened(browser, "tokens") as tab:
        labels = [token["label"] for token in tab.evaluate("RECORD")]
        related = tab.evaluate("[...RECORD.keys()].map(relations)")
        assert [each["loss"] for each in related] == [label != IGNORE_INDEX for label in [*labels[1:], IGNORE_INDEX]]
        assert [each["attends"] for each in related] == [row.nonzero().flatten().tolist() for row in mask]
        assert [each["predicts"] for each in related] == [*range(1, 45), None]
        tab.hover(".chip >> nth=20")
        assert tab.locator(".chip.seen").count() == 21 and tab.locator(".chip.hidden").count() == 23
        assert tab.inner_text("#is-position").startswith("20,") and "patch 7 of 16" in tab.inner_text("#is-token")
        tab.focus(".chip >> nth=39")
        assert tab.inner_text("#is-predicts") == "position 40: Two" and "11613" in tab.inner_text("#is-loss")
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#is-id") == "11613" and "position 39" in tab.inner_text("#is-label")
        assert tab.evaluate("document.activeElement.matches('.chip.here')")
        tab.keyboard.press("End")
        assert "record ends" in tab.inner_text("#is-predicts") and tab.locator(".chip.seen").count() == 45


def in_peft(out, inputs, **settings):
    """Weights and scale of PEFT's own adapter for a layer."""
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(inputs, out, bias=False))
        model = get_peft_model(layer, LoraConfig(target_modules=["0"], **settings))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), model.get_base_model()[0].scaling["default"]


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_has_the_weights_that_peft_gives_it(browser, rslora):
    with opened(browser, "lora") as tab:
        start = [tab.inner_text("#rank-now"), tab.inner_text("#alpha-now")]
        assert start == [str(LoraSettings.lora_r), str(LoraSettings.lora_alpha)]
        tab.set_checked("#rslora", rslora)
        for button, (out, inputs) in enumerate([(128, 128), (2560, 2560), (6912, 2560)]):
            tab.click(f"#presets button >> nth={button}")
            for power, alpha in ((0, 16), (7, 8)):
                tab.fill("#rank", str(power))
                tab.fill("#alpha", str(int(np.log2(alpha))))
                adapter, scale = in_peft(out, inputs, r=2**power, lora_alpha=alpha, use_rslora=rslora)
                assert number(tab, "whole") == out * inputs and number(tab, "adapter") == adapter
                assert number(tab, "percent") == pytest.approx(100 * adapter / (out * inputs), rel=0.01)
                assert number(tab, "scale") == pytest.approx(scale, rel=0.01)


def test_the_product_has_the_rank_of_the_slider(browser):
    picture = "document.getElementById('{}').toDataURL()".format
    with opened(browser, "lora") as tab:
        for rank in (1, 2, 8, 32):
            cells = tab.evaluate(
                f"[...Array(64).keys()].map(i => [...Array(64).keys()].map(j => product(i, j, {rank})))"
            )
            assert np.linalg.matrix_rank(np.array(cells), tol=1e-6) == rank
        before = tab.evaluate(picture("ba"))
        tab.fill("#rank", "1")
        assert tab.evaluate(picture("ba")) != before and tab.evaluate(picture("merged")) != tab.evaluate(picture("w"))
        sizes = "['b', 'ba'].map(id => document.getElementById(id).getBoundingClientRect().width)"
        tab.fill("#rank", "8")
        thin, wide = tab.evaluate(sizes)
        assert thin / wide == pytest.approx(256 / 2560, rel=0.01)  # to scale
        tab.check("#start")
        assert tab.evaluate(picture("merged")) == tab.evaluate(picture("w"))


def test_zero_shares_out_as_the_estimate_does(browser):
    shares = [(stage, gpus) for stage in range(4) for gpus in (1, 2, 8, 64)]
    with opened(browser, "zero") as tab:
        models = tab.evaluate("MODELS")
        assert models["CLIP-L/336 + Qwen1.5-4B"]["none"][0] == 4_263_056_896  # docs/estimate.md
        kinds = [*product(models, [torch.bfloat16]), (next(iter(models)), torch.float32)]
        for (name, dtype), train in product(kinds, STRATEGIES):
            memory = MemoryModel.of(meta_model(compose_config(*PAIRS[name]), dtype, train))
            assert models[name][train] == [memory.all_weights, memory.trained]
            asked = [models[name][train], memory.element, shares]
            found = tab.evaluate(
                "([sizes, element, shares]) => shares.map(each => states(sizes, element, ...each))", asked
            )
            for share, parts in zip(shares, found, strict=True):
                zero = ZeroConfig(*share)
                expected = [zero.of_weights(memory.weights), memory.gradients(zero), memory.optimizer(zero)]
                assert [*parts.values()] == pytest.approx([*expected, memory.fp32_gradients(zero)]), (name, share)
                assert sum(parts.values()) == pytest.approx(memory.states_at_step(zero))


def test_the_bars_follow_the_choices(browser):
    """The figures of docs/estimate.md, with 8 GPUs; and what changes with one."""
    parts = ("weights", "gradients", "optimizer", "copy")
    with opened(browser, "zero") as tab:
        assert tab.evaluate("Object.values(CARDS)") == sorted({gpu.memory for gpu in GPUS.values()})
        assert [tab.inner_text(f"#s0-{part}") for part in parts] == ["7.94", "7.38", "44.25", "14.75"]
        assert [tab.inner_text(f"#s3-{part}") for part in parts] == ["0.99", "0.92", "5.53", "1.84"]
        tab.fill("#gpus", "1")
        assert [tab.inner_text(f"#s3-{part}") for part in parts] == ["7.94", "7.38", "44.25", "14.75"]
        tab.click("text='fp32'")
        assert [tab.inner_text(f"#s0-{part}") for part in parts] == ["15.88", "14.75", "29.50", "0.00"]
        assert tab.locator(".stage.over").count() == 3  # ZeRO-0 makes no copies
        tab.click("text='use_lora'")
        tab.click("text='bf16'")
        assert tab.locator(".stage.over").count() == 0 and number(tab, "trained") == 35_394_560
        tab.focus("#gpus")
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#gpus-now") == "2" and "2 \u00d7 " in tab.inner_text("#facts")
