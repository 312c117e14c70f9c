"""Draws what a LLaVA is, for the READMEs: docs/llava.svg and, with Chinese words, docs/llava_zh.svg.

    python -m docs.draw_llava

The sizes are those of CLIP-ViT-L/336 and Qwen1.5-4B-Chat; the image is one of the demo's.
"""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from demo.scenes import draw, random_scene

FOLDER = Path(__file__).parent
PATCHES = 24  # on a side: 336 pixels / 14
SIDE = 192  # of the drawn image
BLUE, GREEN, RED, INK = "#cfe0f7", "#d3efdc", "#f9dcd5", "#26303b"
WORDS = {
    "llava": {
        "image": ("image, 336 × 336", "24 × 24 patches of 14 pixels"),
        "tower": ("vision tower", "CLIP-ViT-L, 304 M", "sees"),
        "projector": ("projector", "two layers, 9 M", "translates"),
        "model": ("language model", "Qwen1.5-4B-Chat, 3.95 B", "reads, and answers"),
        "vectors": ("576 × 1024", "576 × 2560"),
        "sequence": ("system prompt", "576 image tokens", "What is in this image?"),
        "row": "one sequence of vectors: the image stands among the words, where the prompt has <image>",
        "answer": ("word by word:", "“a blue four at the top …”"),
    },
    "llava_zh": {
        "image": ("图片，336 × 336", "24 × 24 个图块，每块 14 像素"),
        "tower": ("视觉编码器（视觉塔）", "CLIP-ViT-L，3.04 亿", "看图"),
        "projector": ("投影层（转接层）", "两层，918 万", "翻译"),
        "model": ("语言模型", "Qwen1.5-4B-Chat，39.5 亿", "读，然后回答"),
        "vectors": ("576 × 1024", "576 × 2560"),
        "sequence": ("系统提示", "576 个图像 token", "图里有什么？"),
        "row": "同一个向量序列：图片排在词之间，位置就是提示里的 <image>",
        "answer": ("逐词写出：", "“右上角有一个蓝色的 4 ……”"),
    },
}


def image() -> str:
    """One of the demo's scenes as a data URI, enlarged."""
    rng = np.random.default_rng(6)
    content = io.BytesIO()
    scene = draw(random_scene(rng, "train"), rng, "train")
    scene.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def text(x: float, y: float, words: str, size: int = 15, weight: str = "normal", colour: str = INK) -> str:
    """A line of text, centred at x."""
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="middle"'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, lines: tuple[str, ...]) -> list[str]:
    """A part: its name in bold, and lines about it."""
    rectangle = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="12" fill="{colour}" stroke="#8794a3"/>'
    top = y + height / 2 - 11 * (len(lines) - 1) + 5
    return [rectangle] + [
        text(x + width / 2, top + 22 * i, line, 16 if i == 0 else 14, "bold" if i == 0 else "normal")
        for i, line in enumerate(lines)
    ]


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{INK}" stroke-width="2" marker-end="url(#tip)"/>'


def drawing(words: dict) -> str:
    """The whole SVG."""
    top, left = 24, 24
    step = SIDE / PATCHES
    lines = [left + step * i for i in range(PATCHES + 1)]
    grid = "".join(f"M{x:g} {top}V{top + SIDE}" for x in lines) + "".join(
        f"M{left} {top + step * i:g}H{left + SIDE}" for i in range(PATCHES + 1)
    )
    middle, sequence, below = top + SIDE / 2, 292, 420
    parts = [
        f'<image x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" href="{image()}"/>',
        f'<path d="{grid}" stroke="#ffffff" stroke-opacity="0.35" stroke-width="1"/>',
        text(left + SIDE / 2, top + SIDE + 22, words["image"][0], 15, "bold"),
        text(left + SIDE / 2, top + SIDE + 42, words["image"][1], 13),
        arrow(left + SIDE + 8, middle, 288, middle),
        *box(296, middle - 52, 216, 104, BLUE, words["tower"]),
        arrow(516, middle, 636, middle),
        text(574, middle - 12, words["vectors"][0]),
        *box(644, middle - 52, 190, 104, GREEN, words["projector"]),
        f'<path d="M739 {middle + 56} V{sequence - 24} H500 V{sequence - 6}" fill="none" stroke="{INK}" '
        'stroke-width="2" marker-end="url(#tip)"/>',
        text(800, middle + 92, words["vectors"][1]),
    ]
    cells = [(24, 220, "#e9edf2", 0), (248, 504, GREEN, 1), (756, 220, "#e9edf2", 2)]
    for x, width, colour, i in cells:
        parts.append(f'<rect x="{x}" y="{sequence}" width="{width}" height="44" fill="{colour}" stroke="#8794a3"/>')
        parts.append(text(x + width / 2, sequence + 27, words["sequence"][i], 14, "bold" if i == 1 else "normal"))
    parts += [
        text(500, sequence + 66, words["row"], 13, colour="#55606d"),
        arrow(500, sequence + 78, 500, below - 6),
        *box(330, below, 340, 88, RED, words["model"]),
        arrow(674, below + 44, 730, below + 44),
        text(856, below + 38, words["answer"][0], 14),
        text(856, below + 60, words["answer"][1], 14, "bold"),
    ]
    tip = '<marker id="tip" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto"><path d="M0 0L8 4L0 8z"/>'
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 528" font-family="system-ui, \'Noto Sans CJK SC\', '
    )
    head += f"'Microsoft YaHei', 'PingFang SC', sans-serif\"><defs>{tip}</marker></defs>"
    return "\n".join([head, '<rect width="1000" height="528" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def main() -> None:
    for name, words in WORDS.items():
        (FOLDER / f"{name}.svg").write_text(drawing(words), encoding="utf-8")


if __name__ == "__main__":
    main()
