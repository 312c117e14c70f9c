"""How near answers are to their references: exact match, and the metrics of image captioning as COCO computes them.

The latter need the package pycocoevalcap: 100 MB, mostly Java, which is not used; so it is not among the requirements.
To add a metric, put its value into `metrics` in `caption_metrics`, before the return if it needs no package; and into
`each` a value for every answer, if it has one. `pages/evaluate.html.jinja` shows some of these.

Words are runs of letters with their marks (vowel signs, accents) and digits, in lower case and Unicode's form NFC; each
Chinese or Japanese character is one. COCO's own tokenizer is a Java program, which differs at apostrophes and hyphens
(arXiv:1504.00325, section 3.1).
"""

import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec

import regex

CHARACTER = "\u3040-\u30ff\u3400-\u9fff"
WORD = regex.compile(rf"[{CHARACTER}]|(?:(?![{CHARACTER}])[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d])+")


def words(text: str) -> str:
    """The words of a text, with blanks between them."""
    return " ".join(WORD.findall(unicodedata.normalize("NFC", text).lower()))


def caption_metrics(answers: Sequence[str], references: Sequence[str]) -> tuple[dict[str, float], dict[str, list]]:
    """Metrics of all answers together, and those of each; without pycocoevalcap exact match alone.

    exact_match: the share of answers equal to their reference, blanks at the ends aside.
    bleu_1, bleu_4: precision of up to 1 or 4 words, 0 to 1 (Papineni et al., 2002); of the corpus, not a mean.
    rouge_l: longest common subsequence, 0 to 1 (Lin, 2004).
    cider: CIDEr-D, 0 to 10; rare words have a higher weight (TF-IDF), so one record alone has 0 (arXiv:1411.5726).
    """
    exact = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    metrics: dict[str, float] = {"exact_match": sum(exact) / len(exact)}
    each: dict[str, list] = {"exact": exact}
    if find_spec("pycocoevalcap") is None:
        return metrics, each
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses, truths = ({i: [words(text)] for i, text in enumerate(texts)} for texts in (answers, references))
    bleu, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    rouge, each_rouge = Rouge().compute_score(truths, hypotheses)
    cider, each_cider = Cider().compute_score(truths, hypotheses)
    metrics |= {"bleu_1": bleu[0], "bleu_4": bleu[3], "rouge_l": float(rouge), "cider": float(cider)}
    return metrics, each | {"rouge_l": each_rouge.tolist(), "cider": each_cider.tolist()}
