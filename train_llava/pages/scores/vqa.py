"""VQA accuracy: a vote over the answers of ten people, all brought into one form first.

The form is that of EvalAI's server and of MMF's processor, which LLaVA, Pythia and others score VQAv2 and TextVQA with:
small letters, no punctuation, numbers as digits, no articles, the apostrophes of contractions where they belong.
"""

import re
from collections.abc import Sequence

LEAST_PEOPLE = 4  # with fewer, no answer could reach 1

PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
FULL_STOP = re.compile(r"\.(?!\d)")  # 2.5 keeps its own
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = {"a", "an", "the"}
# Contractions of the official table, as they are right; in the table each stands with one of its apostrophes missing.
# Some are not in it on purpose: "its", "were" and "well" are words of their own.
RIGHT = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {form[:i] + form[i + 1 :]: form for form in RIGHT.split() for i, sign in enumerate(form) if sign == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # so it stands in the official table


def normalise(text: str) -> str:
    """An answer in the form in which answers are compared.

    A sign of punctuation is taken out where it stands at a blank anywhere in the text, and becomes a blank elsewhere.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    signs = {ord(sign): "" if f"{sign} " in text or f" {sign}" in text else " " for sign in PUNCTUATION}
    words = (DIGITS.get(word, word) for word in FULL_STOP.sub("", text.translate(signs)).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(1, people who gave this answer / 3), as a mean over the groups that leave out one of the people in turn
    (Antol et al., arXiv:1505.00468, section 3; Goyal et al., arXiv:1612.00837; Singh et al., arXiv:1904.08920).

    Args:
        answer: the model's.
        references: of the people, ten in the published sets, LEAST_PEOPLE at least.
    """
    people = [normalise(reference) for reference in references]
    agree = people.count(normalise(answer))
    without_one, without_another = min(1, (agree - 1) / 3), min(1, agree / 3)
    return (agree * without_one + (len(people) - agree) * without_another) / len(people)
