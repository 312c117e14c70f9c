"""How three benchmarks soften "right": the score of an answer that is a little wrong."""

import numpy as np
from IPython.display import Image

from train_llava.pages.scores.short_answers import anls, relaxed_accuracy
from train_llava.pages.scores.vqa import vqa_accuracy
from tutorial.figures import canvas


def soft_scores(word: str = "elephant") -> Image:
    people, numbers, wrong = range(11), np.arange(90, 110.5, 0.5), range(len(word) + 1)
    figure, axes = canvas.panels(3, 2.5, sharey=True)
    votes = [vqa_accuracy("two", ["2"] * agree + ["3"] * (10 - agree)) for agree in people]
    axes[0].bar(people, votes, color=canvas.BLUE)
    axes[0].set(title="VQA accuracy", xlabel="people of ten who agree", ylim=(0, 1.08))
    axes[1].plot(numbers, [relaxed_accuracy(str(n), ["100"]) for n in numbers], color=canvas.BLUE, linewidth=2)
    axes[1].set(title="relaxed accuracy", xlabel="answer, where 100 is right")
    spoiled = [word[: len(word) - count] + "#" * count for count in wrong]
    axes[2].bar(wrong, [anls(text, [word]) for text in spoiled], color=canvas.BLUE)
    axes[2].set(title=f"ANLS, where {word!r} is right", xlabel="wrong letters")
    return canvas.shown(figure, "Three scores: by the people who agree, by the error of a number, by wrong letters")
