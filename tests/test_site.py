"""The site: every page is in it, in both languages; it needs no other host, and its links and its search work."""

import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from browsers import launched
from conftest import ROOT, run
from pages import text_of

from tutorial import build

sys.path.append(str(ROOT / "site"))  # a folder without a package: Python has a module of that name
import links
import stage

LANGUAGES = stage.LANGUAGES
TOOLS = ("sphinx", "furo", "myst_nb")  # site/requirements.txt


def contents(text):
    """What the tables of contents of a page name."""
    trees = re.findall(r"```{toctree}\n(.*?)```", text, re.S)
    lines = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    return [re.sub(r".*<(.*)>", r"\1", line) for line in lines]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_page_is_in_a_table_of_contents(language, tmp_path):
    stage.stage(language, tmp_path / "new")
    there = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*.[mi][dp]*")}
    named = contents((tmp_path / "new" / "index.md").read_text())
    assert sorted([*named, "index"]) == sorted(map(stage.without_ending, there))
    assert len([name for name in named if name.startswith("docs/")]) > 3


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_page_of_the_repository_is_on_the_site(language):
    own = {path for path in (ROOT / "docs").glob("*.md") if path.stem.endswith("_zh") == (language == "zh")}
    own |= {build.notebook_path(lesson, language) for lesson in build.lessons()}
    assert own <= set(stage.pages(language).values())


def test_lessons_stand_in_their_order():
    assert {name: lesson for lesson, name in build.PLACES.items()} == stage.LESSONS
    names = [f"lessons/{build.PLACES.get(lesson, lesson)}" for lesson in build.lessons()]
    found = stage.lessons_first_to_last([f"{name}.ipynb" for name in reversed(names)])
    assert found == names


def test_both_front_pages_lead_to_the_same_pages():
    fronts = [(ROOT / "site" / language / "index.md").read_text() for language in LANGUAGES]
    found = [[re.sub(r"_zh\b", "", link) for link in re.findall(r"\]\(([^)#]+)", text)] for text in fronts]
    assert found[0] == found[1] and len(found[0]) > 3
    apis = [re.findall(r"automodule:: (.*)", text_of(f"site/{language}/api.md")) for language in LANGUAGES]
    assert apis[0] == apis[1] and len(apis[0]) > 5


def link(target, language="en", name="docs/data", file="docs/data.md", repository="", mark=""):
    return links.Page(language, name, ROOT / file, repository).link(mark, "x", target)


def test_links_of_the_repository_become_links_of_the_site():
    assert link("training.md#recipes") == "[x](training.md#recipes)"
    assert link("../README.md#start") == "[x](../readme.md#start)"
    assert link("../code05_infer.ipynb") == "[x](../lessons/code05_infer.ipynb)"
    assert link("training_zh.md", "zh", file="docs/data_zh.md") == "[x](training.md)"
    assert link("training.md#recipes", "zh", file="docs/data_zh.md") == "[x](training.md)"
    assert link("../../code05_infer.ipynb", "zh", "lessons/a", "tutorial/zh/a.ipynb") in (
        "[x](code05_infer.ipynb)",
        "<a href='../../en/lessons/code05_infer.html'>x</a>",  # while there is none in Chinese
    )
    assert link("docs/llava.svg", name="lessons/a", file="code03_build_model_show.ipynb", mark="!") == (
        "![x](../docs/llava.svg)"
    )
    for other in ("https://a.example/b", "#here", "gone.md"):
        assert link(other) == f"[x]({other})"


def test_files_that_are_no_pages_are_shown_in_the_repository():
    assert link("../run_zero2.sh") == link("../recipes") == "x"
    known = {"repository": "https://host.example/one/two"}
    assert link("../run_zero2.sh#L3", **known) == "[x](https://host.example/one/two/blob/main/run_zero2.sh#L3)"
    assert link("../recipes", **known) == "[x](https://host.example/one/two/tree/main/recipes)"


def test_a_folder_that_is_no_site_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("mine")
    done = run("bash", "site/build.sh", tmp_path / "mine")
    assert done.returncode == 2 and "no site was built in it" in done.stderr
    assert (tmp_path / "mine" / "work.txt").exists()


def test_the_workflow_builds_what_it_publishes():
    jobs = yaml.safe_load(text_of(".github/workflows/site.yml"))["jobs"]
    steps = jobs["build"]["steps"]
    (built,) = [step["run"].split()[-1] for step in steps if "site/build.sh" in step.get("run", "")]
    (sent,) = [step["with"]["path"] for step in steps if "upload-pages-artifact" in step.get("uses", "")]
    assert built == sent and jobs["publish"]["needs"] == "build"


class Parts(html.parser.HTMLParser):
    """What a page loads, where it leads to, its anchors and its text outside of code."""

    def __init__(self, page):
        super().__init__()
        self.loaded, self.targets, self.anchors, self.text, self.inside, self.switch = [], [], set(), "", 0, None
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")}
        self.inside += tag in ("pre", "code", "script", "style")
        if tag == "a" and values.get("href"):
            self.targets.append(values["href"])
            self.switch = values["href"] if "hreflang" in values else self.switch
        elif tag == "link" and values.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loaded.append(values["href"])
        else:
            self.loaded += [values[name] for name in ("src", "srcset", "poster", "data") if values.get(name)]

    def handle_endtag(self, tag):
        self.inside -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        self.text += "" if self.inside else data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site, and the parts of its pages; a warning of Sphinx's would have ended the build."""
    for tool in TOOLS:
        pytest.importorskip(tool, reason="pip install -r site/requirements.txt")
    output = tmp_path_factory.mktemp("site") / "site"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", "site/build.sh", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, {path: Parts(path) for path in sorted(output.rglob("*.html"))}


@pytest.mark.slow
def test_no_page_asks_another_host(site):
    output, pages = site
    for path, parts in pages.items():
        assert not [name for name in parts.loaded if re.match(r"(\w+:)?//", name)], path
    for path in output.rglob("*.css"):
        assert not re.search(r"""(@import|url\()\s*["']?(\w+:)?//""", path.read_text()), path


@pytest.mark.slow
def test_every_link_leads_somewhere(site):
    output, pages = site
    for path, parts in pages.items():
        for target in [*parts.targets, *parts.loaded]:
            if re.match(r"(\w+:|//)", target):
                continue
            name, _, anchor = target.partition("#")
            other = Path(os.path.normpath(path.parent / unquote(name).partition("?")[0])) if name else path
            assert other.is_file() and output in other.parents, f"{path}: {target}"
            assert not anchor or other.suffix != ".html" or unquote(anchor) in pages[other].anchors, f"{path}: {target}"


@pytest.mark.slow
def test_a_page_leads_to_its_twin(site):
    output, pages = site
    for language, other in (LANGUAGES, LANGUAGES[::-1]):
        for path in (output / language).rglob("*.html"):
            twin = output / other / path.relative_to(output / language)
            front = output / other / "index.html"
            assert (path.parent / pages[path].switch).resolve() == (twin if twin.exists() else front)
    for lesson in build.lessons():
        name = f"lessons/{build.PLACES.get(lesson, lesson)}.html"
        assert all((output / language / name).exists() for language in LANGUAGES)


@pytest.mark.slow
def test_the_search_knows_words_of_both_languages(site):
    output, _ = site
    for language, words in (("en", {"projector"}), ("zh", {"投影", "影层", "视觉", "projector"})):
        index = (output / language / "searchindex.js").read_text()
        assert words <= set(json.loads(index[index.index("(") + 1 : index.rindex(")")])["terms"])
    assert "splitQuery" in (output / "zh" / "_static" / "language_data.js").read_text()


@pytest.mark.slow
def test_a_browser_finds_words_and_asks_nobody(site):
    asked = []
    with launched() as browser:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        for language, word in (("zh", "投影层"), ("zh", "LLaVA模型"), ("en", "projector")):
            page.goto(f"{(site[0] / language / 'search.html').as_uri()}?q={word}")
            page.wait_for_selector("ul.search li a")
        page.goto((site[0] / "zh" / "lessons" / "01_image.html").as_uri())
    assert asked and not [url for url in asked if not url.startswith(("file:", "data:"))]


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_are_readable(site, width, scheme):
    """No page is wider than its window (tables and code scroll inside it), and letters stand out from what is below."""
    with launched() as browser:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        for name in ("lessons/10_diagnosis", "docs/training", "docs/models", "readme"):
            for language in LANGUAGES:
                page.goto((site[0] / language / f"{name}.html").as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") <= width, name
                colours = page.evaluate(
                    "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
                )
                ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
                assert (ink - paper if scheme == "dark" else paper - ink) > 120, (name, colours)


@pytest.mark.slow
def test_texts_are_marked_up(site):
    """Bold whose last character is a Chinese colon is no bold; two lines of a --flag are not one."""
    for path, parts in site[1].items():
        assert not re.search(r"\*\*(?!\w+[,)])|\]\(", parts.text), path
        assert not re.search(r"[\u2013\u2014]\w+_\w+", parts.text), path


@pytest.mark.slow
def test_figures_say_what_they_show(site):
    page = (site[0] / "en" / "lessons" / "01_image.html").read_text()
    assert 'alt="The photo cropped, and padded"' in page and 'alt="../' not in page
