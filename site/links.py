"""Links of the repository's pages -> links of the site.

A page links to files beside it in the repository. On the site, those that are pages have other names; the others are
links to the repository, or plain text where its address is not known.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage import INTERACTIVE, LANGUAGES, ROOT, pages, without_ending

LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")
# the line below a title that leads to the other language: the site has a switch for that
OTHER_LANGUAGE = re.compile(r"^(English \| \[中文\]|\[English\])\(.*\n", re.M)


@dataclass(frozen=True)
class Page:
    """A page that links: its language, its name on the site, its file; and where the repository can be seen."""

    language: str
    name: str
    file: Path
    repository: str

    def link(self, mark: str, text: str, target: str) -> str:
        """What takes the place of a link, or behind a mark of an image."""
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(self.file.parent / path))
        if not path or ":" in path or not file.exists():
            return f"{mark}[{text}]({target})"
        if mark:  # an image has the place that it has in the repository
            return f"![{text}]({self.way_to(file.relative_to(ROOT))})"
        anchor = f"#{anchor}" if anchor else ""
        return self.link_to_page(text, file, anchor) or self.link_to_file(text, file, anchor)

    def link_to_page(self, text: str, file: Path, anchor: str) -> str | None:
        """Of another language, the same page in this one, whose headings have other names; itself if there is none."""
        own = pages(self.language)
        for language in sorted(LANGUAGES, key=self.language.__ne__):
            name = next((name for name, path in pages(language).items() if path == file), None)
            if name in own:
                return f"[{text}]({self.way_to(name)}{anchor * (language == self.language)})"
            if name:
                return self.outside(text, f"{language}/{without_ending(name)}.html{anchor}")
        return None

    def link_to_file(self, text: str, file: Path, anchor: str) -> str:
        if file.parent == INTERACTIVE:
            return self.outside(text, f"interactive/{file.name}?lang={self.language}")
        kind = "tree" if file.is_dir() else "blob"
        address = f"{self.repository}/{kind}/main/{file.relative_to(ROOT)}{anchor}"
        return f"[{text}]({address})" if self.repository else text

    def way_to(self, name: str | Path) -> str:
        return os.path.relpath(name, Path(self.name).parent)

    def outside(self, text: str, name: str) -> str:
        """A link to a file beside the language's own folder, which Sphinx does not know."""
        return f"<a href='{self.way_to(Path('..') / name)}'>{text}</a>"


def rewrite(app: Any, docname: str, source: list[str]) -> None:
    """Called by Sphinx with the text of each page; a notebook's is JSON."""
    language = app.config.language[:2]
    file = next(path for name, path in pages(language).items() if without_ending(name) == docname)
    page = Page(language, docname, file, app.config.repository)
    text = OTHER_LANGUAGE.sub("", source[0], count=1)
    source[0] = LINK.sub(lambda link: page.link(*link.groups()), text)
