# %% [markdown] lang="en"
# # 7. Which weights to train
#
# A LLaVA has three parts, and a training need not change all of them. Which parts it changes is called its **strategy**; the flag `--train_type` sets it. There are four. A snowflake marks a frozen part, whose weights stay as they are, a flame a trained one.
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
# LLaVA 有三个部件，训练不一定要全部改动。改动哪些部件，就叫**训练策略**，由参数 `--train_type` 指定。下图是四种策略：雪花表示冻结，权重保持不变；火苗表示参与训练。
#
# ## 你会学到
#
# - 每种策略到底训练了什么，以及怎样亲自验证；
# - 为什么效果差，问题可能出在学习率而不是策略；
# - LoRA 给矩阵加了什么，秩（rank）和 alpha 是什么意思，合并又做了什么；
# - 只训练投影层能学到什么，为什么 LLaVA 要分两个阶段训练。

# %% tags=["figure"]
from tutorial.tools.quiet import quiet

quiet()

import copy

import torch

from train_llava.build_model import build_llava
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.structure import component_or_adapter
from tutorial.figures import adapters, strategies

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

strategies.parts(counts)

# %% [markdown] lang="en"
# Let us check the drawing: a weight is trained if a backward pass leaves a **gradient** there, which tells the optimizer where to move it. Here are the parts that get one:

# %% [markdown] lang="zh"
# 来验证一下这张图。反向传播之后，哪个权重上留下了**梯度**（gradient，它告诉优化器该把权重往哪边移），哪个权重才真的在训练。我们逐个策略看梯度：

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
# ## The author's verdicts beside our results
#
# The author of the tutorial that this repository rebuilds judged four ways of training by eye: three strategies, and `use_lora` with a projector that a bug left random and frozen. We trained the demo in each way. Left are his settings: captions alone, one learning rate for all, scored on captions. Right are ours: captions, then conversations (the first row has conversations alone), a rate for each, scored on all kinds of questions.

# %% [markdown] lang="zh"
# ## 原作者的评价，和我们的结果
#
# 在本仓库重写的原教程里，作者凭主观感受评价了四种训练方式：三种策略，再加上一种因为 bug 而让投影层保持随机、没有训练的 `use_lora`。我们在演示数据上把它们都训练了一遍。左图用他的设置：只学图片描述，所有方式用同一个学习率，也只考图片描述。右图用我们的设置：先学描述，再学对话（第一行只学对话），学习率适合各自的策略，考各类问题。

# %% tags=["figure"]
import json
from statistics import mean

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
    words = f'"{said[name]}"' if name in said else "(not judged)"
    return f"{name.replace('random and ', '')}\n{words}"


sides = {
    "the original's settings": [exact([original["rows"][name]]) if name in said else [] for name in names],
    "a rate for each strategy": [exact(rows[name]) for name in names],
}
strategies.beside(sides, [*map(label, names)])

# %% [markdown] lang="en"
# Each dot is one training. Where dots of two rows overlap, the difference of their bars may be chance. Compare rows within a side only. Such a small model cannot rank strategies for you. But **the settings matter as much as the strategy**.
#
# ## When the learning rate is too high
#
# Take the learning rate, again with one stage on captions, which are English. The demo's language model speaks Chinese, too, so a quarter of the held-out questions ask for a Chinese caption:

# %% [markdown] lang="zh"
# 一个点是一次训练。两行的点如果互相重叠，柱子的高低可能只是运气。左右两边考的题目不同，只能在同一边里比较；两边的名次并不一样。这么小的模型排不出适用于你的名次，但它表明：**设置和策略同样重要**。
#
# ## 学习率太大会怎样
#
# 学习率是其中一项设置，它的影响有多大？还是只用图片描述训练一个阶段，而且描述全是英文。不过演示的语言模型也会说中文，所以测试题里有四分之一要求用中文描述：

# %% tags=["figure"]
strategies.rates(original["curves"])


# %%
def language_percent(runs: list[dict], language: str) -> float:
    return mean(run["exact_percent_of_languages"][language] for run in runs)


for name, runs in original["curves"].items():
    chinese = [f"{language_percent(runs[rate], 'Chinese'):3.0f}% at {rate}" for rate in ("0.0004", "0.001")]
    print("Chinese", *chinese, "", name)
    assert min(language_percent(some, "English") for some in runs.values()) > 95
    assert language_percent(runs["0.001"], "Chinese") == 0
assert language_percent(original["curves"]["none, 16 samples a step"]["0.0001"], "Chinese") > 70

# %% [markdown] lang="en"
# English is right at every rate. Chinese goes as the rate grows, and at 1e-3 nothing is left: **a model forgets what its data does not show, and the training loss does not tell.** Is it the tower that forgets? Two lines spare it: one freezes it, one gives it a small rate of its own. They forget no less, so it is the language model. Did the author see this, with 4e-4 for all rows? Only the real model can tell. What helps is a small rate, and data like what must stay: a quarter of the demo's conversations are Chinese.

# %% [markdown] lang="zh"
# 英文描述在任何学习率下都答得对。中文则是学习率越大，剩下的越少，到 1e-3 一个也答不对了：**数据里没有的，模型会忘掉，而训练损失看不出来。** 是视觉塔忘了吗？有两条线保护了它：一条冻结它，一条给它单独的小学习率。可它们忘得一点不少，所以忘的是语言模型。原作者所有策略都用 4e-4，他看到的是不是这个？只有在真实模型上才能验证。管用的办法是：小学习率，再在数据里掺进想保住的东西：演示的对话里有四分之一是中文。

# %% [markdown] lang="en"
# ## LoRA: a small change beside a large matrix
#
# LoRA leaves a matrix W as it is and learns what to add: W + (alpha / r) · B A. B is tall and narrow, A is flat and wide. The number r, the **rank**, is the width of B and the height of A. Training begins with B at zero. Here they are in the demo's trained adapter, for `q_proj`, one of the four matrices of attention, in the first layer:

# %% [markdown] lang="zh"
# ## LoRA：在大矩阵旁边加一个小改动
#
# LoRA 不动原来的矩阵 W，只学要加上去的部分：W + (alpha / r) · B A。B 又高又窄，A 又扁又宽；B 的宽度、也是 A 的高度 r，就是**秩**（rank）。训练开始时 B 全是零，所以模型和原来一样。下面取自演示里训练好的适配器，是第一层的 `q_proj`，即注意力的四个矩阵之一：

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

strengths = [torch.linalg.svdvals(change_of(layer)) for layer in layers_in(trained)]
adapters.matrices(tables, strengths)

# %% [markdown] lang="en"
# B A is as large as W, but made of fewer numbers: half as many in this small matrix, a fortieth in one of Qwen1.5-4B (width 2560). A **singular value** says how strongly a matrix acts along one direction. All after the r-th are zero: this is what rank means. After training, W and the change can be added for good. This is **merging**. The merged model computes the same:

# %% [markdown] lang="zh"
# B A 和 W 一样大，却由更少的数决定：在这个小矩阵里是一半，在 Qwen1.5-4B 的矩阵（宽 2560）里只有四十分之一。**奇异值**表示矩阵在某个方向上的作用有多强；第 r 个之后全是零，这就是“秩”的含义。训练完以后，可以把 W 和改动永久加在一起，这就是**合并**（merge）。合并后的模型算出的结果不变：

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
# **Alpha** scales the change. The original leaves it at 8, the library PEFT's default; this repository takes 64. Both have rank 32, so alpha / r is 0.25 and 2. We train twice, with the same start, batches and rate. The projector stays random and frozen, so that LoRA works alone:

# %% [markdown] lang="zh"
# **alpha** 控制改动的缩放。原教程没有设置，用的是 PEFT 库的默认值 8；本仓库是 64。秩都是 32，所以 alpha / r 分别是 0.25 和 2。差别有多大？从同一起点出发，用同样的批次、同样的学习率各训练一遍。投影层保持随机并且冻结，只让 LoRA 学：


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
adapters.alphas(runs)

# %% [markdown] lang="en"
# At the same rate, the first step moves W eight times as far. If you copy a recipe's rate, copy its alpha, too. (Try it: [LoRA](../interactive/lora.html).)
#
# ## Projector alone, and two stages
#
# The projector translates image vectors into vectors that the language model can read. It cannot teach the language model anything new. So it is trained first, alone, on captions: that is cheap, and the other parts cannot be damaged. This is **stage 1**. **Stage 2** continues from there on conversations, with any strategy. `run_zero2.sh` does the same with the demo. The bars are from `benchmarks/results/strategies.json`; "one stage" means conversations alone, as many samples:

# %% [markdown] lang="zh"
# 学习率相同，第一步 W 移动的距离却相差八倍。照搬别人的配方，学习率和 alpha 要一起搬。（动手试试：[LoRA](../interactive/lora.html)。）
#
# ## 只训练投影层，以及两个阶段
#
# 投影层把图片向量翻译成语言模型读得懂的向量，但教不会语言模型任何新东西。所以先单独用图片描述训练它：成本低，也不会弄坏别的部件，这是**第一阶段**。**第二阶段**从这里出发，用对话数据训练，策略任选。演示用的 `run_zero2.sh` 就是这样做的。下面的柱子来自 `benchmarks/results/strategies.json`，“one stage”指只学对话，样本数相同：


# %% tags=["figure"]
def by_stages(kind: str) -> dict[str, list[float]]:
    """Of trainings without and with a stage 1 of their own."""
    one, two = rows[f"{kind}, conversations alone"], rows[kind]
    return {f"{kind}\none stage": exact(one), f"{kind}\ntwo stages": exact(two)}


strategies.stages(by_stages("projector") | by_stages("use_lora") | by_stages("freeze_vision"))

# %% [markdown] lang="en"
# How much of the work does the projector do? We take the trained model apart: nothing of it ("built"), its projector alone, then both. (Even with a random projector some answers are right: they need no image, or are guessed.)

# %% [markdown] lang="zh"
# 投影层到底干了多少活？把训练好的模型拆开看：先是刚搭好的（built），再换上训练过的投影层，最后加上 LoRA。投影层随机时也有一部分全对：有的问题不用看图，有的能猜中（第 11 课）。

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
# ## What we see
#
# In this demo two stages are no better than one, and the projector does much of the work. Its language model was trained on text alone, but in some of the texts one vector stood for a patch, the sum of the vectors of the words about it (`demo/language_half.py`). So a good translation is nearly all that it lacks. A real chat model has never met an image vector, and your data may need answers of another form: stage 2 has more to do. The rule is the same: **the projector brings what the language model can already use; the rest needs weights inside it.**

# %% [markdown] lang="zh"
# ## 我们看到
#
# 在这个演示里，分两个阶段并不比一个阶段好，很多工作是投影层完成的。它的语言模型虽然只学过文本，但其中一部分文本里，场景的图块已经换成了向量，即描述这个图块的各个词向量之和（`demo/language_half.py`）。所以它缺的几乎只是一个好翻译。真实的对话模型从没见过图片向量，你的数据又往往要求别的回答形式，第二阶段要做的事更多。道理是一样的：**投影层只能送来语言模型本来就用得上的东西，其余的要靠语言模型自己的权重去学。**

# %% [markdown] lang="en"
# ## Common questions
#
# **What does LoRA change?** It adds a matrix of small rank, see the figure with W, B and A. W itself is not touched, so the adapter can be taken off again.
#
# **Why freeze the vision tower?** CLIP has seen hundreds of millions of images, and your data are few. If you train it, take `--vision_learning_rate 2e-6`, as LLaVA-NeXT does.
#
# **Does `none` train everything?** Nearly: some weights of the tower get no gradient (second exercise).
#
# **Is the projector alone enough?** As far as the language model can read already.
#
# **Which strategy shall I take?** Begin with `use_lora`: few trained weights, little memory, a small file. Then try `freeze_vision`, and compare both on the same held-out data.
#
# **What did the original's bug do?** Its projector stayed random and frozen, so LoRA had to learn to read what a random projector gives. `--train_projector false` does the same. Whether that works depends on the settings: see the first row of the second figure.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **LoRA 到底改了什么？** 看画着 W、B、A 的那张图：它加上了一个低秩矩阵，W 本身一点没动，所以适配器随时可以取下来。
#
# **为什么要冻结视觉塔？** CLIP 见过几亿张图片，而你的数据很少，能学到的不多。真要训练它，可以像 LLaVA-NeXT 那样加上 `--vision_learning_rate 2e-6`。
#
# **`none` 真的训练全部权重吗？** 几乎是：视觉塔里有一些权重得不到梯度（见第二个练习）。
#
# **只训练投影层够吗？** 看上面最后一个单元格：语言模型本来能读懂多少，它就能走多远。
#
# **我该选哪种策略？** 先用 `use_lora`：训练的权重少，占显存少，保存的文件也小。再试试 `freeze_vision`，用同一份测试集比较两者。
#
# **原教程里的那个 bug 有什么后果？** 投影层保持随机、又被冻结，LoRA 只好去学着读随机投影层给出的向量。`--train_projector false` 可以重现这种情况。行不行得通取决于设置，看第二张图的第一行。

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** How many weights do adapters of rank 8 (`lora_r=8`) have, on the four attention matrices of each layer of the language model? Work it out from the sizes, then let the model count.
#
# 🐕 **Middle.** Ask `base` for gradients of all weights (`requires_grad_(True)`). Which weights of the tower still get none? Why?
#
# 🦁 **Hard.** Keep only the k largest singular values of every B A in the trained model. What does the held-out loss do as k falls?

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 在语言模型每一层的四个注意力矩阵上加秩为 8 的适配器（`lora_r=8`），一共多少个权重？先按尺寸算，再让模型数一遍。
#
# 🐕 **中等。** 给所有权重都打开梯度（`requires_grad_(True)`）。视觉塔的哪些权重仍然得不到梯度？为什么偏偏是它们？
#
# 🦁 **困难。** 在训练好的模型里，每个 B A 只保留最大的 k 个奇异值。k 变小时，测试集损失怎样变？

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 A is rank × width in, B is width out × rank: layers × matrices × rank × (width in + width out).

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 A 是秩 × 输入宽度，B 是输出宽度 × 秩，所以是：层数 × 矩阵数 × 秩 ×（输入宽度 + 输出宽度）。

# %% tags=["solution"]
text = base.config.text_config
by_hand = text.num_hidden_layers * 4 * 8 * (2 * text.hidden_size)
counted = weights_of(with_strategy("use_lora", lora_r=8))["LoRA adapters"][1]
print(f"{by_hand:,} by hand, {counted:,} counted")
assert by_hand == counted

# %% [markdown] lang="en"
# 🐕 The last layer and the norm behind it. LLaVA reads the output of the layer before (lesson 1), so the loss does not depend on them. That is why this repository freezes them even under `none`.

# %% [markdown] lang="zh"
# 🐕 最后一层和它后面的归一化层。LLaVA 读的是倒数第二层的输出（见第 1 课），损失和它们无关。所以即使用 `none`，本仓库也把它们冻结。

# %% tags=["solution"]
everything = copy.deepcopy(base).requires_grad_(True)
loud = with_gradient(everything)
tower_weights = everything.model.vision_tower.state_dict()
every = [f"model.vision_tower.{name}" for name in tower_weights]
silent = [name for name in every if name not in loud]
print(sorted({".".join(name.split(".")[2:5]) for name in silent}))
assert all("layers.3" in name or "post_layernorm" in name for name in silent)

# %% [markdown] lang="en"
# 🦁 A few directions are enough: rank 32 is far more than this training needed. Even with k = 0, no LoRA at all, most answers stay right: the projector does most.

# %% [markdown] lang="zh"
# 🦁 少数几个方向就够了：秩 32 远超这次训练的需要。即使 k = 0，也就是完全不要 LoRA，大多数回答仍然正确：这里的工作主要由投影层完成。

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
