"""Scores of short answers against figures that official evaluators print, scikit-learn, and values by hand."""

import random

import pytest
from sklearn.metrics import precision_recall_fscore_support

from train_llava.pages.scores.scoring import NAMES, problem, score, score_each
from train_llava.pages.scores.short_answers import accuracy, anls, choice_accuracy, edit_distance, relaxed_accuracy
from train_llava.pages.scores.vqa import normalise, vqa_accuracy
from train_llava.pages.scores.yes_no import says_yes, yes_no_figures

# What the processor of EvalAI, as MMF and LLaVA have it (m4c_evaluator.py), makes of these texts
OFFICIAL = {
    "The Cat.": "cat",
    "two dogs": "2 dogs",
    "none": "0",
    "2.5": "2.5",
    "U.S.": "us",
    "1,000": "1000",
    "hi-fi": "hi fi",
    "hi - fi": "hi fi",
    "[stop] sign": "stop sign",
    "a/b": "b",
    "a / b": "b",
    "x-ray - film": "xray film",
    "dont": "don't",
    "couldnt've": "couldn't've",
    "yall'll": "y'all'll",
    "somebody'd": "somebodyd",
    "he's": "he 's",
    "its": "its",
    " yes\n": "yes",
    "what?": "what",
    "well done!": "well done",
}


@pytest.mark.parametrize("text", OFFICIAL)
def test_normalise_as_the_official_processor(text):
    assert normalise(text) == OFFICIAL[text]


def test_the_vote():
    """VQA's page: an answer that three other people gave is right; fewer count a third each (visualqa.org/evaluation).

    Left out in turn, of 2 people who agree, each leaves 1 to the other; the other 8 leave 2.
    """
    people = ["two", "2."] + ["three"] * 3 + ["yes"] * 5
    assert vqa_accuracy("Yes", people) == 1
    assert vqa_accuracy("2", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("the three", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)  # 0.9
    assert vqa_accuracy("four", people) == 0 and vqa_accuracy("a", ["a", *people[1:]]) == pytest.approx(0.9 / 3)


def test_figures_of_pix2struct():
    """Its metrics_test.py: relaxed accuracy 62.5% and ANLS 47.5% of these eight."""
    answers = ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"]
    right = [[text] for text in ("abc", "Abc", "abc", "96%", "94%", "0.96", "0.94", "Won't")]
    assert sum(map(relaxed_accuracy, answers, right)) / 8 == 0.625
    assert sum(map(anls, answers, right)) / 8 == pytest.approx(0.475)


def test_relaxed_accuracy():
    assert relaxed_accuracy("14.", ["14"]) and relaxed_accuracy("105", ["100"]) and not relaxed_accuracy("106", ["100"])
    assert relaxed_accuracy("-95", ["-100"]) and not relaxed_accuracy("100", ["-100"])
    assert relaxed_accuracy("0", ["0"]) and not relaxed_accuracy("0.01", ["0"])  # no share of nothing
    assert not relaxed_accuracy("0.0", ["0"])  # but text, as pix2struct has it
    assert relaxed_accuracy("nan", ["nan"]) and not relaxed_accuracy("inf", ["5"])
    assert relaxed_accuracy("no", ["Yes", "No"]) and not relaxed_accuracy("1,000", ["1000"])  # as the official one


def test_anls():
    """Exactly half of the letters right counts, as on DocVQA's server; capitals and blanks do not matter."""
    assert anls("coca  Cola", ["Coca-Cola", "coca cola"]) == 1
    assert anls("ab", ["abcd"]) == 0.5 and anls("a", ["abc"]) == 0 and anls("ax", ["abcd"]) == 0
    assert anls("", ["a"]) == 0 and anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)


def test_edit_distance_by_definition():
    def brute(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(brute(a[1:], b) + 1, brute(a, b[1:]) + 1, brute(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    for _ in range(100):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 5))) for _ in range(2))
        assert edit_distance(a, b) == brute(a, b)


def test_accuracy_and_choice():
    assert accuracy("Yes.", ["yes"]) and not accuracy("yes, it is", ["yes"]) and accuracy("b", ["a", "B"])
    for text in ("B", "B.", "(B)", "B. The cat", "(B) the cat", "The answer is B.", "So the answer is (B)"):
        assert choice_accuracy(text, ["The answer is B."]) == 1 and choice_accuracy(text, ["A"]) == 0
    assert choice_accuracy("A cat", ["A"]) == 0 and choice_accuracy("The answer is a cat", ["A"]) == 0


def test_yes_or_no_as_pope_reads_it():
    assert says_yes("Yes, there is no doubt.") is False  # the rule looks at the words of the first sentence
    assert says_yes("Yes. It is not hidden.") and says_yes("There is a dog") and not says_yes("No, there is not")
    assert not says_yes("There is not a dog") and not says_yes("NO") and not says_yes("Not that I see")


def test_yes_no_figures_are_scikit_learns():
    rng = random.Random(1)
    for said, right in [*(rng.choices(["yes", "no"], k=2) for _ in range(4)), ["no", "no"], ["yes", "no"]]:
        answers, references = [said, *rng.choices(["Yes", "No."], k=9)], [right, *rng.choices(["yes", "no"], k=9)]
        if said == right == "no":
            answers = references = ["no"] * 10
        both = [[text.lower().startswith("yes") for text in texts] for texts in (references, answers)]
        precision, recall, f1, _ = precision_recall_fscore_support(*both, average="binary", zero_division=0)
        figures = yes_no_figures(answers, references)
        assert [figures[f"yes_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(
            [precision, recall, f1]
        )
        assert figures["yes_share"] == sum(both[1]) / 10


def row(caption, reference, **tags):
    return {"id": "0", "caption": caption, "reference": reference, **tags}


def test_each_row_has_the_metric_of_its_record():
    rows = [
        row("a cat", "a cat"),
        row("yes", "no", metric="yes_no"),
        row("Edward Shanon", "x", metric="anls", answers=["Edward R. Shannon", "Edward Shannon"]),
        row("Edward Shannon", "x", metric="anls", answers=["Edward R. Shannon", "Edward Shannon"]),
    ]
    figures, each = score_each(rows, "exact")
    assert [one["metric"] for one in each] == ["exact", "yes_no", "anls", "anls"]
    assert figures == score(rows, "exact") and figures["exact_match"] == 1 / 2  # one of several answers is right, too
    assert figures["accuracy"] == 1 and figures["yes_no_accuracy"] == 0 and figures["yes_share"] == 1
    assert figures["anls"] == pytest.approx((13 / 14 + 1) / 2) and "cider" not in figures
    assert [one["score"] for one in each] == pytest.approx([1, 0, 13 / 14, 1])
    assert "cider" in score(rows) and set(rows[0]) == {"id", "caption", "reference"}  # which stays as it was


def test_what_cannot_be_scored_is_named():
    assert "none of caption, exact" in problem("bleu", ["a"])
    assert "4 answers or more, and it has 1" in problem("vqa", ["a"]) and problem("vqa", ["a"] * 4) is None
    assert "yes or no" in problem("yes_no", ["nothing"]) and problem("yes_no", ["Yes, it is"]) is None
    assert "a letter" in problem("choice", ["a cat"]) and problem("choice", ["The answer is C."]) is None
    assert not any(problem(name, ["1"] * 4) for name in NAMES if name not in ("yes_no", "choice"))
