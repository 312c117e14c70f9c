"""Questions whether something is in an image, half of them with the answer no."""

import numpy as np

from demo.questions import ask as make_question
from demo.scenes import draw, random_scene
from train_llava.model.generate import Example, ask


def presence_questions(count: int) -> tuple[list[Example], list[str]]:
    """Questions in English about as many held-out scenes of the demo, and their right answers."""
    rng = np.random.default_rng(0)
    examples, right = [], []
    for scene in [random_scene(rng, "held_out") for _ in range(count)]:
        question, answer = make_question("presence", [scene], "en", rng)
        examples.append(ask(question, [draw(scene, rng, "held_out")]))
        right.append(answer)
    return examples, right
