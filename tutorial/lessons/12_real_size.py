# %% [markdown] lang="en"
# # 12. The real size
#
# So far everything ran on a CPU, with a model of two million weights. The real one, CLIP-ViT-L/336 with Qwen1.5-4B, has two thousand times as many, and runs on GPUs that you pay for by the hour. Before you rent one, make a plan: memory, hours, money, downloads, and what to do first. This lesson makes one. It reads configs only: no GPU, no download.
#
# ## What you will know
#
# - which strategy fits into which GPU;
# - what an epoch takes in hours and in money, and how far to trust such numbers;
# - where models and data are, and how to get them in China;
# - in which order to work, so that a mistake costs minutes and not days.

# %% [markdown] lang="zh"
# # 12. 真实规模
#
# 前面的课都在 CPU 上跑，模型只有两百万个参数。真正的模型是 CLIP-ViT-L/336 加 Qwen1.5-4B，大了约两千倍，要在按小时付费的 GPU 上训练。租卡之前先做一份计划：显存、时间、费用、下载，还有先做什么后做什么。这一课就来做计划。全课只读配置文件，不用 GPU，也不下载。
#
# ## 你会学到
#
# - 哪种训练策略放得进哪种 GPU；
# - 训练一轮要多少小时、多少钱，这些数能信到什么程度；
# - 模型和数据在哪里下载，国内怎么下；
# - 按什么顺序做，才能让一个错误只浪费几分钟，而不是几天。

# %% tags=["figure"]
from tutorial.tools.quiet import quiet

quiet()

import torch

from train_llava.estimate import memory_budget, zero_config
from train_llava.model.config import compose_config, read_text_config, read_vision_config
from train_llava.planning.memory import MemoryModel
from train_llava.planning.meta_model import meta_model
from train_llava.planning.workload import Workload
from tutorial.figures import costs
from tutorial.tools.commands import run

CONFIGS = "benchmarks/full_size/configs"  # two published config.json; no weights
config = compose_config(read_vision_config(f"{CONFIGS}/clip", "--clip"), read_text_config(f"{CONFIGS}/qwen", "--qwen"))
work = Workload.assumed(batch_size=4, tokens=620, image_tokens=576)  # 4 samples at a time on each GPU
STRATEGIES = ["projector", "use_lora", "freeze_vision", "none"]
models = {strategy: meta_model(config, torch.bfloat16, strategy) for strategy in STRATEGIES}
memory = {strategy: MemoryModel.of(model) for strategy, model in models.items()}


def peak(strategy: str, gpus: int) -> float:
    """GiB on each GPU at the fullest moment of a step, under ZeRO-2."""
    zero = zero_config("ZeRO-2", gpus, config.text_config.hidden_size, strategy)
    return memory[strategy].peak(work.batch, zero, checkpointing=False) / 2**30


def parts(strategy: str, gpus: int) -> dict[str, float]:
    """What the peak is made of, in GiB."""
    zero, needs = zero_config("ZeRO-2", gpus, config.text_config.hidden_size, strategy), memory[strategy]
    states = {"weights": needs.weights, "gradients": needs.gradients(zero), "optimizer": needs.optimizer(zero)}
    states = {name: size / 2**30 for name, size in states.items()}
    return states | {"on top, at the peak": peak(strategy, gpus) - sum(states.values())}


costs.memory_bars({gpus: {strategy: parts(strategy, gpus) for strategy in STRATEGIES} for gpus in (1, 8)})

# %% [markdown] lang="en"
# ## Does it fit?
#
# Each bar is the memory of one GPU at the fullest moment of a training step, with four samples at a time. A dotted line is what a card has room for. *On top* is what a step needs beside weights, gradients and optimizer: activations, or the copies that the optimizer makes. The orange part is Adam's: twelve bytes for each trained weight. LoRA trains few, so it has hardly any orange. `freeze_vision` trains billions. Eight GPUs share the orange and the blue among them: that is ZeRO-2 (lesson 8).
#
# One command prints this for your own case. It builds the model without weights and counts. (`run` starts a command inside the notebook; in a terminal, type `python -m` before it.)

# %% [markdown] lang="zh"
# ## 放得下吗？
#
# 每个横条是一张卡在一步中最吃紧时占的显存，每次四条样本。竖的点线是一张卡能放下的上限。浅灰色（on top）是权重、梯度、优化器之外还要的：激活值，或者优化器更新时临时做的副本。请看橙色：每个要训练的参数，Adam 要存 12 个字节。LoRA 训练的参数少，几乎没有橙色；`freeze_vision` 要训练几十亿个参数，八张卡把橙色和蓝色分摊掉，这正是 ZeRO-2 的用意（第 8 课）。
#
# 换成你自己的情况，一行命令就能算。它搭一个没有权重的模型来数。（`run` 在 notebook 里运行一条命令；在终端里，前面加上 `python -m` 即可。）

# %%
run(
    "train_llava.estimate --train_type use_lora --num_gpus 8 --gpu rtx4090-24g a100-80g h100-80g"
    f" --vision_model_name_or_path {CONFIGS}/clip --language_model_name_or_path {CONFIGS}/qwen"
)

# %% [markdown] lang="en"
# Read it from below. *Largest batch per GPU* says whether a strategy fits at all, and with which help. `c` is gradient checkpointing, which computes activations twice instead of keeping them; `co` also keeps the optimizer in main memory. *Hours/epoch* is the time for 595,375 records, the size of the data set below.
#
# ## How far can you trust the hours?
#
# Here is one measured run, beside its estimate.

# %% [markdown] lang="zh"
# 从下往上读。largest batch per GPU 告诉你一种策略到底放不放得下，要靠什么手段：`c` 是梯度检查点（gradient checkpointing），不保存激活值，用到时再算一遍；`co` 是再把优化器放到内存里。上面的 hours/epoch 是把 595,375 条数据（也就是下文那个数据集）训练一轮的小时数。
#
# ## 这些小时数能信吗？
#
# 估计值要和实测对照才有意义。下面是一次真实测量，旁边是对同一情况的估计。

# %%
import json
from pathlib import Path
from statistics import median

from train_llava.estimate import used_on_device
from train_llava.planning.roofline import GPUS
from train_llava.planning.speed import Speed


def read(name: str) -> dict:
    return json.loads(Path("benchmarks/results", name).read_text())


def hours(samples_per_second: float) -> float:
    return 595_375 / samples_per_second / 3600  # of an epoch of LLaVA-CC3M-Pretrain-595K


# %%
h100 = read("gpu_h100.json")
measured = median(h100["use_lora"]["samples_per_second_last_30_steps"])
speed = {gpus: Speed.of(config, "use_lora", work.typical, gpus) for gpus in (1, 2, 8)}
expected = speed[1].samples_per_second("h100-80g")
gib = {
    "measured": h100["use_lora"]["peak_gpu_memory_mib"] / 1024,
    "estimated": used_on_device(peak("use_lora", 1) * 2**30) / 2**30,
}

print(h100["machine"])
for name, rate in ("measured", measured), ("estimated", expected):
    print(f"use_lora, {name:<10}{gib[name]:5.1f} GiB {rate:5.1f} samples/s {hours(rate):5.1f} hours/epoch")
print("freeze_vision:", h100["freeze_vision"]["result"])
assert abs(gib["estimated"] / gib["measured"] - 1) < 0.1
assert peak("freeze_vision", 1) > memory_budget("h100-80g") / 2**30 > peak("freeze_vision", 2)

# %% [markdown] lang="en"
# Memory agrees within a tenth (with what the driver takes), and `freeze_vision` does not fit on one GPU, as the first figure says. Speed does not agree. That run used early code, without fused kernels. But even for that code the estimated speed is three times too high, and [why is not known](../../docs/gpu.md). So look at the runs of other people, too; ours is the last row:

# %% [markdown] lang="zh"
# 显存（加上驱动占的）误差在 10% 以内；`freeze_vision` 在单卡上放不下，也和第一张图一致。速度却对不上。那次测的是这份代码的早期版本，还没有用融合算子；但就算按那个版本来估计，速度也高估到三倍左右，[原因还不清楚](../../docs/gpu_zh.md)。所以再看看别人公布的训练，我们自己的放在最后一行：

# %%
rows = read("published.json")["rows"]
assert all(0.8 < row["published_over_predicted"] < 1.2 for row in rows if row["comparable"])
assert all(0.3 < row["published_over_predicted"] < 0.9 for row in rows if not row["comparable"])
costs.published(rows)

# %% [markdown] lang="en"
# At 1 a run was as fast as estimated. Blue runs report pure training steps on one GPU; the estimate meets them within a fifth. Orange are ours, and whole jobs that also read half a million images from disk; all were slower. So take the estimate as the best case, and allow three to five times the hours. After some dozens of steps trust the `samples/s` of your own log.
#
# ## What it costs
#
# You pay for a GPU by the hour. So one question decides what to rent: how much slower may a cheaper GPU be? The bars go from the estimate to five times the estimate, for one epoch of `use_lora` on one GPU. The percentage is its speed beside an H100's. A GPU that costs less than this percentage of an H100's price is the cheaper choice.

# %% [markdown] lang="zh"
# 横条等于 1，表示和估计的一样快。蓝色的是单卡纯训练步的速度，估计误差在 20% 以内。橙色的是其余的：完整任务（同时还要从磁盘读几十万张图片），以及我们自己那次，全都比估计的慢。所以请把估计当成最好的情况，时间按三到五倍准备。跑起来几十步之后，就以自己的日志为准：上面会打印 `samples/s`。
#
# ## 要花多少钱
#
# GPU 按小时付费，所以租哪种卡，只看一个问题：便宜的卡可以慢多少？图中的横条从估计值画到它的五倍，是用一张卡做 `use_lora`、训练一轮的时间。百分比是这种卡的速度和 H100 之比：它每小时的价格如果低于 H100 的这个百分比，租它就更便宜。

# %%
best = {kind: hours(speed[1].samples_per_second(kind)) for kind in GPUS}
costs.hour_bars(best, "h100-80g", hours(measured))

# %%
PRICE = 3.0  # of one H100 for one hour: put in yours
print(f"one epoch, as measured: {hours(measured):.0f} GPU hours x {PRICE} = {hours(measured) * PRICE:.0f}")
for gpus, each in speed.items():
    wall = hours(each.samples_per_second("h100-80g"))
    print(f"estimated, {gpus} x H100: {wall:4.1f} hours, {wall * gpus:.1f} GPU hours")

# %% [markdown] lang="en"
# More GPUs hardly change the price, as you pay for each GPU and hour. They save time. The script `run_zero2.sh` trains ten epochs, as the original tutorial does. For a first run say `--num_train_epochs 1`, a tenth of the price.
#
# ## Downloads and data
#
# In China, type `export HF_ENDPOINT=https://hf-mirror.com` first. ModelScope has both models, too, as `AI-ModelScope/clip-vit-large-patch14-336` and `Qwen/Qwen1.5-4B-Chat`. Together with the data: 16 GB.
#
# ```bash
# hf download openai/clip-vit-large-patch14-336 --exclude "*.h5" --local-dir models/clip
# hf download Qwen/Qwen1.5-4B-Chat --local-dir models/qwen
# hf download liuhaotian/LLaVA-CC3M-Pretrain-595K --repo-type dataset --local-dir data/LLaVA-CC3M-Pretrain-595K
# ```
#
# | data | the original tutorial says | records | size | licence |
# |---|---|---|---|---|
# | [LLaVA-CC3M-Pretrain-595K](https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K) | fair, but typical; for pretraining | 595,375 | 6.9 GB | those of CC3M and BLIP |
# | [TextOCR-GPT4o](https://huggingface.co/datasets/CaptionEmporium/TextOCR-GPT4o) | very high quality | about 20,000 | 0.04 GB, without images | CC-BY-SA-4.0 |
# | [ShareGPT-4o](https://huggingface.co/datasets/OpenGVLab/ShareGPT-4o) | highly recommended | about 57,300 | see there | MIT |
#
# Read each licence first. `recipes/` has settings: three for LLaVA-1.5's two stages (the second in full or with LoRA), the original tutorial's, and one with the fewest hours:

# %% [markdown] lang="zh"
# 多加几张卡，总价几乎不变（按卡时付费），省的是时间。`run_zero2.sh` 和原教程一样默认训练十轮；第一次请加 `--num_train_epochs 1`，只花十分之一的钱。
#
# ## 下载模型和数据
#
# 国内请先执行 `export HF_ENDPOINT=https://hf-mirror.com`。两个模型也可以从 ModelScope（魔搭）下载：`AI-ModelScope/clip-vit-large-patch14-336` 和 `Qwen/Qwen1.5-4B-Chat`。加上数据一共 16 GB。
#
# ```bash
# hf download openai/clip-vit-large-patch14-336 --exclude "*.h5" --local-dir models/clip
# hf download Qwen/Qwen1.5-4B-Chat --local-dir models/qwen
# hf download liuhaotian/LLaVA-CC3M-Pretrain-595K --repo-type dataset --local-dir data/LLaVA-CC3M-Pretrain-595K
# ```
#
# | 数据 | 原教程的评价 | 条数 | 大小 | 许可证 |
# |---|---|---|---|---|
# | [LLaVA-CC3M-Pretrain-595K](https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K) | 质量一般，但有代表性，可以做预训练 | 595,375 | 6.9 GB | CC3M 和 BLIP 的许可证 |
# | [TextOCR-GPT4o](https://huggingface.co/datasets/CaptionEmporium/TextOCR-GPT4o) | 质量非常高 | 2 万左右 | 0.04 GB，不含图片 | CC-BY-SA-4.0 |
# | [ShareGPT-4o](https://huggingface.co/datasets/OpenGVLab/ShareGPT-4o) | 非常推荐 | 5.7 万左右 | 见该页 | MIT |
#
# 使用前请看清每个数据集的许可证。`recipes/` 里有现成的配方：三个照着 LLaVA-1.5 的两个阶段来（第二阶段分全量和 LoRA 两种），一个照原教程，一个用时最少：

# %%
import re

WANTED = ["learning_rate", "global_batch_size", "num_train_epochs", "lora_r", "lora_alpha"]
print(f"{'recipe':<19}{'strategy':<15}" + "".join(f"{name:>18}" for name in WANTED))
for path in sorted(Path("recipes").glob("*.sh")):
    flags = dict(re.findall(r"--(\w+) ([\d.e-]+)", path.read_text()))
    strategy = re.search(r"^TRAIN_TYPE=(?:\${TRAIN_TYPE:-)?(\w+)", path.read_text(), re.M)[1]
    print(f"{path.stem:<19}{strategy:<15}" + "".join(f"{flags.get(name, '-'):>18}" for name in WANTED))

# %% [markdown] lang="en"
# A dash: the default of `run_zero2.sh`, or no LoRA. LLaVA-1.5 trains the projector first, at a high rate, and then the language model at a fiftieth of it. The second stage starts from the first one's folder.
#
# ## What we see
#
# Each step of the plan costs more than the one before it. So a mistake should show as early as possible:

# %% [markdown] lang="zh"
# 短横线表示用 `run_zero2.sh` 的默认值，或没有 LoRA。LLaVA-1.5 先用高学习率训练投影层，再用五十分之一的学习率训练语言模型；第二阶段从第一阶段的输出文件夹开始。
#
# ## 我们看到
#
# 计划里的每一步都比前一步贵，所以要让错误尽早暴露：

# %%
costs.order_of_work()

# %% [markdown] lang="en"
# The commands, in this order:
#
# ```bash
# python -m train_llava.build_model --vision_model_name_or_path models/clip \
#     --language_model_name_or_path models/qwen --output_dir models/llava
# export MODEL=models/llava DATA=data/LLaVA-CC3M-Pretrain-595K
# python -m train_llava.check_data --data_path $DATA --model_name_or_path $MODEL
# python -m train_llava.show_batch --data_path $DATA --model_name_or_path $MODEL
# python -m train_llava.estimate --data_path $DATA --model_name_or_path $MODEL
# OUTPUT_DIR=output/try bash run_zero2.sh --max_steps 20
# bash run_zero2.sh --num_train_epochs 1
# ```
#
# Nobody has trained the published weights with this code yet, its authors included. On a GPU it has run once: on one H100, with random weights. [docs/gpu.md](../../docs/gpu.md) lists what has not run. So watch the first hour.

# %% [markdown] lang="zh"
# 按这个顺序，命令是：
#
# ```bash
# python -m train_llava.build_model --vision_model_name_or_path models/clip \
#     --language_model_name_or_path models/qwen --output_dir models/llava
# export MODEL=models/llava DATA=data/LLaVA-CC3M-Pretrain-595K
# python -m train_llava.check_data --data_path $DATA --model_name_or_path $MODEL
# python -m train_llava.show_batch --data_path $DATA --model_name_or_path $MODEL
# python -m train_llava.estimate --data_path $DATA --model_name_or_path $MODEL
# OUTPUT_DIR=output/try bash run_zero2.sh --max_steps 20
# bash run_zero2.sh --num_train_epochs 1
# ```
#
# 目前还没有人（包括作者）用这份代码训练过官方发布的权重。在 GPU 上只跑过一次：单张 H100，随机权重。还有哪些没跑过，列在 [docs/gpu_zh.md](../../docs/gpu_zh.md) 里。所以开头的一小时要盯着看。

# %% [markdown] lang="en"
# ## Common questions
#
# **Out of memory. What first?** A smaller batch, which shortens at most the light part of the bar. Then gradient checkpointing, 4-bit weights (`use_lora` only), the optimizer in main memory, more GPUs. The cell below shows two of these. With 24 GB use checkpointing at once: the run on the H100 took nearly all that such a card has.
#
# **Why does a smaller batch not help `freeze_vision` on one GPU?** Because there the light part is the optimizer's copies.
#
# **How many steps does an epoch have?** The number of records divided by the samples of a step. A step has 32 samples on any number of GPUs, unless you set `GLOBAL_BATCH`.
#
# **How large a disk do I need?** 16 GB for the downloads, then the built model (9 GB), the result, and three checkpoints. The cell below has the sizes.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **显存不够，先做什么？** 先减小批次，它最多缩短图里浅灰色的部分。然后依次是：梯度检查点、4 比特权重（仅限 `use_lora`）、把优化器放到内存、加卡。下面的代码算出梯度检查点和 4 比特能省多少。24 GB 的卡请直接打开梯度检查点：H100 上实测占用的显存，几乎就是这种卡的全部。
#
# **单卡训练 `freeze_vision`，为什么减小批次没有用？** 因为这时浅灰色是优化器更新用的副本，也和批次无关。
#
# **一轮有多少步？** 数据条数除以每步的样本数。不管几张卡，一步默认都是 32 个样本，除非你设了 `GLOBAL_BATCH`。
#
# **要多大的磁盘？** 下载 16 GB，加上搭好的模型（9 GB）、训练的结果，再加上保留的检查点，默认三个。大小见下面的输出。

# %%
from train_llava.planning.budget import checkpoint_bytes, model_bytes

zero = zero_config("ZeRO-2", 1, config.text_config.hidden_size, "use_lora")
packed = MemoryModel.of(models["use_lora"], in_4bit=True)
for name, needs, again in ("as it is", memory["use_lora"], False), ("checkpointing", memory["use_lora"], True), (
    "and 4 bits", packed, True
):  # fmt: skip
    print(f"use_lora, 1 GPU, {name:<14}{needs.peak(work.batch, zero, again) / 2**30:5.1f} GiB")
print(f"steps of an epoch: {595_375 // 32:,}")
for strategy in ("use_lora", "freeze_vision"):
    kept, each = model_bytes(models[strategy]) / 1e9, checkpoint_bytes(models[strategy], deepspeed=True) / 1e9
    print(f"{strategy}: {kept:.2f} GB for the result, {3 * each:.1f} GB for three checkpoints")

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** You have 24 GB cards. How many do you need for `freeze_vision` at batch 4, without checkpointing? (`peak` tells.)
#
# 🐕 **Middle.** Count the operations (FLOPs) of one `projector` sample by hand. Forward takes two for each weight and token. Backward takes as many again in the language model, twice as many in the projector, whose weights need gradients, too. The embedding table takes none. How near do you come to the estimate's `StepFlops` (`train_llava/planning/flops.py`)?
#
# 🦁 **Hard.** You want a language model of 7 billion weights, such as Qwen1.5-7B (width 4096, 32 layers, MLP 11008, 32 heads, 32 KV heads). Change the numbers in `config.text_config`, and compare the memory of `use_lora` with that of Qwen1.5-4B.

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 手上只有 24 GB 的卡。批大小为 4，不用梯度检查点，`freeze_vision` 要几张？（用 `peak` 算。）
#
# 🐕 **中等。** 手算 `projector` 策略下一个样本的计算量（FLOPs）：前向时每个参数、每个词元算 2 次；反向时，语言模型再算同样多，投影层自己的权重也要梯度，所以再算两倍。词嵌入表不用算。和估计程序所用的 `StepFlops`（`train_llava/planning/flops.py`）差多少？
#
# 🦁 **困难。** 想换成 70 亿参数的语言模型，例如 Qwen1.5-7B（宽 4096，32 层，MLP 11008，32 个头，KV 头也是 32 个）。改 `config.text_config` 里的数，比较 `use_lora` 的显存和 Qwen1.5-4B 差多少。

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 By the orange part alone three cards would do. It takes far more, as under ZeRO-2 each GPU has all weights and its own activations. Checkpointing is the better idea.

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 只看橙色部分，三张卡就够；实际要多得多，因为在 ZeRO-2 下，每张卡都要放下全部权重和自己的激活值。还是开梯度检查点更划算。

# %% tags=["solution"]
budget = memory_budget("rtx4090-24g") / 2**30
print(next((gpus for gpus in range(1, 65) if peak("freeze_vision", gpus) <= budget), "no number of them is enough"))
print(f"with 64: {peak('freeze_vision', 64):.1f} GiB each, and a card has room for {budget:.1f}")

# %% [markdown] lang="en"
# 🐕 The tower has no backward pass, as it is frozen and nothing below it is trained. We left out attention and the head, so our number is a little low.

# %% [markdown] lang="zh"
# 🐕 视觉塔是冻结的，它下面也没有要训练的东西，所以没有反向。手算没有计入注意力和输出头，所以略低一点。

# %% tags=["solution"]
from train_llava.planning.flops import StepFlops

sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in models["projector"].model.named_children()}
by_hand = 2 * 576 * sizes["vision_tower"] + 6 * 576 * sizes["multi_modal_projector"] + 4 * 620 * (
    sizes["language_model"] - models["projector"].get_input_embeddings().weight.numel()
)  # fmt: skip
counted = StepFlops.count(models["projector"]).of(**work.average)
print(f"by hand {by_hand / 1e12:.2f}, counted {counted / 1e12:.2f} TFLOP: {by_hand / counted - 1:+.0%}")
assert abs(by_hand / counted - 1) < 0.1

# %% [markdown] lang="en"
# 🦁 The weights are what grows. LoRA's own states stay small.

# %% [markdown] lang="zh"
# 🦁 变大的主要是权重；LoRA 自己的那部分仍然很小。

# %% tags=["solution"]
from copy import deepcopy

larger = deepcopy(config)
larger.text_config.update({"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008})
larger.text_config.update({"num_attention_heads": 32, "num_key_value_heads": 32})
larger.text_config.layer_types = larger.text_config.layer_types[:32]
memory["7B"] = MemoryModel.of(meta_model(larger, torch.bfloat16, "use_lora"))
for name, label in ("use_lora", "Qwen1.5-4B"), ("7B", "Qwen1.5-7B"):
    needs = memory[name]
    whole = needs.peak(work.batch, zero_config("ZeRO-2", 1, 4096, "use_lora"), checkpointing=False)
    print(f"{label}: weights {needs.weights / 2**30:.1f} GiB, peak {whole / 2**30:.1f} GiB")

# %% [markdown] lang="en"
# Next lesson: [a project of your own](13_project.ipynb) with your own images.

# %% [markdown] lang="zh"
# 下一课：[做一个自己的项目](13_project.ipynb)，用自己的图片。
