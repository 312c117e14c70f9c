"""Search in Chinese, which writes no spaces between words.

Each two neighbouring characters are a term, of the pages and of what is asked: all words of two characters and more are
found, those of this field, too, which no list of words has.
"""

import re

from sphinx.search.en import SearchEnglish

CHINESE = re.compile(r"[\u4e00-\u9fff]+")
WORD = re.compile(r"\w+")
SPLITTER = r"""
var splitQuery = (query) =>
  (query.match(/[\u4e00-\u9fff]+|(?:(?![\u4e00-\u9fff])[\p{L}\p{N}_])+/gu) ?? []).flatMap((word) =>
    /[\u4e00-\u9fff]/.test(word) && word.length > 1
      ? [...word.slice(1)].map((_, i) => word.slice(i, i + 2))
      : [word]);
"""


class SearchPairs(SearchEnglish):
    """Chinese in pairs of characters; what is English among it as in English."""

    lang = "zh"
    js_splitter_code = SPLITTER

    def split(self, input: str) -> list[str]:
        runs = CHINESE.findall(input)
        pairs = [run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))]
        return pairs + WORD.findall(CHINESE.sub(" ", input))
