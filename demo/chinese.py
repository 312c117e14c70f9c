"""How the demo world is spoken about in Chinese, with the names of `demo/english.py`.

Words are written apart here and joined by `sentence`, so that the tokenizer learns whole words, as Qwen's has.
"""

from demo.scenes import COLOURS, KINDS, PLACES, SHAPES, Item, Scene

SYSTEM_PROMPTS = ["请 看 图 回答 问题 。", "请 用 简短 的 句子 回答 。"]

INSTRUCTIONS = [
    "请 用 一句话 描述 这张 图 。",
    "图 里 有 什么 ？",
    "请 给 这张 图 写 一句 说明 。",
]
DETAILED = ["请 详细 描述 这张 图 。", "请 说说 图 里 的 一切 。"]

NAMES = dict(
    zip(
        KINDS,
        ["零", "一", "二", "三", "四", "五", "六", "七", "八", "九", "圆形", "方形", "三角形", "星星", "十字", "爱心"],
        strict=True,
    )
)
HUES = dict(zip(COLOURS, ["红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "白色"], strict=True))
CORNERS = dict(zip(PLACES, ["左上角", "右上角", "左下角", "右下角"], strict=True))
COUNTS = ["没有", "一个", "两个", "三个", "四个"]
GROUPS = {"thing": "东西", "digit": "数字", "shape": "形状"}
ORDINALS = ["第一张", "第二张", "第三张"]
SIDES = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}

TEMPLATES = {
    "colour": [("{x} 是 什么 颜色 ？", "{x} 是 {colour} 的 。"), ("请 说出 {x} 的 颜色 。", "{colour} 。")],
    "place": [("{x} 在 哪里 ？", "{x} 在 {place} 。"), ("{x} 在 哪个 角 ？", "{place} 。")],
    "thing": [
        ("{place} 是 什么 ？", "{place} 是 一个 {size} 的 {colour} {kind} 。"),
        ("{place} 有 什么 ？", "一个 {size} 的 {colour} {kind} 。"),
    ],
    "no thing": [("{place} 是 什么 ？", "{place} 什么 也 没有 。"), ("{place} 有 什么 ？", "没有 东西 。")],
    "side": [
        ("{x} 的 {side} 是 什么 ？", "{x} 的 {side} 是 {y} 。"),
        ("什么 在 {x} 的 {side} ？", "{y} 。"),
    ],
    "no side": [
        ("{x} 的 {side} 是 什么 ？", "{x} 的 {side} 什么 也 没有 。"),
        ("什么 在 {x} 的 {side} ？", "没有 东西 。"),
    ],
    "yes": [("图 里 有 {x} 吗 ？", "有 ， 图 里 有 {x} 。"), ("你 看到 {x} 了 吗 ？", "看到 了 。")],
    "no": [("图 里 有 {x} 吗 ？", "没有 ， 图 里 没有 {x} 。"), ("你 看到 {x} 了 吗 ？", "没有 看到 。")],
    "larger": [
        ("{x} 和 {y} 哪个 更 大 ？", "{larger} 更 大 。"),
        ("{x} 比 {y} 大 还是 小 ？", "{x} 比 {y} {relation} 。"),
    ],
    "size": [("{x} 是 大 的 还是 小 的 ？", "{x} 是 {size} 的 。"), ("{x} 有 多 大 ？", "是 {size} 的 。")],
    "count": [("图 里 有 几个 {group} ？", "图 里 {have} {group} 。"), ("{group} 有 几个 ？", "{have} 。")],
    "reading": [
        ("请 从 左 到 右 读出 数字 ， 先 读 上面 一行 。", "{digits} 。"),
        ("图 里 有 哪些 数字 ？", "图 里 的 数字 是 {digits} 。"),
    ],
    "no reading": [
        ("请 从 左 到 右 读出 数字 ， 先 读 上面 一行 。", "图 里 没有 数字 。"),
        ("图 里 有 哪些 数字 ？", "图 里 没有 数字 。"),
    ],
    "absent": [
        ("{x} 是 什么 颜色 ？", "图 里 没有 {x} 。"),
        ("{x} 在 哪里 ？", "图 里 没有 {x} 。"),
        ("{x} 是 大 的 还是 小 的 ？", "图 里 没有 {x} 。"),
        ("{x} 的 {side} 是 什么 ？", "图 里 没有 {x} 。"),
    ],
    "which image": [("请 描述 {nth} 图 。", "{nth} 图 的 {caption} 。"), ("{nth} 图 里 有 什么 ？", "{caption} 。")],
    "find image": [("哪张 图 里 有 {x} ？", "{nth} 图 里 有 {x} 。")],
    "in no image": [("哪张 图 里 有 {x} ？", "哪张 图 里 都 没有 {x} 。")],
    "next": [("{a} 的 后面 是 几 ？", "{a} 的 后面 是 {b} 。"), ("{b} 的 前面 是 几 ？", "{b} 的 前面 是 {a} 。")],
    "more": [("{a} 和 {b} 哪个 数 更 大 ？", "{larger} 比 {smaller} 大 。")],
    "hello": [
        ("你好 ！", "你好 ！ 你 想 知道 什么 ？"),
        ("你 会 做 什么 ？", "我 会 看 图 ， 说出 图 里 的 数字 和 形状 。"),
        ("谢谢 ！", "不 客气 。"),
    ],
    "group": [
        ("{shape} 是 数字 还是 形状 ？", "{shape} 是 形状 。"),
        ("{digit} 是 数字 还是 形状 ？", "{digit} 是 数字 。"),
    ],
}


def join(words: list[str]) -> str:
    return " 、 ".join(words)


def kind(index: int) -> str:
    return NAMES[KINDS[index]]


def colour(name: str) -> str:
    return HUES[name]


def size(item: Item) -> str:
    return "大" if item.large else "小"


def place(index: int) -> str:
    return CORNERS[PLACES[index]]


def coloured(colour: str, index: int) -> str:
    return f"{HUES[colour]} 的 {kind(index)}"


def one(name: str) -> str:
    return name


def relation(larger: bool) -> str:
    return "大" if larger else "小"


def counting(group: str, count: int) -> dict[str, str]:
    return {"group": GROUPS[group], "have": f"有 {COUNTS[count]}" if count else "没有"}


def shape(index: int) -> str:
    return NAMES[SHAPES[index]]


def caption(scene: Scene) -> str:
    each = [f"{place(i.place)} 有 一个 {size(i)} 的 {colour(i.colour)} {kind(i.kind)}" for i in scene]
    return " ， ".join(each)


def detail(scene: Scene) -> str:
    each = [f"{place(i.place)} 的 {kind(i.kind)} 是 {size(i)} 的 ， {colour(i.colour)} 的 。" for i in scene]
    return " ".join([f"图 里 有 {COUNTS[len(scene)]} 东西 。", *each])


def note(item: Item) -> list[str]:
    return [size(item), colour(item.colour), kind(item.kind), place(item.place)]


def sentence(text: str) -> str:
    """Chinese has no blanks between words."""
    return text.replace(" ", "")
