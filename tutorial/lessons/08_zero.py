# %% [markdown] lang="en"
# # 8. ZeRO-2 and memory
#
# Training needs several times the memory of the weights. With two GPUs one would expect half of it on each. Plain data parallelism, in which each GPU works on other samples, does not do that: each GPU keeps everything. ZeRO divides it among the GPUs. This lesson shows what is divided and what the GPUs send each other for it. Then two real processes on your CPU show that the parts together are the whole.
#
# ## What you will know
#
# - what a trained weight costs: 16 bytes, and why;
# - what the stages 1, 2 and 3 of ZeRO divide, and how much each sends;
# - why ZeRO-2 helps a full training a lot, and LoRA hardly at all;
# - which training tricks save memory, and which save time.

# %% [markdown] lang="zh"
# # 8. ZeRO-2 与显存
#
# 训练要的显存是权重本身的好几倍。用两块 GPU，总以为每块只要一半，普通的数据并行（每块 GPU 处理不同的样本）却不是这样：每块 GPU 都存着全部内容。ZeRO 把它们分开存。这一课看它分了什么、为此要传什么；然后在你的 CPU 上起两个真实的进程，验证各份拼起来正好是全部。
#
# ## 你会学到
#
# - 训练一个权重要 16 字节，这 16 字节是怎么来的；
# - ZeRO 的 1、2、3 三个阶段各分什么、各传什么；
# - 为什么 ZeRO-2 对全量训练帮助很大，对 LoRA 却几乎没用；
# - 哪些训练技巧省显存，哪些省时间。

# %% tags=["figure"]
from tutorial.tools.quiet import quiet

quiet()

import json
from pathlib import Path

import numpy as np
import torch

from train_llava.model.freeze import LoraSettings
from tutorial.figures import memory
from tutorial.figures.memory import gib, memory_model
from tutorial.tools import two_ranks

memory.owners()

# %% [markdown] lang="en"
# ## Who keeps what
#
# Each column is a GPU; what it keeps is coloured. A training keeps three kinds of numbers from step to step:
#
# - the **weights**, which the forward and the backward pass read;
# - the **gradients**, one for each trained weight: how the loss changes with this weight;
# - the **optimizer states**: AdamW remembers two running means for each trained weight, of its gradient and of the gradient's square: its two **moments**. And in mixed precision (computing in 16 bits, updating in 32) there is a copy of the weight in 32 bits, the **master copy**, so that small updates are not rounded away.
#
# In bf16, a format of 16 bits, a weight takes 2 bytes. Everything together takes eight times as much:

# %% [markdown] lang="zh"
# ## 谁存什么
#
# 每一列是一块 GPU，涂色的是它要存的部分。训练时长期占着显存的有三种数：
#
# - **权重**，前向和反向都要读；
# - **梯度**，每个要训练的权重一个，表示损失怎样随它变化；
# - **优化器状态**：AdamW 为每个要训练的权重记两个滑动平均，一个是梯度的，一个是梯度平方的，叫作一阶、二阶**矩**（moment）；混合精度（用 16 位计算，用 32 位更新）下还有一份 32 位的权重，即**主副本**（master copy），免得很小的更新被舍入掉。
#
# bf16 是一种 16 位的格式，一个权重占 2 字节；全部加起来是它的八倍：

# %%
BYTES = {"weight": 2, "gradient": 2, "master copy": 4, "first moment": 4, "second moment": 4}
print(" + ".join(f"{size} ({name})" for name, size in BYTES.items()), "=", sum(BYTES.values()), "bytes")
assert sum(BYTES.values()) == 16

# %% [markdown] lang="en"
# ## The real size
#
# Here is CLIP-ViT-L/336 with Qwen1.5-4B under `freeze_vision`, which trains the projector and the language model. The numbers are those of `train_llava.estimate`, which knows the shapes of all weights and counts them, but loads none.

# %% [markdown] lang="zh"
# ## 真实的大小
#
# 下面是 CLIP-ViT-L/336 加 Qwen1.5-4B，用 `freeze_vision` 训练，也就是训练投影层和语言模型。数字来自 `train_llava.estimate`：它知道每个权重的形状，只计数，不加载任何权重。

# %% tags=["figure"]
full = memory_model("freeze_vision")
memory.by_gpus(full)

# %% [markdown] lang="en"
# On one GPU there is nothing to divide: all four bars are alike. On eight, ZeRO-2 brings what a GPU keeps far below 24 GB. The same by hand: 2 bytes for every weight, and the other 14 of each trained weight divided among the GPUs.

# %% [markdown] lang="zh"
# 只有一块 GPU 时没有别的卡分担，四根柱子一样高。八块时，ZeRO-2 让每块 GPU 存的内容远低于 24 GB。手算一遍：所有权重每个 2 字节，要训练的权重另外 14 字节由各块 GPU 平分。

# %%
N = full.trained
for gpus in (1, 2, 8):
    by_hand = (2 * full.all_weights + (2 + 12) * N / gpus) / 2**30
    print(f"{N:,} trained weights, ZeRO-2 on {gpus}: {by_hand:.2f} GiB each")
    assert abs(by_hand - sum(gib(full, 2, gpus).values())) < 0.01
assert sum(gib(full, 2, 8).values()) < 20

# %% [markdown] lang="en"
# **Activations** come on top: what the forward pass keeps for the backward pass. So does, while the optimizer works, a copy of the gradients in 32 bits: 4 more bytes for each trained weight, divided as the optimizer states are. Activations grow with the batch, belong to each GPU's own samples, and are not divided. [Lesson 12](12_real_size.ipynb) counts them. (Try it: [ZeRO](../interactive/zero.html).)
#
# ## ZeRO in ten lines
#
# AdamW updates each weight by itself. So it does not matter who updates which weight. Each **rank** (one process, one GPU; not LoRA's r) takes the mean of all ranks' gradients for its own part only, and updates that part. Then all ranks collect all parts. The first transfer is called **reduce-scatter**, the second **all-gather**.

# %% [markdown] lang="zh"
# 此外还有**激活值**：前向时留给反向用的中间结果。它随批次变大，属于各 GPU 自己的样本，不分。[第 12 课](12_real_size.ipynb)会把它算进去。优化器更新时还要一份 32 位的梯度：每个被训练的权重再加 4 字节，和优化器状态一样分摊。（动手试试：[ZeRO](../interactive/zero.html)。）
#
# ## 十行写出 ZeRO
#
# AdamW 对每个权重的更新互不相干，所以哪个权重由谁来更新都一样。每个 **rank**（一个进程，一块 GPU）只对自己那一份求所有 rank 梯度的平均，只更新那一份，然后所有 rank 把各份收齐。前一次传输叫 **reduce-scatter**，后一次叫 **all-gather**。

# %%
torch.manual_seed(0)
weights, gradients = torch.randn(1000), torch.randn(4, 1000)  # of four ranks, each on its own samples
whole = weights.clone().requires_grad_()  # without ZeRO: every rank does all of this
whole.grad = gradients.mean(0)
torch.optim.AdamW([whole], lr=0.1).step()

updated = []
for rank in range(4):
    part = slice(rank * 250, (rank + 1) * 250)
    mine = weights[part].clone().requires_grad_()
    mine.grad = gradients[:, part].mean(0)  # reduce-scatter: the mean, of this part alone
    torch.optim.AdamW([mine], lr=0.1).step()  # moments of 250 weights instead of 1000
    updated.append(mine.detach())
assert torch.equal(torch.cat(updated), whole.detach())  # all-gather: everybody has all parts
print("ZeRO by hand gives the same weights, bit for bit")

# %% [markdown] lang="en"
# And what does it cost? Without ZeRO, all ranks get the mean of all gradients by an **all-reduce**, which itself is a reduce-scatter and an all-gather. So stages 1 and 2 send as much as a training without ZeRO. In stage 3 no rank has whole weights: it gathers them for the forward pass and once more for the backward pass, and sends half as much again. (The frozen tower is small, and not counted here.)

# %% [markdown] lang="zh"
# 代价呢？不用 ZeRO 时，所有 rank 靠 **all-reduce** 得到梯度的平均，它本身就是一次 reduce-scatter 加一次 all-gather。所以阶段 1 和 2 的传输量和不用 ZeRO 时一样。阶段 3 的 rank 手里没有完整的权重，前向要收一遍，反向再收一遍，传输量多出一半。（冻结的视觉塔很小，这里没有计入。）

# %%
gpus = 8
once = (gpus - 1) / gpus * 2 * N / 1e9  # GB that a GPU sends in one reduce-scatter or all-gather of bf16 numbers
transfers = {"without ZeRO": 2, "ZeRO-1": 2, "ZeRO-2": 2, "ZeRO-3": 3}
print("GB sent by each GPU in a step:", {name: round(times * once, 1) for name, times in transfers.items()})

# %% [markdown] lang="en"
# ## Two real ranks
#
# `tutorial/tools/two_ranks.py` trains the demo's language model on random words with DeepSpeed, three steps under each stage; stage 0 is training without ZeRO. It starts two processes, which talk through Gloo, a library for such transfers that works on CPUs. Afterwards each counts what it keeps.

# %% [markdown] lang="zh"
# ## 两个真实的 rank
#
# `tutorial/tools/two_ranks.py` 用 DeepSpeed 在随机的词上训练演示的语言模型，ZeRO 的每个阶段三步；阶段 0 就是不用 ZeRO。它起两个进程，通过 Gloo（一个在 CPU 上也能用的通信库）交换数据。训练完，每个进程数一数自己存了多少。

# %%
found = two_ranks.run()
for stage, each in found.items():
    for rank, kept in enumerate(each["ranks"]):
        print(f"stage {stage}, rank {rank}: {kept['weights']:>9,} weights, {kept['moments']:>9,} moments")

# %% tags=["figure"]
memory.real_ranks(found)

# %% [markdown] lang="en"
# ## What we see
#
# From stage 1 on each rank keeps half of the moments; together they are exactly two for each weight. In stage 3 each rank keeps half of the weights as well. And the losses are the same at every stage: ZeRO changes where the numbers lie, not which numbers they are. (Stages 1 and 2 look alike here: they differ in the gradients alone, and these are cleared after a step.)

# %% [markdown] lang="zh"
# ## 我们看到
#
# 从阶段 1 起，每个 rank 只存一半的矩，合起来正好每个权重两个。阶段 3 连权重也只存一半。而且每个阶段的损失都相同：ZeRO 改变的只是数放在哪里，不改变数本身。（阶段 1 和 2 在这里看不出差别：它们只差在梯度上，而一步结束后梯度就清掉了。）

# %%
for stage, each in found.items():
    moments = sum(kept["moments"] for kept in each["ranks"])
    assert moments == 2 * each["trained"] * (2 if stage == "0" else 1)  # without ZeRO both ranks keep all
    assert np.allclose(each["losses"], found["0"]["losses"], atol=1e-3)
    print(f"stage {stage}: {moments:,} moments of {each['trained']:,} weights, losses {np.round(each['losses'], 2)}")

# %% [markdown] lang="en"
# How much there is to divide depends on the strategy ([lesson 7](07_strategies.ipynb)). `use_lora` and `projector` train so few weights that nearly all the memory holds frozen ones, and ZeRO-2 does not divide weights:

# %% [markdown] lang="zh"
# 能分多少，取决于训练策略（[第 7 课](07_strategies.ipynb)）。用 `use_lora` 或 `projector` 时，要训练的权重很少，显存几乎全被冻结的权重占着，而 ZeRO-2 不分权重：

# %% tags=["figure"]
memories = {name: memory_model(name) for name in ("projector", "use_lora", "freeze_vision", "none")}
memory.by_strategy(memories)

# %% [markdown] lang="en"
# Memory is one limit, time the other. Some tricks save one, some the other. These were measured on two CPU cores, each as one change to a plain run (`benchmarks/results/tricks.json`); the bars say how many times as fast it became, the GB how much memory it took:

# %% [markdown] lang="zh"
# 显存是一道坎，时间是另一道。训练技巧有的省显存，有的省时间。下面的结果在两个 CPU 核上测得，每次只改一项（`benchmarks/results/tricks.json`），柱长是速度的倍数，GB 是占用的内存：

# %% tags=["figure"]
memory.tricks(json.loads(Path("benchmarks/results/tricks.json").read_text())["rows"])

# %% [markdown] lang="en"
# - If most time goes into reading images: **workers**, processes that decode images while the step runs (`--dataloader_num_workers`). `--dataloader_persistent_workers true` keeps them from one epoch to the next. `--dataloader_pin_memory true` helps GPUs only.
# - If memory is short: **accumulation** adds up the gradients of several small batches before one step. **Gradient checkpointing** computes activations again in the backward pass instead of keeping them; the deeper the model, the more memory this saves, and it costs time.
# - If the processor has instructions for it: **bf16**, for speed. **Packing** puts several short records into one row, **length grouping** those of like length into one batch: less padding. Here bf16 saves no memory, as without DeepSpeed the weights stay in fp32; and packing is slower: on a CPU, attention also computes what may not be looked at.
#
# ## Common questions
#
# **What exactly does ZeRO-2 divide?** Gradients and optimizer states of the *trained* weights. Not the weights, not the activations.
#
# **Does it help on one GPU?** No, see the bars. Choose LoRA there, or `ds_configs/zero2_offload.json`, which keeps the optimizer in the CPU's memory.
#
# **Why not always ZeRO-3?** It sends half as much again, and each layer has to wait for its weights. Take it when the weights alone do not fit.
#
# **Out of memory: what first?** Fewer samples at a time and more accumulation. Then gradient checkpointing. `python -m train_llava.estimate` says beforehand what fits.
#
# **Does accumulation change the result?** No: the gradient of a sum is the sum of the gradients. Only the loss must be divided by the number of labels in the whole step, which this repository does.

# %% [markdown] lang="zh"
# - 如果时间主要花在读图片上，就多开几个 **worker**，也就是一边训练一边解码图片的进程（`--dataloader_num_workers`）。`--dataloader_persistent_workers true` 让它们在各轮（epoch）之间一直留着。`--dataloader_pin_memory true` 只对 GPU 有用。
# - 如果显存不够：**梯度累积**把几个小批次的梯度加起来，再更新一次。**梯度检查点（gradient checkpointing）** 不保存激活值，反向传播时重算；模型越深，省得越多，但要多花时间。
# - 如果处理器有 bf16 指令，就用 **bf16** 提速。**packing** 把几条短数据拼进一行，**length grouping** 把长度相近的放进一批，填充都会变少。图里 bf16 没有省内存，因为不用 DeepSpeed 时权重仍是 fp32；packing 反而更慢，因为在 CPU 上，不该看的位置注意力也照样算了。
#
# ## 常见问题
#
# **ZeRO-2 到底分了什么？** 被训练的权重的梯度和优化器状态。权重不分，激活值也不分。
#
# **只有一块 GPU，有用吗？** 没用，看柱状图就知道。这时可以选 LoRA，或者用 `ds_configs/zero2_offload.json`，把优化器放到 CPU 内存里。
#
# **为什么不一直用 ZeRO-3？** 它的传输量多一半，而且每一层都要等自己的权重到齐。权重本身放不下时再用它。
#
# **显存不够，先改什么？** 先减小每次的样本数、加大梯度累积，再开梯度检查点。`python -m train_llava.estimate` 能提前算出放不放得下。
#
# **梯度累积会改变结果吗？** 不会：和的梯度等于梯度的和。只是损失要除以整个一步的标签数，本仓库就是这样做的。

# %%
model, samples = torch.nn.Linear(8, 1), torch.randn(32, 8)
at_once = torch.autograd.grad(model(samples).sum(), model.weight)[0]
for few in samples.split(4):  # eight small batches of four
    model(few).sum().backward()  # adds to the gradient
assert torch.allclose(model.weight.grad, at_once, atol=1e-4)
print("32 samples at once, and 8 times 4: the same gradient")

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Each GPU may keep at most 16 GiB of weights, gradients and optimizer states. How many GPUs does `none` need under ZeRO-2? And under ZeRO-3? (`gib(memories["none"], stage, gpus)` gives the parts.)
#
# 🐕 **Middle.** LoRA of rank 128 instead of 32: how much larger are the optimizer states? (Give `memory_model` a `LoraSettings(lora_r=128)`.)
#
# 🦁 **Hard.** Write the forward pass of ZeRO-3: four ranks keep a quarter of each layer, and gather a layer only while they need it. How many weights does a rank hold at most?
#
# ## Solutions
#
# 🐢 Under ZeRO-2 every GPU keeps all weights, which takes half of the 16 GiB; the other 14 bytes of each trained weight must fit into the other half. ZeRO-3 divides all 16 bytes.
#
# 🐕 The matrices of the adapters are four times as large, and so are their states. The projector is trained as well, and its states stay as they are. So the whole grows less than four times.
#
# 🦁 Its quarter of everything, and the other three quarters of one layer: with many layers, little more than a quarter of the model.

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 要让每块 GPU 存的权重、梯度和优化器状态不超过 16 GiB，用 `none` 训练时 ZeRO-2 要几块 GPU？ZeRO-3 呢？（`gib(memories["none"], stage, gpus)` 给出各部分的大小。）
#
# 🐕 **中等。** LoRA 的秩从 32 改成 128，优化器状态会大多少？（给 `memory_model` 传 `LoraSettings(lora_r=128)`。）
#
# 🦁 **困难。** 写出 ZeRO-3 的前向：四个 rank 各存每一层的四分之一，用到哪层才收齐哪层。一个 rank 最多同时存多少权重？
#
# ## 答案
#
# 🐢 ZeRO-2 不分权重，16 GiB 的一半一开始就被占掉了，每个被训练的权重另外 14 字节要挤进剩下的一半。ZeRO-3 把 16 字节全部平分。
#
# 🐕 适配器的矩阵变成四倍，它们的状态也是；投影层也在训练，它的状态大小不变。所以总共不到四倍。
#
# 🦁 全部的四分之一，外加当前这一层的另外四分之三：层数多时，只比整个模型的四分之一多一点。

# %% tags=["solution"]
for stage in (2, 3):
    fits = next(gpus for gpus in range(1, 100) if sum(gib(memories["none"], stage, gpus).values()) <= 16)
    print(f"ZeRO-{stage}: {fits} GPUs")

# %% tags=["solution"]
large = memory_model("use_lora", LoraSettings(lora_r=128))
before, after = (gib(each, 2, 1)["optimizer"] for each in (memories["use_lora"], large))
print(f"{before:.2f} GiB with rank 32, {after:.2f} GiB with rank 128: {after / before:.2f} times")

# %% tags=["solution"]
layers = [torch.randn(64, 64) / 8 for _ in range(10)]
shares = [[layer.chunk(4)[rank] for layer in layers] for rank in range(4)]
start = x = torch.randn(1, 64)
for parts in zip(*shares, strict=True):
    gathered = torch.cat(parts)  # all-gather; before the next layer only the share is left
    x = torch.tanh(x @ gathered)
most = sum(share.numel() for share in shares[0]) + gathered.numel() * 3 // 4
for layer in layers:
    start = torch.tanh(start @ layer)
assert torch.allclose(x, start)
print(f"{most:,} of {sum(layer.numel() for layer in layers):,} weights at most")

# %% [markdown] lang="en"
# Next lesson: [ask the trained model](../../code05_infer.ipynb).

# %% [markdown] lang="zh"
# 下一课：[向训练好的模型提问](code05_infer.ipynb)。
