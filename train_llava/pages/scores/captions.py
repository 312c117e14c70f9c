"""The metrics of image captioning as COCO computes them, of answers in sentences.

They need the package pycocoevalcap: 100 MB, mostly Java, which is not used; so it is not among the requirements.

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


def caption_metrics(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics of all answers together, each with one or more references, and those of each; nothing at all without
    pycocoevalcap.

    bleu_1, bleu_4: precision of up to 1 or 4 words, 0 to 1 (Papineni et al., 2002); of the corpus, not a mean.
    rouge_l: longest common subsequence, 0 to 1 (Lin, 2004).
    cider: CIDEr-D, 0 to 10; rare words have a higher weight (TF-IDF), so one record alone has 0 (arXiv:1411.5726).
    """
    if find_spec("pycocoevalcap") is None:
        return {}, {}
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses = {i: [words(text)] for i, text in enumerate(answers)}
    truths = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    rouge, each_rouge = Rouge().compute_score(truths, hypotheses)
    cider, each_cider = Cider().compute_score(truths, hypotheses)
    metrics = {"bleu_1": bleu[0], "bleu_4": bleu[3], "rouge_l": float(rouge), "cider": float(cider)}
    return metrics, {"rouge_l": each_rouge.tolist(), "cider": each_cider.tolist()}
