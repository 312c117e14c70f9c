# %% [markdown] lang="en"
# # 9. Asking a trained LLaVA: LoRA
#
# With `TRAIN_TYPE=use_lora` a training saves no whole model. It saves an **adapter**: a small part of the weights, and the name of the model that they belong to, the **base**. This lesson asks the two together, looks at what the adapter changes, and merges it into the base, so that one plain model is left.
#
# The demo's adapter is made by `bash run_zero2.sh`, in a few minutes on two CPU cores. For whole models see [the other half of this lesson](code05_infer.ipynb).
#
# ## What you will know
#
# - what an adapter adds to its base, in answers and in numbers;
# - what W + (alpha / r) B A means, and how small the change is;
# - why a merged model answers the same, and how to make one;
# - what the adapter's folder holds, and what must stay beside it.
#
# **For your own** change the lines below: `ADAPTER` to your run's `--output_dir`, `DATA` to a folder with a `chat.json`. Loaded in fp32, as here, merging rounds nothing away; a 4B model then takes 17 GB. With `dtype="auto"` it takes half, and the merged weights are rounded to bf16.

# %% [markdown] lang="zh"
# # 9. 向训练好的 LLaVA 提问：LoRA
#
# 用 `TRAIN_TYPE=use_lora` 训练，存下来的不是完整的模型，而是一个**适配器（adapter）**：只有一小部分权重，外加它所属模型的名字，那个模型叫**基座（base）**。这一课把两者合起来提问，看看适配器究竟改了什么，最后把它并进基座，得到一个普通的模型。
#
# 演示用的适配器由 `bash run_zero2.sh` 训练，两个 CPU 核上几分钟就够。完整模型请看[这一课的另一半](code05_infer.ipynb)。
#
# ## 你会学到
#
# - 适配器给基座添了什么：看回答，也看数字；
# - W + (alpha / r) B A 是什么意思，改动有多小；
# - 为什么合并后的模型回答不变，以及怎样合并；
# - 适配器文件夹里有什么，哪些东西必须留在它旁边。
#
# **换成你自己的**：改下面几行即可。`ADAPTER` 填训练时的 `--output_dir`，`DATA` 填放着 `chat.json` 的文件夹。这里用 fp32 加载，合并时没有舍入误差，4B 模型要占 17 GB；改成 `dtype="auto"` 只要一半，但合并后的权重会舍入成 bf16。

# %% tags=["parameters"]
ADAPTER = "output/demo-use_lora"
DATA = "output/demo/data/held_out"  # records with new images, and pairs of shape and colour that it has never seen
MERGED = "output/demo-use_lora-merged"  # where the merged model goes

# %% tags=["figure"]
from tutorial.figures import adapters, bars, sheets
from tutorial.tools.quiet import quiet

quiet()

from itertools import islice
from pathlib import Path

import torch

from train_llava.data import LlavaDataset
from train_llava.model.generate import caption_rows, collator_of
from train_llava.model.load import load

model, processor = load(ADAPTER, dtype=torch.float32)  # finds its base by itself
examples = list(islice(LlavaDataset(DATA, held_out=True), 140))
adapted = caption_rows(model, processor, examples)
with model.disable_adapter():
    base = caption_rows(model, processor, examples)

english = [i for i, row in enumerate(adapted) if row["reference"].isascii()]
first = {}  # of each kind of question the first in English; data of your own may name no kinds
for i in english or range(len(examples)):
    first.setdefault(adapted[i].get("category", i), i)
chosen = list(first.values())[:14]
sheets.sheet([adapted[i] for i in chosen[:8]], "Eight images, each with its question and the adapter's answer")

# %% [markdown] lang="en"
# ## With and without the adapter
#
# The sheet shows the first English question of each of eight kinds, in the order of the file and not selected, with the adapter's answer: green if it is exactly right, red if not. `disable_adapter()` switches the adapter off, so the same object answers as its base. In the demo, the base is the result of stage 1 (lesson 7): its projector was trained on captions, but not on conversations. The bars below count right answers, by kind of question: ten of each.

# %% [markdown] lang="zh"
# ## 有适配器和没有适配器
#
# 上面是八类问题各自的第一道英文题（按文件里的顺序，没有挑选）和适配器的回答：绿色表示一字不差，红色表示有错。`disable_adapter()` 能临时关掉适配器，同一个对象就按基座来回答。演示里的基座是第一阶段（第 7 课）的结果：投影层学过图片描述，但还没见过对话。下面的柱状图按问题种类（每类十题）统计答对的比例。

# %%
for i in chosen:
    question = adapted[i]["prompt"].replace("<image>", "").strip()
    print(f"{question}\n  base     {base[i]['caption']}\n  adapter  {adapted[i]['caption']}")

# %% tags=["figure"]
bars.exactly_right({"with the adapter": adapted, "base": base})

# %% [markdown] lang="en"
# ## What the adapter changes
#
# Each adapted layer multiplies its input by a matrix W. LoRA leaves W alone and adds a product of two thin matrices (lesson 7): A makes r numbers of the input, B makes of these an output of full size, and alpha / r scales the result. So the layer works with W + (alpha / r) B A. We look at the matrix that has changed most, compared with its size.

# %% [markdown] lang="zh"
# ## 适配器改了什么
#
# 加了适配器的每一层都用一个矩阵 W 去乘输入。LoRA 不动 W，只在旁边加上两个瘦长矩阵的乘积（第 7 课）：A 把输入压成 r 个数，B 再把它们展开成完整的输出，最后乘上 alpha / r。所以这一层实际用的是 W + (alpha / r) B A。下面看相对于自身大小改动最大的那个矩阵。

# %%
layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
changes = {}
for name, layer in layers.items():
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    changes[name] = (layer.scaling["default"] * b @ a).detach().cpu()
sizes = {name: (changes[name].norm() / layer.weight.cpu().norm()).item() for name, layer in layers.items()}

most = max(sizes, key=sizes.get)
weight, change, rank = layers[most].weight.detach().cpu(), changes[most], layers[most].r["default"]
print(f"{len(layers)} matrices are adapted, with r = {rank}; most of all {most.split('layers.')[-1]}")
print(f"W has {weight.numel():,} numbers, A and B together {rank * sum(weight.shape):,}")

# %% tags=["figure"]
adapters.sum_of_matrices(weight, change)

# %% [markdown] lang="en"
# The middle picture has stripes: whole rows and columns change together. A change in few directions looks like this. A **singular value** says how strongly a matrix acts along one of its directions; the strongest comes first. W has as many as it has rows; B A has r of them, and all others are zero.

# %% [markdown] lang="zh"
# 中间那张图有条纹：整行整列一起变。只在少数方向上改动，看上去就是这样。**奇异值**表示矩阵在某个方向上的作用有多强，从强到弱排列。W 的奇异值和它的行数一样多；B A 只有 r 个，其余全是零。

# %% tags=["figure"]
of_weight, of_change = torch.linalg.svdvals(weight), torch.linalg.svdvals(change)
assert (of_change[rank:] < 1e-4 * of_change[0]).all()
adapters.sizes_of_changes({"W": of_weight, "(alpha / r) B A": of_change[:rank]}, rank, sizes)

# %% [markdown] lang="en"
# ## Merge
#
# W + (alpha / r) B A can be computed once and stored. Then the layer is an ordinary one again, and the trained projector takes the place of the old one. The merged model must compute the same, so we compare its scores of the next tokens (logits) on a batch with those before.

# %% [markdown] lang="zh"
# ## 合并
#
# W + (alpha / r) B A 可以一次算好，存起来。这样每一层又变回普通的层，训练过的投影层也取代了旧的。合并前后的计算结果必须相同，所以拿同一批数据比较下一个词元的得分（logits）。

# %%
batch = {name: value.to(model.device) for name, value in collator_of(processor)(examples[:4]).items()}
with torch.no_grad():
    before = model(**batch).logits
merged = model.merge_and_unload(safe_merge=True)
with torch.no_grad():
    after = merged(**batch).logits

difference = (after - before).abs().max() / before.abs().max()
print(f"the scores differ by less than 1e-5 of the largest: {bool(difference < 1e-5)}")
together = merged.get_submodule(most.removeprefix("base_model.model.")).weight.cpu()
assert torch.allclose(together, weight + change, atol=1e-5)
answers = [row["caption"] for row in caption_rows(merged, processor, examples)]
print(f"equal answers: {sum(a == row['caption'] for a, row in zip(answers, adapted, strict=True))} of {len(answers)}")

# %% [markdown] lang="en"
# On the command line this is `python -m train_llava.merge_lora`, which also checks every weight against base and adapter. Now we save the model, and ask it without this repository.

# %% [markdown] lang="zh"
# 在命令行里对应 `python -m train_llava.merge_lora`，它还会对照基座和适配器，逐个核对合并后的权重。现在存盘，然后不用本仓库，直接向它提问。

# %%
from transformers import pipeline

from train_llava.model.folder import save_llava

save_llava(merged, processor, MERGED, overwrite=True)
pipe = pipeline("image-text-to-text", model=MERGED)
shown = next(i for i in chosen if examples[i]["images"])
content = [{"type": "image", "image": image} for image in examples[shown]["images"]]
content.append({"type": "text", "text": adapted[shown]["prompt"].replace("<image>", "").strip()})
answer = pipe(text=[{"role": "user", "content": content}], return_full_text=False, max_new_tokens=64)
print(content[-1]["text"], " ->  ", answer[0]["generated_text"])

# %% [markdown] lang="en"
# ## What we see
#
# - **The change of W is small, and here the projector does most.** Beside W the change is small, and it has r directions only. Together with the trained projector it mends most of what the base gets wrong; exercise 🐕 takes them apart. See where the bars differ most: stage 1 taught captions, which name all things in order, so questions that pick out one thing by its name are new to the base's projector.
# - **The change is not spread evenly.** The orange table shows in which layers and matrices it is largest.
# - **Merged or not is a question of use, not of quality.** A merged folder can be used wherever transformers models can. An adapter is small, and many adapters can share one base.
#
# ## Common questions
#
# - **What must stay beside an adapter?** Its base. `adapter_config.json` holds the base's name. If the base has moved, say where it is: `--model_name_or_path BASE --adapter_name_or_path ADAPTER`. `adapter_base.json` holds a fingerprint of the base's weights: another base is refused.
# - **Why is the projector in the adapter's file?** It is trained as a whole, without LoRA. With the old projector, the adapted language model would read vectors that it was not trained on.
# - **Does merging lose anything in bf16?** A little. bf16 keeps two to three digits, and the change is small beside W. The last line says how much of it is rounded away here.

# %% [markdown] lang="zh"
# ## 我们看到
#
# - **W 的改动很小，在这里大部分工作是投影层做的。** 和 W 相比改动不大，而且只有 r 个方向。它和训练过的投影层一起，纠正了基座的大部分错误；练习 🐕 把两者分开来看。看看柱子在哪几类差得最多：第一阶段学的是描述，按顺序说出所有东西；而按名字找出其中一个再回答，基座的投影层从没遇到过。
# - **改动并不平均。** 橙色的表能看出哪些层、哪些矩阵改得最多。
# - **合不合并只关乎怎么用，不影响质量。** 合并后的文件夹，凡是能用 transformers 模型的地方都能用；适配器则很小，许多个可以共用一个基座。
#
# ## 常见问题
#
# - **适配器旁边必须留着什么？** 它的基座。`adapter_config.json` 里写着基座的名字；基座挪了地方，就明确告诉它：`--model_name_or_path BASE --adapter_name_or_path ADAPTER`。`adapter_base.json` 里存着基座权重的指纹，换成别的基座会拒绝加载。
# - **投影层为什么在适配器文件里？** 它是整个训练的，不是用 LoRA。如果还用旧的投影层，适配过的语言模型读到的就是训练时没见过的向量。
# - **用 bf16 合并会有损失吗？** 有一点。bf16 只有两三位有效数字，而改动和 W 相比很小。最后一行算出了这里被舍掉的比例。

# %%
from safetensors.torch import load_file

for file in sorted(Path(ADAPTER).glob("adapter*")):
    print(f"{file.name:<28}{file.stat().st_size / 1e3:8.1f} kB")
tensors = load_file(Path(ADAPTER) / "adapter_model.safetensors")
for part in ("lora_A", "lora_B", "multi_modal_projector"):
    numbers = [tensor.numel() for name, tensor in tensors.items() if part in name]
    print(f"{part:<28}{len(numbers):3} tensors, {sum(numbers):,} numbers")
lost = ((weight + change).bfloat16() - (weight + change)).norm() / change.norm()
print(f"merged in bf16, {lost:.1%} of this change is rounded away: {most.split('layers.')[-1]}")

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** How large is the adapter, projector included, beside the merged model?
#
# 🐕 **Middle.** Make the adapter stronger and weaker: load it once more, and multiply the `scaling` of every adapted layer by 0, 0.5, 1, 4 and 16. How many of the first 84 answers are exactly right? (`bars.percent` counts the rows of `caption_rows`.)
#
# 🦁 **Hard.** Merge by hand. Add alpha / r · B A to the base's weights, put the adapter's projector in place of the base's, and compare all weights with those of `merged`. (`base_of(Path(ADAPTER))` of `train_llava.model.load` finds the base; the names in `tensors` begin with PEFT's `base_model.model.`.)
#
# ## Solutions
#
# 🐢 Divide the count of numbers in the adapter's file by that of the merged model, which has no A and B.

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 算上投影层，适配器的权重相当于合并后模型的多少？
#
# 🐕 **中等。** 把适配器调强调弱：重新加载它，给每个适配层的 `scaling` 乘上 0、0.5、1、4、16，前 84 条里各有多少回答一字不差？（`bars.percent` 可以统计 `caption_rows` 的结果。）
#
# 🦁 **困难。** 亲手合并：给基座的权重加上 alpha / r · B A，投影层换成适配器里的，再和 `merged` 的权重逐个比较。（`train_llava.model.load` 里的 `base_of(Path(ADAPTER))` 能找到基座；`tensors` 里的名字以 PEFT 的 `base_model.model.` 开头。）
#
# ## 答案
#
# 🐢 分子是适配器文件里的参数个数，分母是合并后模型的参数个数（里面没有 A 和 B）。

# %% tags=["solution"]
trained, whole = sum(tensor.numel() for tensor in tensors.values()), sum(p.numel() for p in merged.parameters())
print(f"{trained:,} of {whole:,}: {trained / whole:.1%}")

# %% [markdown] lang="en"
# 🐕 At 0 the trained projector works with the unchanged language model, and in the demo that gets nearly as many answers right. Far above 1 the change is too large: the weights were trained for 1.

# %% [markdown] lang="zh"
# 🐕 乘 0 时，只剩训练过的投影层配上原来的语言模型；在演示里，答对的只比用适配器少一点。比 1 大太多就改过头了：这些权重本来就是按 1 训练的。

# %% tags=["solution"]
model, _ = load(ADAPTER, dtype=torch.float32)  # once more: the first one is merged
layers = [module for module in model.modules() if hasattr(module, "lora_A")]
scalings = [layer.scaling["default"] for layer in layers]
for factor in (0, 0.5, 4, 16, 1):  # 1 comes last, and stays
    for layer, scaling in zip(layers, scalings, strict=True):
        layer.scaling["default"] = factor * scaling
    print(f"scaling x {factor}: {bars.percent(caption_rows(model, processor, examples[:84])):.0f}% exactly right")

# %% [markdown] lang="en"
# 🦁 They are equal but for rounding. So a merge is no more than this sum; what takes care is the names, and that the projector is not forgotten.

# %% [markdown] lang="zh"
# 🦁 除了舍入误差，全都相等。可见合并不过是这样一个加法；要小心的是名字，还有别忘了投影层。

# %% tags=["solution"]
from train_llava.model.load import base_of

plain, _ = load(base_of(Path(ADAPTER)), dtype=torch.float32)
by_hand = plain.state_dict()
for name, tensor in tensors.items():
    name = name.removeprefix("base_model.model.")
    if "lora_A" in name:
        B = tensors[f"base_model.model.{name.replace('lora_A', 'lora_B')}"]
        by_hand[name.replace(".lora_A", "")] += scalings[0] * (B @ tensor).to(plain.device)
    elif "lora_B" not in name:
        by_hand[name].copy_(tensor)
for name, weight in merged.state_dict().items():
    assert torch.allclose(by_hand[name], weight.to(plain.device), atol=1e-6), name
print(f"{len(by_hand)} tensors are equal")

# %% [markdown] lang="en"
# Next lesson: [it does not work, why?](tutorial/en/10_diagnosis.ipynb)

# %% [markdown] lang="zh"
# 下一课：[诊断：不对劲，问题出在哪里](10_diagnosis.ipynb)。
