"""The figures of lesson 9: next tokens, what the cache saves, padding, and attention on the image."""

import numpy as np
import torch
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from PIL.Image import Image as Picture
from torch.utils.flop_counter import FlopCounterMode

from demo.english import caption
from demo.language_half import PATCHES
from demo.scenes import COLOURS, KINDS, Scene, draw, random_scene
from train_llava.model.generate import Example, ask
from tutorial.figures import canvas, diagrams
from tutorial.tools.asking import Asker, Batch, longer, with_answer

GREY = "#c9d3de"
GROUPS = {"size": ["small", "large"], "colour": list(COLOURS), "kind": KINDS}  # of the words in a caption
PADDING = {"padding": "#ffffff", "text": diagrams.TEXT, "image": diagrams.IMAGE}


def next_tokens(asker: Asker, examples: list[Example], steps: int = 7) -> Image:
    """The most probable next tokens at the first steps of an answer: that of the examples which leaves most doubt."""
    answers = [best_tokens(asker, asker.batch(example), steps) for example in examples]
    doubtful = min(range(len(answers)), key=lambda i: answers[i][0][:, 0].min())
    figure, axes = canvas.panels(1 + steps, 1.9, width_ratios=[1.3] + [1] * steps)
    canvas.draw(axes[0], np.asarray(examples[doubtful]["images"][0]), "image")
    for step, (each, chances, tokens) in enumerate(zip(axes[1:], *answers[doubtful], strict=True), 1):
        each.barh(range(4), chances.tolist(), color=[canvas.ORANGE] + [GREY] * 3)
        for row, token in enumerate(tokens.tolist()):
            word = diagrams.drawable(asker.processor.decode([token]).strip())
            each.text(0.04, row, word, va="center", fontsize=8.5)
        each.set(xlim=(0, 1), ylim=(3.6, -0.6), xticks=[], yticks=[], title=f"step {step}")
    return canvas.shown(figure, "An image, and at each step of its answer the four most probable next tokens")


@torch.no_grad()
def best_tokens(asker: Asker, batch: Batch, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and ids of the four best next tokens at each step of a greedy answer, (steps, 4) each."""
    found = []
    for _ in range(steps):
        found.append(asker.model(**batch).logits[0, -1].float().softmax(-1).topk(4))
        batch = longer(batch, found[-1].indices[:1, None])
    return torch.stack([each.values for each in found]), torch.stack([each.indices for each in found])


@torch.no_grad()
def costs(asker: Asker, batch: Batch, cached: bool, steps: int) -> tuple[list[float], list[float]]:
    """Of each token, the millions of operations it takes, and the kilobytes that are kept after it."""
    operations, kept, past, inputs = [], [], None, batch
    for _ in range(steps):
        with FlopCounterMode(display=False) as counter:
            output = asker.model(**inputs, past_key_values=past, use_cache=cached)
        operations.append(counter.get_total_flops() / 1e6)
        past = output.past_key_values
        kept.append(sum(each.keys.nbytes + each.values.nbytes for each in past.layers) / 1e3 if cached else 0)
        new = output.logits[:, -1:].argmax(-1)
        batch = longer(batch, new)
        inputs = {"input_ids": new} if cached else batch
    return operations, kept


def cache_costs(asker: Asker, batch: Batch, steps: int = 40) -> Image:
    figure, axes = canvas.panels(2, 2.5)
    for cached, name, colour in ((False, "without a cache", canvas.ORANGE), (True, "with the cache", canvas.BLUE)):
        for each, values in zip(axes, costs(asker, batch, cached, steps), strict=True):
            each.plot(range(1, steps + 1), values, color=colour, linewidth=2, label=name)
    for each, title in zip(axes, ("million operations for each token", "kilobytes kept in memory"), strict=True):
        each.set(title=title, xlabel="token of the answer", ylim=0)
    axes[0].legend(frameon=False, loc="center right")
    return canvas.shown(figure, "Operations and memory of each token of an answer, with and without the cache")


def padding(asker: Asker, left: Batch, right: Batch) -> Image:
    """Where padding, text and image stand in two batches."""
    figure, axes = canvas.panels(1, 2.5, rows=2)
    palette = np.array([to_rgb(colour) for colour in PADDING.values()])
    for each, (side, batch) in zip(axes, {"left": left, "right": right}.items(), strict=True):
        kinds = batch["attention_mask"] * (1 + (batch["input_ids"] == asker.image_token).long())
        draw_rows(each, palette[kinds.cpu()], f"padded on the {side}")
        for row, last in enumerate(kinds[:, -1].tolist()):
            each.text(kinds.shape[1] - 0.2, row, "next token " + ("✓" if last else "after padding ✗"), va="center")
    handles = [Patch(facecolor=colour, edgecolor=diagrams.EDGE) for colour in PADDING.values()]
    figure.legend(handles, PADDING, loc="outside lower center", ncols=3, frameon=False)
    return canvas.shown(figure, "Prompts padded on the left, which all end in the last column, and on the right")


def draw_rows(axes: Axes, colours: np.ndarray, title: str) -> None:
    """A square for each token, with thin lines between them."""
    canvas.draw(axes, colours, title)
    axes.set_aspect("auto")
    rows, columns, _ = colours.shape
    axes.set_xticks(np.arange(-0.5, columns), labels=[])
    axes.set_yticks(np.arange(0.5, rows - 1), labels=[])
    axes.grid(color="#dfe4ea", linewidth=0.5)
    axes.tick_params(length=0)


def attention_maps(asker: Asker, batch: Batch, answer: list[int], words: int = 4) -> Image:
    """For those words of an answer that look at the image most, the attention on its patches in up to four layers."""
    start = batch["input_ids"].shape[1]
    looks = asker.image_attention(with_answer(batch, answer))[:, start - 1 : -1]  # the position before a word says it
    layers = np.linspace(0, len(looks) - 1, min(4, len(looks))).round().astype(int)
    said = [i for i, token in enumerate(answer) if asker.text([token]).isalpha()] or [0]
    shown = sorted(sorted(said, key=lambda word: -looks[:, word].sum())[:words])
    pixels = batch["pixel_values"][0].float().cpu().permute(1, 2, 0).numpy()  # as the model sees the image
    pixels = (pixels - pixels.min()) / max(np.ptp(pixels), 1e-6)

    figure, axes = canvas.panels(len(layers), 1.6 * len(shown), rows=len(shown))
    for each, (word, layer) in zip(axes, [(word, layer) for word in shown for layer in layers], strict=True):
        canvas.draw(each, painted(pixels, looks[layer, word].numpy()), f"layer {layer}: {looks[layer, word].sum():.0%}")
        if layer == 0:
            each.set_ylabel(asker.text([answer[word]]), fontsize=12, color=canvas.ORANGE)
    return canvas.shown(figure, "For some words and layers, the image, orange where the attention goes", "jpeg")


def painted(pixels: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """An image with its patches painted orange, the one with the most attention most."""
    side = int(len(attention) ** 0.5)  # a class token, where one is kept, stands in front
    weights = attention[-(side**2) :].reshape(side, side)
    paint = np.kron(0.75 * weights / weights.max(), np.ones([length // side for length in pixels.shape[:2]]))[..., None]
    return pixels[: paint.shape[0], : paint.shape[1]] * (1 - paint) + np.array(to_rgb(canvas.ORANGE)) * paint


def attention_on_things(asker: Asker, question: str, count: int = 40) -> Image:
    """By layer: while a size, colour or kind is said, how often the patch with most attention is that of its thing."""
    rng = np.random.default_rng(0)
    hits: dict[str, list[torch.Tensor]] = {group: [] for group in GROUPS}
    for scene in [random_scene(rng, "held_out") for _ in range(count)]:
        for group, places in looks(asker, question, scene, draw(scene, rng, "held_out")).items():
            # another tokenizer may split a name
            hits[group] += [place == item.patch for item, place in zip(scene, places, strict=False)]

    figure, (axes,) = canvas.panels(1, 2.5)
    for (group, some), colour in zip(hits.items(), (canvas.INK, canvas.BLUE, canvas.ORANGE), strict=True):
        shares = torch.stack(some).float().mean(0)
        axes.plot(shares, marker="o", linewidth=2, color=colour, label=f"says the {group}")
    axes.axhline(1 / PATCHES, color="#8794a3", linestyle=":", label="chance")
    axes.set(ylim=(0, 1), xlabel="layer", ylabel="looks at the thing", xticks=range(len(shares)))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas.shown(figure, "By layer, how often the patch with the most attention is that of the thing spoken of")


def looks(asker: Asker, question: str, scene: Scene, image: Picture) -> dict[str, list[torch.Tensor]]:
    """For the words of each of GROUPS in a scene's caption, in order: the cell with most attention, by layer."""
    batch, ids = asker.batch(ask(question, [image])), asker.processor.tokenizer(caption(scene)).input_ids
    attention = asker.image_attention(with_answer(batch, ids))[:, -len(ids) - 1 : -1]
    side = int(attention.shape[-1] ** 0.5)  # patches of this model; those of the demo's are its world's cells
    maps = attention[..., -(side**2) :].unflatten(-1, (side, side))
    cells = torch.nn.functional.adaptive_avg_pool2d(maps, int(PATCHES**0.5)).flatten(-2).argmax(-1)
    words = [asker.text([token]) for token in ids]
    return {group: [cells[:, i] for i, word in enumerate(words) if word in names] for group, names in GROUPS.items()}
