# %% [markdown] lang="en"
# # 7. Which weights to train
#
# A LLaVA has three parts, and a training need not change all of them. Which parts it changes is called its **strategy**. The flag is `--train_type`. Here are four strategies. ❄ is frozen: its weights stay as they are. The flame is trained.
#
# ## What you will know
#
# - what each strategy trains, and how to check that it really does;
# - why a bad result may be the fault of the learning rate and not of the strategy;
# - what LoRA adds to a matrix, what rank and alpha are, and what merging does;
# - what the projector can learn alone, and why LLaVA is trained in two stages.

# %% [markdown] lang="zh"
# # 7. 训练哪些权重
#
# LLaVA 有三个部件，训练不一定要全部改动。改动哪些部件，就叫**训练策略**，对应参数 `--train_type`。下图是四种策略：❄ 表示冻结，权重保持不变；火苗表示参与训练。
#
# ## 你会学到
#
# - 每种策略到底训练了什么，以及怎样亲自验证；
# - 为什么效果差，问题可能出在学习率而不是策略；
# - LoRA 给矩阵加了什么，秩（rank）和 alpha 是什么意思，合并又做了什么；
# - 只训练投影层能学到什么，为什么 LLaVA 要分两个阶段训练。

# %% tags=["figure"]
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.path import Path as Outline

from train_llava.build_model import build_llava
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.structure import component_or_adapter
from tutorial import figures
from tutorial.quiet import quiet

quiet()
torch.manual_seed(0)

STRATEGIES = ["projector", "use_lora", "freeze_vision", "none"]
PARTS = ["vision tower", "projector", "language model", "head", "LoRA adapters"]
base, processor = build_llava("demo/clip", "demo/qwen", dtype=torch.float32)


def with_strategy(name: str, **lora) -> torch.nn.Module:
    """A new copy of the model, frozen and adapted."""
    return apply_train_type(copy.deepcopy(base), name, LoraSettings(**lora))


def weights_of(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """All and trained weights of each part."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, weight in model.named_parameters():
        if "original_module" in name:  # the projector that PEFT started from
            continue
        every, trained = counts[part := component_or_adapter(name)]
        size = weight.numel()
        counts[part] = (every + size, trained + size * weight.requires_grad)
    return counts


counts = {name: weights_of(with_strategy(name)) for name in STRATEGIES}

# A flame: its tip, then three corners for each curve of its border
FLAME = """10,100 15,45 65,25 60,-35 55,-105 -55,-105 -60,-35 -62,-5 -45,20 -40,45
-30,15 -20,10 -10,15 -5,50 -5,80 10,100"""
corners = np.array([corner.split(",") for corner in FLAME.split()], dtype=float)
flame = Outline(corners, [Outline.MOVETO] + [Outline.CURVE4] * (len(corners) - 1))
middle = {"ha": "center", "va": "center"}


def draw_part(axes: plt.Axes, x: float, y: float, every: int, trained: int) -> None:
    """A box with a flame or a snowflake, and how many weights are trained."""
    colour = "#fde3d0" if trained else "#e3edfb"
    axes.add_patch(plt.Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, color=colour))
    if not trained:
        axes.text(x - 0.32, y, "❄", size=15, color=figures.BLUE, **middle)
        axes.text(x + 0.1, y, "frozen", size=9, **middle)
        return
    axes.scatter(x - 0.32, y, s=210, marker=flame, color=figures.ORANGE)
    of_all = f"\nof {every:,}" if trained < every else ""
    axes.text(x + 0.1, y, f"{trained:,}{of_all}", size=9, **middle)


with plt.rc_context(figures.STYLE):
    figure, (axes,) = figures.panels(1, 2.9)
    for x, part in enumerate(PARTS):
        axes.text(x, -0.72, part, ha="center", weight="bold")
        for y, name in enumerate(STRATEGIES):
            if counts[name][part][0]:
                draw_part(axes, x, y, *counts[name][part])
    for y, name in enumerate(STRATEGIES):
        trained = sum(trained for _, trained in counts[name].values())
        axes.text(-0.62, y, f"{name}\n{trained:,} trained", ha="right", va="center")
axes.set(xlim=(-1.75, 4.5), ylim=(3.5, -1))
axes.axis("off")
figures.shown(figure, "What each strategy trains, and how many weights that is")

# %% [markdown] lang="en"
# A drawing may lie, but gradients do not. A weight is trained if a backward pass leaves a **gradient** there, the direction in which it will move. So let us ask each model for its gradients:

# %% [markdown] lang="zh"
# 图可能画错，梯度不会骗人。反向传播之后，哪个权重上留下了**梯度**（gradient，即它将要移动的方向），哪个权重才真的在训练。我们逐个策略看梯度：

# %%
from pathlib import Path

from demo.make_data import write_records
from train_llava.data import LlavaCollator, LlavaDataset

FOLDER = Path("output/tutorial/07_strategies")
collator = LlavaCollator(processor)


def batches_of(form: str, split: str, count: int) -> list[dict]:
    """Batches of 8 new records."""
    write_records(FOLDER / form, form, split, count, seed=0)
    records = [*LlavaDataset(FOLDER / form)]
    return [collator(records[start : start + 8]) for start in range(0, count, 8)]


held_out = batches_of("held_out", "held_out", 64)
train = batches_of("conversations", "train", 64)


def with_gradient(model: torch.nn.Module) -> list[str]:
    """The names of the weights that get a gradient in a backward pass."""
    model(**train[0]).loss.backward()
    weights = [pair for pair in model.named_parameters() if pair[1].grad is not None]
    return [name for name, weight in weights if weight.grad.any()]


for name in STRATEGIES:
    parts = set(map(component_or_adapter, with_gradient(with_strategy(name))))
    print(f"{name:<14}", ", ".join(sorted(parts)))
    assert parts == {part for part, (_, trained) in counts[name].items() if trained}

# %% [markdown] lang="en"
# ## The original's table beside ours
#
# The author of the tutorial that this repository rebuilds judged four strategies by eye. We trained the demo with each: once with his settings, and with a learning rate of its own for each strategy.

# %% [markdown] lang="zh"
# ## 原教程的表，和我们的结果
#
# 本仓库复现的原教程里，作者凭主观感受评价了四种策略。我们用 demo 把每种都训练了一遍：一遍用他的设置，一遍给每种策略配上合适的学习率。

# %% tags=["figure"]
import json
from statistics import mean, median

from benchmarks.learning.strategies import STRATEGIES as MEASURED

results = Path("benchmarks/results")
rows = json.loads((results / "strategies.json").read_text())["rows"]
original = json.loads((results / "original.json").read_text())
said = {row.name: row.original for row in MEASURED if row.original}  # by the author
names = [*said, "projector"]


def exact(runs: list[dict]) -> list[float]:
    return [run["exact_percent"] for run in runs]


def label(name: str) -> str:
    """A row's name, and what the author says about it."""
    words = f'"{said[name].split(" (")[0]}"' if name in said else "(not judged)"
    return f"{name.replace('projector random and ', '')}\n{words}"


sides = {
    "the original's settings": [exact([original["rows"][name]]) if name in said else [] for name in names],
    "a rate for each strategy": [exact(rows[name]) for name in names],
}
figure, axes = figures.panels(2, 3.2, sharey=True)
for each, (title, values) in zip(axes, sides.items(), strict=True):
    for y, dots in enumerate(values):
        if dots:
            each.barh(y, mean(dots), color=figures.BLUE, alpha=0.35, height=0.6)
        each.plot(dots, [y] * len(dots), "o", color=figures.BLUE, markersize=5)
    each.set(title=title, xlim=(0, 100), xlabel="held-out answers exactly right, %")
axes[0].set_yticks(range(len(names)), map(label, names))
axes[0].invert_yaxis()
figures.shown(figure, "Answers exactly right by strategy, and the author's words")

# %% [markdown] lang="en"
# Each dot is one training. Where the dots of two rows overlap, a difference between their bars may be chance. So do not take the ranking home: this is a miniature. Take home that **the settings matter as much as the strategy**. How much does one of them, the learning rate, matter?

# %% [markdown] lang="zh"
# 一个点是一次训练。两行的点如果互相重叠，柱子的高低可能只是运气。所以不要记住名次（这只是个微缩模型），要记住的是：**设置和策略同样重要**。其中学习率这一项，影响有多大？

# %% tags=["figure"]
from matplotlib.ticker import LogLocator

NONE = "none, 16 samples a step"
styles = ["-", ":", "--", "--"]
colours = [figures.BLUE, figures.BLUE, "#3a9d5d", figures.ORANGE]
at_the_end = {}
figure, (axes,) = figures.panels(1, 3.2)
for name, colour, style in zip(original["curves"], colours, styles):
    runs = original["curves"][name]
    losses = [median(run["held_out_loss"] for run in runs[rate]) for rate in runs]
    axes.plot([*map(float, runs)], losses, style, color=colour, marker=".", label=name)
    at_the_end[name] = losses[-1]
axes.axvline(4e-4, color=figures.INK, linewidth=0.8, linestyle=":")
axes.set(xscale="log", yscale="log", ylabel="held-out loss")
axes.set_xlabel("learning rate; dotted: the original's, 4e-4")
rates = [float(rate) for rate in original["curves"][NONE]]
axes.set_xticks(rates, [f"{rate:.0e}".replace("e-0", "e-") for rate in rates])
axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
axes.yaxis.set_major_formatter("{x:g}")
axes.minorticks_off()
axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
figures.shown(figure, "Loss over learning rate: none, and two that spare the tower")

# %%
for name, loss in at_the_end.items():
    print(f"loss at its highest rate  {loss:.3f}  {name}")
freezing = [name for name in at_the_end if "tower" in name or "freeze" in name]
assert at_the_end[NONE] > 3 * max(at_the_end[name] for name in freezing)

# %% [markdown] lang="en"
# ## What we see
#
# At small rates all lines lie together. At the highest rate `none` stops learning, while the two lines that spare the tower go on. They differ from `none` in the tower alone. So it is the tower that breaks: **CLIP forgets how to see before the language model has learned to look.** The author used one rate, 4e-4, for all rows. Larger models break at smaller rates, so his verdict on `none` may well be one on the rate; only the real model can tell. If you try `none`, add `--vision_learning_rate 2e-5`.

# %% [markdown] lang="zh"
# ## 我们看到
#
# 学习率小的时候，几条线靠在一起。到了最大的学习率，`none` 学不动了，另外两条不动视觉塔（或只让它慢慢动）的线却照常下降。它们和 `none` 只差在视觉塔上，可见坏掉的是视觉塔：**语言模型还没学会看图，CLIP 先忘了怎么看。** 原作者所有策略都用同一个学习率 4e-4；模型越大，能承受的学习率越小，所以他对 `none` 的差评很可能其实是对学习率的差评，真相只有在真实模型上才能验证。想试 `none`，请加上 `--vision_learning_rate 2e-5`。

# %% [markdown] lang="en"
# ## LoRA: a small change beside a large matrix
#
# LoRA leaves a matrix W as it is and learns what to add: W + (alpha / r) · B A. B is tall and narrow, A is flat and wide; r, the **rank**, is the width between them. Here they are in the demo's trained adapter, for the first layer's `q_proj`:

# %% [markdown] lang="zh"
# ## LoRA：在大矩阵旁边加一个小改动
#
# LoRA 不动原来的矩阵 W，只学要加上去的部分：W + (alpha / r) · B A。B 又高又窄，A 又扁又宽；中间的宽度 r 就是**秩**（rank）。下面是 demo 训练好的适配器，第一层的 `q_proj`：

# %% tags=["figure"]
from peft import PeftModel

trained = PeftModel.from_pretrained(copy.deepcopy(base), "demo/trained").eval()


def layers_in(model: PeftModel) -> list[torch.nn.Module]:
    layers = model.get_base_model().model.language_model.layers
    return [layer.self_attn.q_proj for layer in layers]


def change_of(layer: torch.nn.Module) -> torch.Tensor:
    """(alpha / r) B A."""
    return layer.get_delta_weight("default").detach()


first = layers_in(trained)[0]
W = first.base_layer.weight.detach()
A, B = (part["default"].weight.detach() for part in (first.lora_A, first.lora_B))
scale = first.scaling["default"]  # alpha / r
tables = {"W": W, "B": B, f"A: rank {len(A)}": A, f"{scale:g} x B A": scale * B @ A}

figure, axes = figures.panels(5, 2.5, width_ratios=[1, 0.3, 1, 1, 1.3])
for each, (title, table) in zip(axes, tables.items()):
    limit = 3 * table.std()
    figures.draw(each, table, title, cmap="RdBu_r", vmin=-limit, vmax=limit)
for i, layer in enumerate(layers_in(trained)):
    strengths = torch.linalg.svdvals(change_of(layer))
    axes[4].plot(range(1, 65), strengths[:64], label=f"layer {i}")
axes[4].set(title="singular values of B A", xlabel="number")
axes[4].legend(frameon=False, fontsize=8)
figures.shown(figure, "W, B and A of an adapter, B A, and its singular values")

# %% [markdown] lang="en"
# B A is as large as W, but it is made of few numbers. A **singular value** says how strongly one direction is changed. Behind number r all are zero: this is what rank means. After training, the two can be added up for good. That is **merging**, and it changes no answer:

# %% [markdown] lang="zh"
# B A 和 W 一样大，却只由很少的数决定。**奇异值**表示某个方向被改动了多少；第 r 个之后全是零，这就是“秩”的含义。训练完以后，可以把两者永久加在一起，这就是**合并**（merge）。合并不会改变任何回答：

# %%
merged = copy.deepcopy(trained).merge_and_unload()
with torch.no_grad():
    apart, together = trained(**held_out[0]).logits, merged(**held_out[0]).logits

print(f"W: {W.numel():,} numbers, B and A: {B.numel() + A.numel():,}")
print(f"largest difference of logits: {(apart - together).abs().max():.1e}")
sum_of_both = merged.model.language_model.layers[0].self_attn.q_proj.weight
assert torch.allclose(sum_of_both, W + scale * B @ A, atol=1e-5)
assert torch.allclose(apart, together, atol=1e-3)
assert torch.linalg.svdvals(B @ A)[len(A) :].max() < 1e-4

# %% [markdown] lang="en"
# **Alpha** scales the whole. The original leaves PEFT's default of 8, this repository has 64, both at rank 32: scales of 0.25 and 2. What does that change? We train twice from the same start, in the same steps, at the same rate. The projector stays random and frozen, so that LoRA works alone:

# %% [markdown] lang="zh"
# **alpha** 控制整体的缩放。原教程没有设置，用的是 PEFT 的默认值 8；本仓库是 64。秩都是 32，所以缩放系数分别是 0.25 和 2。差别有多大？从同一起点出发，用同样的步数、同样的学习率各训练一遍。投影层保持随机并且冻结，只让 LoRA 学：


# %%
def train_lora(alpha: int, steps: int = 24) -> tuple[list[float], list[float]]:
    """How far each step has moved W, and the loss at each."""
    torch.manual_seed(0)
    settings = {"lora_alpha": alpha, "lora_dropout": 0.0, "train_projector": False}
    model = with_strategy("use_lora", **settings)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3)
    distances, losses = [], []
    for step in range(steps):
        loss = model(**train[step % len(train)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distances.append(change_of(layers_in(model)[0]).norm().item())
        losses.append(loss.item())
    return distances, losses


runs = {alpha: train_lora(alpha) for alpha in (8, 64)}
times = runs[64][0][0] / runs[8][0][0]
print(f"after one step, alpha 64 has moved W {times:.1f} times as far as alpha 8")
assert abs(times - 8) < 0.1

# %% tags=["figure"]
figure, axes = figures.panels(2, 2.5)
for (alpha, curves), colour in zip(runs.items(), (figures.ORANGE, figures.BLUE)):
    for each, curve in zip(axes, curves):
        each.plot(curve, color=colour, linewidth=2, label=f"alpha {alpha}")
axes[0].set(title="how far W has moved", xlabel="step")
axes[1].set(title="loss", xlabel="step")
axes[0].legend(frameon=False)
figures.shown(figure, "Distance and loss over the steps, with alpha 8 and 64")

# %% [markdown] lang="en"
# The same rate moves W eight times as far. Rate and alpha belong together: who copies one from a recipe must copy the other.
#
# ## Projector alone, and two stages
#
# The projector translates image vectors into vectors that the language model can read. It cannot teach the language model anything. So it is trained first, alone, on captions: that is cheap, and can spoil nothing. This is **stage 1**. **Stage 2** continues from there on conversations, with any strategy. `run_zero2.sh` does the same with the demo. The bars are trainings of `benchmarks/results/strategies.json`:

# %% [markdown] lang="zh"
# 学习率相同，W 移动的距离却是八倍。学习率和 alpha 是一对：照抄别人的配方，两个要一起抄。
#
# ## 只训练投影层，以及两个阶段
#
# 投影层把图片向量翻译成语言模型读得懂的向量，但教不会语言模型任何新东西。所以先单独用图片描述训练它：成本低，也不会弄坏别的部件，这是**第一阶段**。**第二阶段**从这里出发，用对话数据训练，策略任选。demo 的 `run_zero2.sh` 就是这样做的。下面的柱子来自 `benchmarks/results/strategies.json` 里的训练：


# %% tags=["figure"]
def by_stages(kind: str) -> dict[str, list[float]]:
    """Of trainings without and with a stage 1 of their own."""
    alone, later = f"{kind}, conversations alone", f"projector, then {kind}"
    one, two = (alone, kind) if alone in rows else (kind, later)
    names = {f"{kind}\none stage": one, f"{kind}\ntwo stages": two}
    return {name: exact(rows[row]) for name, row in names.items()}


shown = {"projector": exact(rows["projector"])}
shown |= by_stages("use_lora") | by_stages("freeze_vision")
figure, (axes,) = figures.panels(1, 2.4)
for x, dots in enumerate(shown.values()):
    colour = figures.BLUE if x else figures.ORANGE
    axes.bar(x, mean(dots), color=colour, alpha=0.35, width=0.55)
    axes.plot([x] * len(dots), dots, "o", color=figures.INK, markersize=4)
axes.set_xticks(range(len(shown)), shown)
axes.set(ylim=(0, 100), ylabel="exactly right, %")
figures.shown(figure, "Answers exactly right: the projector alone, one stage, two")


# %% [markdown] lang="en"
# How much of the work does the projector do? We take the trained model apart: the projector without its LoRA, then both.

# %% [markdown] lang="zh"
# 投影层到底干了多少活？把训练好的模型拆开看：先只装上投影层，再加上 LoRA。

# %%
from train_llava.model.generate import caption_rows

records = [*LlavaDataset(FOLDER / "held_out")]


@torch.no_grad()
def held_out_loss(model: torch.nn.Module) -> float:
    return mean(model(**batch).loss.item() for batch in held_out)


half = copy.deepcopy(base)
half.model.multi_modal_projector = merged.model.multi_modal_projector
for name, model in {"built": base, "with the projector": half, "and with LoRA": merged}.items():
    right = mean(row["exact"] for row in caption_rows(model, processor, records))
    print(f"{name:<19} held-out loss {held_out_loss(model):.3f}, exactly right {right:.0%}")

# %% [markdown] lang="en"
# In this demo the projector goes far. Its language model has practised, on text alone, to talk about scenes that are told in a few vectors (`demo/language_half.py`), so a good translation is nearly all that it lacks. A real chat model has never met an image vector, and your data ask for answers in a form of their own. There stage 2 has more to do. The rule is the same: **the projector brings what the language model can already use; the rest needs weights inside it.**

# %% [markdown] lang="zh"
# 在这个 demo 里，光靠投影层就能走很远：它的语言模型在纯文本上练习过“听人用几个向量讲述一张图，然后聊这张图”（`demo/language_half.py`），差的几乎只是一个好翻译。真实的对话模型从没见过图片向量，你的数据又往往要求特定的回答形式，第二阶段要做的事就多得多。道理是一样的：**投影层只能送来语言模型本来就用得上的东西，其余的要靠语言模型自己的权重去学。**

# %% [markdown] lang="en"
# ## Common questions
#
# **What does LoRA change?** The figure with W, B and A: it adds a matrix of small rank. Nothing of W itself is touched, so the adapter can be taken off again.
#
# **Why freeze the vision tower?** CLIP has seen hundreds of millions of images, and your data are few. It has little to learn there and much to forget, as the figure of rates shows.
#
# **Does `none` train everything?** Nearly. Some weights of the tower never get a gradient. Find them in the second exercise.
#
# **Is the projector alone enough?** See the last cell: as far as the language model can read already.
#
# **Which strategy shall I take?** Begin with `use_lora`: few trained weights, little memory, a small file. Then try `freeze_vision` on the same held-out data. The order may differ on yours.
#
# **What did the original's bug do?** Its projector stayed random and frozen, and LoRA had to learn around it. That can work: `--train_projector false`. The first row of the bars shows when it does not.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **LoRA 到底改了什么？** 看画着 W、B、A 的那张图：它加上了一个低秩矩阵，W 本身一点没动，所以适配器随时可以取下来。
#
# **为什么要冻结视觉塔？** CLIP 见过几亿张图片，而你的数据很少。它在这里能学到的不多，会忘掉的不少，学习率那张图就是证据。
#
# **`none` 真的训练全部权重吗？** 几乎是。视觉塔里有一些权重永远得不到梯度，请在第二个练习里把它们找出来。
#
# **只训练投影层够吗？** 看上面最后一个单元：语言模型本来能读懂多少，它就能走多远。
#
# **我该选哪种策略？** 先用 `use_lora`：训练的权重少，占显存少，保存的文件也小。再用同一份测试集试试 `freeze_vision`。在你的数据上，名次可能不同。
#
# **原教程里的那个 bug 有什么后果？** 投影层保持随机、又被冻结，LoRA 只好绕着它学。有时也行得通（`--train_projector false`）；什么时候行不通，看柱状图的第一行。

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** How many weights do adapters of rank 8 have on the four attention matrices of all layers? Work it out from the sizes, then let the model count.
#
# 🐕 **Middle.** Which weights of the tower get no gradient under `none`? Why these?
#
# 🦁 **Hard.** Keep only the k largest singular values of every B A in the trained model. How small may k be until the held-out loss grows?

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 在所有层的四个注意力矩阵上加秩为 8 的适配器，一共多少个权重？先按尺寸算，再让模型数一遍。
#
# 🐕 **中等。** 用 `none` 训练时，视觉塔的哪些权重没有梯度？为什么偏偏是它们？
#
# 🦁 **困难。** 在训练好的模型里，每个 B A 只保留最大的 k 个奇异值。k 小到多少，测试集损失才会上升？

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 Layers × matrices × rank × (width in + width out).

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 层数 × 矩阵数 × 秩 ×（输入宽度 + 输出宽度）。

# %% tags=["solution"]
text = base.config.text_config
by_hand = text.num_hidden_layers * 4 * 8 * (2 * text.hidden_size)
counted = weights_of(with_strategy("use_lora", lora_r=8))["LoRA adapters"][1]
print(f"{by_hand:,} by hand, {counted:,} counted")
assert by_hand == counted

# %% [markdown] lang="en"
# 🐕 The last layer and the norm behind it. LLaVA reads the layer before (lesson 1), so nothing of the loss flows back there. This repository freezes them, too.

# %% [markdown] lang="zh"
# 🐕 最后一层和它后面的归一化层。LLaVA 读的是倒数第二层（见第 1 课），损失传不到那里。本仓库把它们也冻结了。

# %% tags=["solution"]
everything = copy.deepcopy(base).requires_grad_(True)
loud = with_gradient(everything)
tower_weights = everything.model.vision_tower.state_dict()
every = [f"model.vision_tower.{name}" for name in tower_weights]
silent = [name for name in every if name not in loud]
print(sorted({".".join(name.split(".")[2:5]) for name in silent}))
assert all("layers.3" in name or "post_layernorm" in name for name in silent)

# %% [markdown] lang="en"
# 🦁 A few directions do all of it: rank 32 was a ceiling far above what this training needed. Even k = 0, no LoRA at all, costs little here, for the reason above.

# %% [markdown] lang="zh"
# 🦁 少数几个方向就够了：秩 32 只是上限，远高于这次训练的需要。甚至 k = 0，也就是完全不要 LoRA，损失也涨得不多，原因上面讲过。

# %% tags=["solution"]
for k in (32, 16, 8, 4, 2, 1, 0):
    cut = copy.deepcopy(trained)
    for layer in cut.modules():
        if hasattr(layer, "lora_B"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            U, S, V = torch.linalg.svd((B @ A).detach(), full_matrices=False)
            S[k:] = 0
            B.data, A.data = (U * S)[:, : len(A)], V[: len(A)]
    print(f"k = {k:>2}: held-out loss {held_out_loss(cut):.3f}")

# %% [markdown] lang="en"
# Next lesson: [ZeRO-2 and memory](08_zero.ipynb): what training these weights costs on one GPU and on eight.

# %% [markdown] lang="zh"
# 下一课：[ZeRO-2 与显存](08_zero.ipynb)：训练这些权重，一张卡和八张卡各要多少显存。
