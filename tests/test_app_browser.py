"""The web page in a real browser. Reference: infer.generate, asked alone."""

import pytest
from conftest import TOKENS

from train_llava.model.generate import generate
from train_llava.processing.images import open_image

# how long the answer is, each time that the page changes
WATCH = """() => {
  window.seen = [];
  const watch = () => seen.push(document.querySelector(".assistant .text")?.textContent.length);
  new MutationObserver(watch).observe(document.querySelector("#chat"), {childList: true, subtree: true});
}"""


def opened(browser, url, tokens):
    tab = browser.new_page()
    tab.set_default_timeout(20_000)
    tab.goto(url)
    tab.evaluate("n => document.querySelector('[name=max_new_tokens]').value = n", tokens)
    return tab


def ask_in(tab, text, *images):
    tab.set_input_files("#files", [str(path) for path in images])
    tab.wait_for_function("n => chosen.length === n", arg=len(images))
    tab.fill("#question", text)
    tab.click("#go")


def answer_in(tab):
    return whole_answer_in(tab).strip()


def whole_answer_in(tab):
    """With the blanks around it, which later turns have, too."""
    tab.wait_for_selector("#go:visible")
    return tab.locator(".assistant .text").last.evaluate("element => element.textContent")


def test_a_browser_shows_the_answer_as_it_comes(browser, page, alone, files):
    tab = opened(browser, page[0], TOKENS)
    asked_for = []
    tab.on("request", lambda request: asked_for.append(request.url))
    tab.evaluate(WATCH)
    ask_in(tab, "What are these?", *files[:2])
    assert answer_in(tab) == alone("What are these?", *files[:2])
    assert len(set(tab.evaluate("seen"))) > 10
    assert all(url.startswith((page[0], "blob:", "data:")) for url in asked_for)
    tab.click("#fresh")
    tab.click("#examples button")
    tab.wait_for_function("chosen.length === 1")
    tab.fill("#question", "What?")
    tab.press("#question", "Enter")
    assert answer_in(tab) == alone("What?", files[0])
    tab.close()


WORDS = {
    "en": ["What", "Really", "And", "Which colour", "How many", "Why", "More", "Yes", "No", "Bye"],
    "zh": ["这是什么", "真的吗", "然后呢", "什么颜色", "几个", "为什么", "还有", "对", "不对", "再见"],
}


@pytest.mark.parametrize("language", WORDS)
def test_a_chat_of_ten_turns(browser, page, loaded, files, language):
    """Each answer is the one to all that was said before; a second image comes in the middle."""
    tab, messages, images = opened(browser, page[0], 16), [], []
    for i, words in enumerate(WORDS[language]):
        new = {0: files[:1], 5: files[1:2]}.get(i, [])
        ask_in(tab, words, *new)
        images += map(open_image, new)
        messages.append({"role": "user", "content": "<image>\n" * len(new) + words})
        said = whole_answer_in(tab)
        example = {"messages": messages, "images": images}
        assert said.strip() == generate(*loaded, [example], max_new_tokens=16)[0], words
        messages.append({"role": "assistant", "content": said})
    assert tab.locator(".turn").count() == 20 and len({m["content"] for m in messages}) > 12
    tab.close()


def test_a_browser_says_what_is_wrong_with_a_file(browser, page, files, tmp_path):
    (tmp_path / "notes.png").write_text("hello")
    tab = opened(browser, page[0], 16)
    tab.set_input_files("#files", [str(tmp_path / "notes.png"), str(files[0])])
    tab.wait_for_function("chosen.length === 1")
    assert "notes.png: not a readable image" in tab.inner_text("#error")
    tab.fill("#question", "word " * 600)
    tab.click("#go")
    tab.wait_for_selector("#error:has-text('positions')")
    assert tab.input_value("#question").startswith("word word") and tab.locator(".turn").count() == 0
    tab.close()


def test_a_browser_can_stop_an_answer(browser, page, alone, files):
    tab = opened(browser, page[0], 400)
    ask_in(tab, "What?", files[0])
    begun = "document.querySelector('.assistant:not(.waiting) .text')?.textContent.length > 5"
    tab.wait_for_function(f"{begun} && (at('stop').click(), true)")  # at once: the answer takes a second only
    said, whole = answer_in(tab), alone("What?", files[0], max_new_tokens=400)
    assert tab.locator(".stopped").count() == 1 and whole.startswith(said) and len(said) < len(whole)
    tab.close()


def test_two_tabs_do_not_mix(browser, page, alone, files):
    tabs = [opened(browser, page[0], TOKENS) for _ in range(2)]
    for tab, file in zip(tabs, files, strict=False):
        ask_in(tab, "What?", file)
    said = [answer_in(tab) for tab in tabs]
    assert said == [alone("What?", file) for file in files[:2]] and said[0] != said[1]
    assert [tab.locator(".turn").count() for tab in tabs] == [2, 2]
    for tab in tabs:
        tab.close()
