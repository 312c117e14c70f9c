# %% [markdown] lang="en"
# # 6. The training loop
#
# A model is built (lesson 4), and data comes in batches (lesson 5). What remains is the loop that learns. You write it yourself, in plain PyTorch, and train the demo's projector with it. The model will write well-formed captions first, and look at the image only afterwards. Then the package's own trainer does the same on the same batches, and the loss curves lie on each other.
#
# ## What you will know
#
# - the five things that each step does;
# - what the shelf in the loss curve means, and below which loss no blind model comes;
# - what a trainer and ZeRO-2 add to these lines.

# %% [markdown] lang="zh"
# # 6. 训练循环
#
# 模型搭好了（第 4 课），数据也能变成批次了（第 5 课），剩下的就是让它学起来的那个循环。这一课用纯 PyTorch 把它写出来，训练演示模型的投影层。你会看到模型先把描述写通顺，后来才真正看图。接着换成本仓库的训练程序，用同样的批次再训练一遍，两条损失曲线会重合在一起。
#
# ## 你会学到
#
# - 训练的每一步做哪五件事；
# - 损失曲线上的那段平台是什么意思，看不见图的模型最低能降到多少；
# - Trainer（transformers 的训练类，本仓库的训练程序用它）和 ZeRO-2 在这几行代码之外多做了什么。

# %%
from tutorial.figures import curves

curves.circle()

# %% [markdown] lang="en"
# ## What the circle turns on
#
# First the data: images with captions, as in LLaVA's first stage. Each batch has 16 of them, and no image comes twice. The order is that of the package's sampler, so that both trainings see the same batches.

# %% [markdown] lang="zh"
# ## 循环里转的是什么
#
# 先准备数据：图片加描述，和 LLaVA 第一阶段一样。每个批次 16 条，没有一张图出现两次。顺序用的是本仓库的采样器，这样两次训练看到的批次完全一样。

# %%
import shutil
from pathlib import Path

import numpy as np
import torch

from demo.make_data import write_records
from train_llava.build_model import build_llava
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.folder import save_llava
from train_llava.model.structure import components_table
from train_llava.training.sampler import LlavaSampler
from tutorial.tools.quiet import quiet

quiet()
FOLDER, STEPS, SIZE = Path("output/lesson_06"), 90, 16
shutil.rmtree(FOLDER, ignore_errors=True)
write_records(FOLDER / "data", "captions", "train", STEPS * SIZE, seed=0)
write_records(FOLDER / "new", "captions", "train", 16, seed=1)  # images that the loop does not read

torch.manual_seed(0)
model, processor = build_llava("demo/clip", "demo/qwen", torch.float32)
save_llava(model, processor, FOLDER / "model")  # for the second training

collator = LlavaCollator(processor)
data = LlavaDataset(FOLDER / "data").filter_by_length(collator.encoder)
order = list(LlavaSampler(data.sizes, [1], data.lengths, SIZE, grouped=False, seed=0))
batches = [collator([data[i] for i in order[at : at + SIZE]]) for at in range(0, len(order), SIZE)]
print({name: tuple(value.shape) for name, value in batches[-1].items()})

# %% [markdown] lang="en"
# Then the freezing. The vision tower and the language model keep their weights; the projector alone learns. A **gradient** says, for each weight, how the loss changes if this weight grows a little. To freeze a weight means no more than to ask for no gradient of it.

# %% [markdown] lang="zh"
# 再冻结参数。视觉塔和语言模型的权重都不动，只训练投影层。**梯度**（gradient）表示某个权重增大一点点时，损失怎样变化。所谓冻结一个权重，就是不要它的梯度。

# %%
model.requires_grad_(False)
model.model.multi_modal_projector.requires_grad_(True)
print(components_table(model))

# %% [markdown] lang="en"
# ## The loop
#
# Here is all of it. **AdamW** is the optimizer: it moves each weight against its gradient, in steps of about the **learning rate**. `share` is the schedule of this rate: it rises for four steps (*warm-up*), as the first gradients are large and unsteady, and then falls along a cosine, so that the last steps change little. *Clipping* scales a gradient down if it is too large, so that one odd batch cannot do much harm.

# %% [markdown] lang="zh"
# ## 循环本身
#
# 全部代码都在这里。**AdamW** 是优化器（optimizer）：它让每个权重逆着梯度移动，每步移动的幅度大致等于**学习率**（learning rate）。`share` 规定学习率怎样变化：前四步从零升上去（预热，warm-up），因为一开始的梯度又大又不稳定；之后沿余弦曲线降下来，最后几步只做细小的修正。梯度裁剪（clipping）把过大的梯度按比例缩小，免得一个反常的批次就把模型带偏。

# %%
from math import cos, pi

from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

RATE, WARM_UP = 2e-3, 4


def share(step):
    """Of the rate, at a step."""
    if step < WARM_UP:
        return step / WARM_UP
    return 0.5 + 0.5 * cos(pi * (step - WARM_UP) / (STEPS - WARM_UP))


def train(batches, rate=RATE, watch=lambda step: None):
    """Trains the projector; returns the loss of each step."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule, losses = LambdaLR(optimizer, share), []
    for step, batch in enumerate(batches):
        watch(step)
        loss = model(**batch).loss  # forward: how wrong are the predicted tokens?
        loss.backward()  # backward: which way should each weight move?
        clip_grad_norm_(trained, 1.0)
        optimizer.step()  # move the weights
        schedule.step()
        optimizer.zero_grad()  # forget the gradients, or the next ones are added to them
        losses.append(loss.item())
    return losses


# %% [markdown] lang="en"
# On the way we test the model on 16 images that are not among the batches. Every ten steps we note -log p of each token of their captions: how much it surprises the model. At four moments it writes a caption for the first image.

# %% [markdown] lang="zh"
# 训练途中，我们拿 16 张不在批次里的图片测一测模型：每十步记下正确描述里每个词元的 -log p，也就是这个词元让它多意外；另外有四次，让它给第一张图写描述。

# %%
from train_llava.model.generate import caption_rows

new = LlavaDataset(FOLDER / "new")
examples = collator([new[i] for i in range(len(new))])
targets = examples["labels"][:, 1:]
captions, surprise = {}, {}  # by step


def watch(step):
    if step in (0, 20, 50, STEPS):
        captions[step] = caption_rows(model, processor, [new[0]])[0]["caption"]
    if step % 10 == 0:
        with torch.no_grad():
            logits = model(**examples).logits[:, :-1][targets >= 0]
        surprise[step] = torch.nn.functional.cross_entropy(logits, targets[targets >= 0], reduction="none")


projector = model.model.multi_modal_projector
start = {name: weight.clone() for name, weight in projector.state_dict().items()}
losses = train(batches, watch=watch)
watch(STEPS)
for step, caption in captions.items():
    print(f"step {step:>2}: {caption}")
print("  right:", new[0]["messages"][-1]["content"])

# %% [markdown] lang="en"
# At step 0 it says next to nothing. At step 20 sizes and places are right, colour and kind the same for all. At step 50 most of it is true, at step 90 nearly everything. The loss shows the same.
#
# ## The shelf
#
# Imagine a model that has perfect grammar and is blind. It knows how captions are made, but must guess how many things there are, where, and of which kind, colour and size. The demo's world is small: 16 kinds, eight colours, two sizes, four places. Of the 128 pairs of a kind and a colour, 12 are in no training image; they are kept for choosing settings and for tests. So we can compute what guessing costs, before any training. If $n$ things are equally likely, the right one has the probability $1/n$, and the loss is $\ln n$. Losses are added up in *nats*, the unit of the natural logarithm.

# %% [markdown] lang="zh"
# 第 0 步，模型几乎什么也说不出来。第 20 步，大小和位置说对了，颜色和种类却都说成一样。第 50 步大半说对了，第 90 步几乎全对。损失曲线上也看得出来。
#
# ## 平台
#
# 设想一个语法完美、但什么也看不见的模型。它知道描述该怎么写，但图里有几样东西、在哪儿、是什么、什么颜色、多大，只能猜。演示的世界很小：16 个种类、八种颜色、两种大小、四个位置。种类和颜色的 128 种组合里，有 12 种从不出现在训练图片中，留给选设置和测试。所以不用训练，就能算出靠猜的损失有多大：$n$ 种情况可能性相同时，猜中的概率是 $1/n$，损失是 $\ln n$。损失相加时的单位叫*奈特*（nat），即以自然对数计的单位。

# %%
from itertools import combinations
from math import comb, log

from demo.scenes import COLOURS, KINDS, PLACES, home

pairs = sum(home(kind, colour) == "train" for kind in range(len(KINDS)) for colour in COLOURS)
share_kept = pairs / (len(KINDS) * len(COLOURS))  # a scene with a pair that is kept for tests is drawn anew
chance = {1: 0.2, 2: 0.3, 3: 0.3, 4: 0.2}  # of so many things in an image, see demo/scenes.py
sets = {}  # of places: how likely it is
for count, p in chance.items():
    for places in combinations(range(len(PLACES)), count):
        sets[places] = p / comb(len(PLACES), count) * share_kept**count
total = sum(sets.values())
nats = sum(p / total * (-log(p / total) + len(places) * log(2 * pairs)) for places, p in sets.items())
tokens = sum((batch["labels"] >= 0).sum().item() for batch in batches) / len(data)
blind = nats / tokens
print(f"guessing costs {nats:.1f} nats for a caption of {tokens:.1f} tokens: {blind:.2f} per token")

# %%
MEANINGS = {"size": ["large", "small"], "place": ["top", "bottom", "left", "right"], "colour": COLOURS, "kind": KINDS}
words = [processor.tokenizer.decode(token).strip() for token in targets[targets >= 0]]
parts = {name: np.isin(words, list(listed)) for name, listed in MEANINGS.items()}
parts["grammar"] = ~np.any([*parts.values()], axis=0)
by_part = {
    name: {step: each[torch.tensor(of)].mean().item() for step, each in surprise.items()} for name, of in parts.items()
}
guess = {"colour": log(len(COLOURS)), "kind": log(len(KINDS))}

known = next(step for step, loss in by_part["grammar"].items() if loss < 0.2)
seen = next(step for step in surprise if any(by_part[name][step] < cost for name, cost in guess.items()))
shelf = range(known, seen)
assert len(shelf) >= 5 and by_part["size"][known] < log(2) and blind < np.mean(losses[known:seen]) < 1.5 * blind
assert np.mean(losses[-8:]) < blind / 2
curves.shelf(losses, shelf, blind, by_part, guess)

# %% [markdown] lang="en"
# On the left, the loss goes below the dashed line, that of a blind model. **There it must be looking at the image**: it cannot know captions by heart, as each image comes only once. On the right, grammar comes first, then size and place. Where it is shaded, kind and at first colour still cost more than a guess (dotted): this is the *shelf*. The model writes well and does not yet see what things are. Here it is short, and the loss falls on; in a harder task it may be long and flat.
#
# Token by token, for one image (darker: more surprise):

# %% [markdown] lang="zh"
# 左图里，损失最后降到虚线以下，比任何看不见图的模型都低：**这时它一定在看图**。每张图只出现一次，所以不可能是靠背答案。右图把词分成几类，看每一类让模型多意外：最先学会的是语法，大小和位置紧随其后；在阴影那一段，种类还不如瞎猜（点线），颜色起初也是。这一段就是*平台*：话已经说通顺了，却还没看懂图里是什么。这里的平台很短，损失也一直在降；任务更难时，它可能又长又平。
#
# 再看第一张图的每个词元。颜色越深，表示模型越意外：

# %%
count = (targets[0] >= 0).sum()
curves.surprises(np.asarray(new[0]["images"][0]), words[:count], {step: surprise[step][:count] for step in captions})

# %% [markdown] lang="en"
# In the first row even the sentence's form surprises the model. In the second, colours and kinds are still dark. (*Yellow* and *one* are lighter, as it says them of everything then.)
#
# ## The same by the package
#
# Now the real trainer, as you start it: `run_zero2.sh`, two processes under ZeRO-2 (lesson 8), each with half of every batch. All else is the same. It keeps its losses in a file.

# %% [markdown] lang="zh"
# 第一行里，连句子怎么往下接都让模型意外。到了第二行，还深的是颜色和种类（yellow 和 one 浅一些，因为那时模型对什么都这样说）。
#
# ## 换成本仓库的训练程序
#
# 现在用真正的训练程序，启动方式和你平时一样：`run_zero2.sh`，两个进程，用 ZeRO-2（第 8 课），每个批次各算一半。模型、数据、随机种子和学习率都相同。它把损失存在一个文件里，我们从那里读出来。

# %%
import json

from tutorial.tools.commands import run_zero2

run_zero2(
    f"MODEL={FOLDER}/model DATA={FOLDER}/data TRAIN_TYPE=projector OUTPUT_DIR={FOLDER}/run GLOBAL_BATCH={SIZE}",
    f"--max_steps {STEPS} --learning_rate {RATE} --warmup_steps {WARM_UP} --adam_beta2 0.95 --seed 0"
    " --logging_steps 1 --save_strategy no --report_to none",
)
log_history = json.loads((FOLDER / "run" / "trainer_state.json").read_text())["log_history"]
theirs = [entry["loss"] for entry in log_history if "loss" in entry]
assert np.allclose(losses, theirs, atol=1e-3)

# %%
curves.both(losses, theirs)

# %% [markdown] lang="en"
# ## What we see
#
# One curve hides the other. The differences are those of rounding: two processes add the same numbers in another order. So a trainer learns exactly as our loop does. What it adds is what a training of days on many GPUs needs:
#
# | the loop above | the package | why |
# |---|---|---|
# | one process | several share each batch, and under ZeRO-2 gradients and optimizer states as well | faster, and less memory on each GPU ([lesson 8](08_zero.ipynb)) |
# | fp32, numbers of 4 bytes | on GPUs bf16, 2 bytes, with the optimizer in fp32 | frozen weights and intermediate results take half the memory; faster |
# | logits (scores of the next token) at all positions | only where there is a label | a real vocabulary has 150,000 entries |
# | in any order; above we borrow the package's | the longest records first | if memory is too small, the first step shows it |
# | a crash loses everything | checkpoints, and it resumes at the same step | days of work are not lost |
# | NaN goes on | stops, and names step and records | no hours of useless work |

# %% [markdown] lang="zh"
# ## 我们看到
#
# 一条曲线盖住了另一条。差别只是舍入误差：两个进程把同样的数按另一种顺序相加。可见 Trainer 的学习方法和我们的循环完全一样，它多做的，是在许多 GPU 上连续训练几天所需要的事：
#
# | 上面的循环 | 本仓库 | 为什么 |
# |---|---|---|
# | 一个进程 | 多个进程分摊每个批次；ZeRO-2 还分摊梯度和优化器状态 | 更快，每块 GPU 占的显存更少（[第 8 课](08_zero.ipynb)） |
# | fp32，每个数 4 字节 | GPU 上用 bf16，每个数 2 字节，优化器仍用 fp32 | 冻结的权重和中间结果只占一半显存，而且更快 |
# | 每个位置都算 logits（下一个词元的得分） | 只在有标签的位置算 | 真实词表有 15 万项 |
# | 顺序随意；上面借用了本仓库的 | 最长的数据排在最前 | 显存不够，第一步就能发现 |
# | 崩溃就全没了 | 有检查点，从同一步续训 | 免得几天的成果丢失 |
# | 出现 NaN 也照跑 | 停下来，说明是哪一步、哪些数据 | 免得白算几小时 |

# %% [markdown] lang="en"
# ## Common questions
#
# **If memory is too small for a batch of 16, can I add up the gradients of four batches of 4?** Yes, this is *accumulation*, and it is the same if each part counts by its tokens with a label. If all parts count alike, a short answer weighs too much. The first cell below shows both. The trainer counts tokens.
#
# **Why does the loss not begin at $\ln 896 = 6.8$, as for guessing among all tokens?** The language model knows the language already. It is the projector that is new.
#
# **Why is the language model frozen at first?** The projector is random, so its vectors are noise, and the model would change good weights to fit them. The second cell below compares the gradients that it would get before and after the projector is trained.
#
# **What are a step and an epoch?** A step is once around the circle in the first figure. An epoch is as many steps as it takes to see each record once: here all 90.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **显存放不下 16 条的批次，可以把四个 4 条的批次的梯度加起来吗？** 可以，这叫*梯度累积*（accumulation）。只要每一份按有标签的词元数加权，结果就一样；如果每份权重相同，短回答的分量就过重了。下面第一段代码两种都试了。训练程序是按词元数加权的。
#
# **损失为什么不是从 $\ln 896 = 6.8$（在所有词元里瞎猜）开始？** 语言模型早就会说话了，新的只是投影层。
#
# **为什么一开始要冻结语言模型？** 投影层是随机的，给出的向量是噪声；不冻结的话，语言模型会为了迁就噪声而改坏自己的权重。下面第二段代码比较了投影层训练前后，语言模型本来会收到多大的梯度。
#
# **什么是一步（step），什么是一轮（epoch）？** 第一张图里转一圈是一步；把每条数据都看一遍是一轮，这里正好 90 步。

# %%
whole = batches[-1]
pieces = [{name: value[at : at + 4] for name, value in whole.items()} for at in range(0, SIZE, 4)]
counts = [(piece["labels"] >= 0).sum() for piece in pieces]


def gradient(parts, weights):
    """Of the projector, summed over parts of a batch."""
    projector.zero_grad()
    for part, weight in zip(parts, weights, strict=True):
        (model(**part).loss * weight).backward()
    return projector.linear_1.weight.grad.clone()


right = gradient([whole], [1])
by_tokens = gradient(pieces, [count / sum(counts) for count in counts])
alike = gradient(pieces, [1 / 4] * 4)
print(f"answer tokens of the four parts: {[count.item() for count in counts]}")
print(f"by tokens: wrong by {(by_tokens - right).norm() / right.norm():.4%}")
print(f"alike:     wrong by {(alike - right).norm() / right.norm():.1%}")
assert torch.allclose(by_tokens, right, atol=1e-4)

# %%
language, trained = model.model.language_model, {name: w.clone() for name, w in projector.state_dict().items()}
language.requires_grad_(True)
for name, weights in ("random projector", start), ("trained projector", trained):
    projector.load_state_dict(weights)
    model(**whole).loss.backward()
    print(f"{name:<18} gradient of the language model: {clip_grad_norm_(language.parameters(), 1e9):.1f}")
    model.zero_grad()
_ = language.requires_grad_(False)

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Take the mean loss of the last eight steps. Which probability of the right token does it stand for? (The loss is the mean of $-\ln p$, so this is the geometric mean of the p.) What is it on the shelf (`shelf` holds its steps)?
#
# 🐕 **Middle.** Train the projector from its start, 24 steps each, with a tenth of the rate and with a hundred times the rate. Guess first: which loss ends highest?
#
# 🦁 **Hard.** Train 40 steps from the start, with each caption beside the image of another record. Does the loss get below `blind`?

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 取最后八步损失的平均值。它相当于多大的正确词元概率？（损失是 $-\ln p$ 的平均值，所以算出来的是 p 的几何平均。）平台上（`shelf` 是平台的那些步）又是多少？
#
# 🐕 **中等。** 让投影层回到起点，学习率分别取十分之一和一百倍，各训练 24 步。先猜一猜：哪个损失最后最高？
#
# 🦁 **困难。** 让投影层回到起点，给每条描述配上另一条数据的图片，训练 40 步。损失会降到 `blind` 以下吗？

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 From $\text{loss} = -\ln p$ follows $p = e^{-\text{loss}}$. The shelf lies above `blind`: there the model is still worse than one that guesses well.

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 由 $\text{loss} = -\ln p$ 得 $p = e^{-\text{loss}}$。平台在 `blind` 之上：这时模型还不如一个很会猜的“盲人”。

# %% tags=["solution"]
last = float(np.mean(losses[-8:]))
slow = float(np.mean(losses[shelf.start : shelf.stop]))
print(f"loss {last:.2f}: p = {np.exp(-last):.2f}; on the shelf {slow:.2f}: p = {np.exp(-slow):.2f}; blind {blind:.2f}")

# %% [markdown] lang="en"
# 🐕 The small rate ends highest: the loss falls, but has come less far. Too large a rate makes each step overshoot: it gets down as fast, but ends above the right one.

# %% [markdown] lang="zh"
# 🐕 最后最高的是小学习率：损失在降，只是还没降多少。太大，每一步都迈过了头：损失起初降得一样快，后来却停在更高的地方。

# %% tags=["solution"]
tries = {RATE: losses[:24]}
for rate in (RATE / 10, RATE * 100):
    projector.load_state_dict(start)
    tries[rate] = train(batches[:24], rate)
assert np.mean(tries[RATE][-4:]) == min(np.mean(each[-4:]) for each in tries.values())
for rate in sorted(tries):
    print(f"rate {rate:.0e}: loss {np.mean(tries[rate][-4:]):.2f}")

# %% [markdown] lang="en"
# 🦁 It falls, too, but stays above the line; with the right images it is below by then. The captions are the same, so grammar can be learned. But an image now says nothing about its caption. If your own training does this, look for what takes the image away ([lesson 10](10_diagnosis.ipynb)).

# %% [markdown] lang="zh"
# 🦁 损失起初也在降，却一直停在虚线上方；图片配对的那次，这时已经在虚线以下。描述没变，所以语法学得会；图片和描述对不上，所以内容学不到。如果你自己的训练也这样，就去查是哪里让图片失效了（[第 10 课](10_diagnosis.ipynb)）。

# %% tags=["solution"]
projector.load_state_dict(start)
mixed = [batch | {"pixel_values": batch["pixel_values"].roll(1, 0)} for batch in batches[:40]]
lost = train(mixed)
print(
    f"last eight steps: {np.mean(lost[-8:]):.2f}; with the right images {np.mean(losses[32:40]):.2f}; blind {blind:.2f}"
)
assert np.mean(losses[32:40]) < blind < np.mean(lost[-8:])

# %% [markdown] lang="en"
# Next lesson: [what to train and what to freeze](07_strategies.ipynb).

# %% [markdown] lang="zh"
# 下一课：[训练什么，冻结什么](07_strategies.ipynb)。
