# %% [markdown] lang="en"
# # 0. The map
#
# A language model reads and writes, but it cannot see. In this tutorial you give one eyes: you build a LLaVA, a language model that sees, train it, and ask it about images. You need no GPU, and you download no model and no data. This lesson is the map: one drawing of the whole, the words we use, and the way through the lessons.
#
# Start the demo in a terminal now, in the folder of the repository. It trains a small LLaVA while you read:
#
# ```bash
# bash run_zero2.sh
# ```
#
# ## What you will know
#
# - which three parts a LLaVA has, and what each of them knows;
# - how many numbers go from one part to the next, in our demo and in a real model;
# - what each lesson is about.

# %% [markdown] lang="zh"
# # 0. 地图
#
# 语言模型会读会写，但是看不见。这套教程带你给它装上眼睛：自己搭一个 LLaVA，也就是看得见图的语言模型；训练它，再让它看图回答问题。不需要 GPU，也不用下载任何模型和数据。这一课是地图：先用一张图看清全貌，再认识几个术语，最后看看每一课讲什么。
#
# 现在就可以打开终端，在仓库文件夹里启动演示。它会训练一个小小的 LLaVA，你可以边等边读：
#
# ```bash
# bash run_zero2.sh
# ```
#
# ## 你会学到
#
# - LLaVA 由哪三个部分组成，每个部分各懂什么；
# - 从一个部分到下一个部分，传过去多少个数：我们的演示是多少，真实的模型是多少；
# - 每一课讲什么。

# %% [markdown] lang="en"
# ## A LLaVA in one drawing
#
# A model that was trained like yours lies in the repository. We give it an image and a question, and keep three things: the vectors of its vision tower, their translations, and the words that it would most likely say first.

# %% [markdown] lang="zh"
# ## 一张图看懂 LLaVA
#
# 仓库里放着一个训练好的演示模型，和你正在训练的一样。给它一张图片、一个问题，留下三样东西：视觉塔给出的向量、翻译后的向量，以及回答第一个词的几个候选。

# %% tags=["figure"]
import numpy as np

from demo.scenes import Item, belongs, draw, scans_of
from tutorial.figures import overview
from tutorial.tools.trained import trained_llava

llava, processor = trained_llava()
seven = Item(7, "white", 0, large=True, cell=3, scan=int(scans_of("held_out", 7)[6]))
star = Item(13, "blue", 3, large=True, cell=3)
assert belongs((seven, star), "held_out")  # no training has shown a blue star
image = draw((seven, star), np.random.default_rng(0), "held_out")

question = "Which colour does the star have?"
chat = [{"role": "user", "content": f"<image>\n{question}"}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
batch = processor(images=image, text=text, return_tensors="pt")

seen = llava.model.vision_tower(batch.pixel_values, output_hidden_states=True).hidden_states[-2][0, 1:]  # lesson 1
translated = llava.get_image_features(batch.pixel_values).pooler_output[0]
best = overview.next_words(processor, llava(**batch).logits[0, -1])

from transformers import AutoConfig, LlavaConfig

real_config = LlavaConfig(
    vision_config=AutoConfig.from_pretrained("benchmarks/full_size/configs/clip").vision_config,
    text_config=AutoConfig.from_pretrained("benchmarks/full_size/configs/qwen"),
)
demo, real = overview.sizes(llava.config), overview.sizes(real_config)
pieces = [processor.tokenizer.decode([each]) for each in processor.tokenizer(question).input_ids]
overview.the_map(image, pieces, (seen, translated), best, demo, real)

# %% [markdown] lang="en"
# The blue numbers are measured on the running demo; the purple ones come from the configs of a real model. Go from left to right, then down:
#
# 1. The image is cut into **patches**, small squares. The demo has 16; a real tower has 576.
# 2. The **vision tower** turns each patch into a vector, a list of numbers that say what is there.
# 3. The **projector** translates each of these vectors for the language model: into a vector as long as that of a word, with a meaning that the language model can read.
# 4. The translated vectors stand in one row with those of the words, at the place where the prompt has `<image>`. A word's vector comes from a table.
# 5. The **language model** reads the row and gives every word that it knows a probability to be the next one. The likeliest word is written at the end of the row, and the model reads the row again, until the answer is complete. (Where the figure says *(Chinese)*, the word is one, and its font has none.)
#
# That is all. The cell below checks the sizes in code.

# %% [markdown] lang="zh"
# 蓝色的数是在演示模型上量出来的，紫色的数来自真实模型的配置。从左往右看，再往下看：
#
# 1. 图片先切成一个个小方块，叫**图块**（patch）。演示里有 16 块，真实的视觉塔有 576 块。
# 2. **视觉塔**把每个图块变成一个向量，也就是一串数，记录那里有什么。
# 3. **投影层**把这些向量逐个翻译给语言模型：翻译后的向量和词向量一样长，意思也是语言模型读得懂的。
# 4. 翻译好的向量和词向量排在同一个序列里，占据提示（prompt，发给模型的全部文字）中 `<image>` 的位置；词向量则从一张表里查出来。
# 5. **语言模型**读完整个序列，给它认识的每个词一个概率：下一个词是它的可能性有多大。把概率最大的词写到序列末尾，再读一遍，直到回答写完。（图里的 (Chinese) 代表一个中文词元，字体画不出来。）
#
# 全部就这些。下面用代码核对这些尺寸。

# %%
for each in demo, real:
    patch = each.pixels // each.side
    print(f"({each.pixels} / {patch})^2 = {each.vectors} vectors: {each.seen:,} -> {each.known:,} numbers")

assert seen.shape == (demo.vectors, demo.seen) and translated.shape == (demo.vectors, demo.known)
assert (batch.input_ids == llava.config.image_token_id).sum() == demo.vectors

# %% [markdown] lang="en"
# ## Three parts, and two of them are there already
#
# Nobody trains a LLaVA from nothing. The vision tower is a **CLIP**, trained to match images with captions. The language model is a **chat model**, trained on text. Only the projector is new, and it is tiny:

# %% [markdown] lang="zh"
# ## 三个部分，两个是现成的
#
# 没有人从零训练 LLaVA。视觉塔取自 **CLIP**，它学的是给图片配上正确的描述；语言模型是一个**对话模型**，学的全是文字。只有投影层是新的，而它非常小：

# %%
import torch
from transformers import LlavaForConditionalGeneration

from train_llava.model.structure import component_of

with torch.device("meta"):  # the real model of 4 billion weights, without the weights
    whole = LlavaForConditionalGeneration(real_config)


def count(model) -> dict[str, int]:
    """Weights of each part."""
    counts = dict.fromkeys(overview.PARTS, 0)
    for name, weight in model.named_parameters():
        counts[component_of(name)] += weight.numel()
    return counts


weights = {"the demo": count(llava), "the real one": count(whole)}
overview.shares(weights)

# %%
for name, counts in weights.items():
    for part, number in counts.items():
        print(f"{name:<13}{part:<15}{number:>14,}  {number / sum(counts.values()):>5.1%}")

# %% [markdown] lang="en"
# The **head** is the language model's last matrix. It turns a vector into a score for each word, and the scores give the probabilities. Training has two stages. Stage 1 shows images with captions, and trains the projector alone: it learns to translate. Stage 2 shows conversations, and trains the projector together with an **adapter**: small new matrices beside those of the language model. The tower stays as it is.

# %% [markdown] lang="zh"
# **输出层**（head）是语言模型的最后一个矩阵：它把向量变成每个词的得分，得分再换算成概率。训练分两个阶段：第一阶段用图片和描述，只训练投影层，让它学会翻译；第二阶段用对话，训练投影层和**适配器**，也就是加在语言模型矩阵旁边的一些小矩阵。视觉塔始终不动。

# %% [markdown] lang="en"
# ## What we see
#
# We ask ten questions about the image above: five in English, in the figure, and five in Chinese, printed above it. The model has learned both languages. In the figure blue answers are right, orange ones wrong; questions and right answers come from the code that drew the image. Two things in it are new to the model. No training image has this handwriting. And no image, caption or text of any training has a blue star: the model must put it together from other stars and other blue things.

# %% [markdown] lang="zh"
# ## 我们看到
#
# 关于上面那张图，我们问十个问题：五个英文的画在图里，五个中文的打印在图的上方；两种语言它都学了。图里蓝色是答对的，橙色是答错的；问题和标准答案都由画图的代码给出。这张图有两点是模型没见过的：训练图片里从没有过这个手写的七；训练用的图片、描述和文字里，也从没有过蓝色的星星，模型只能由别的星星和别的蓝色东西组合出来。

# %%
from demo.questions import ask as ask_about
from train_llava.model.generate import ask, generate

kinds, rng = ("caption", "colour", "place", "presence", "count"), np.random.default_rng(0)
pairs = [ask_about(kind, [(seven, star)], language, rng) for language in ("en", "zh") for kind in kinds]
answers = generate(llava, processor, [ask(question, [image]) for question, _ in pairs])
for (question, right), answer in list(zip(pairs, answers, strict=True))[5:]:
    print(f"{question} {answer}   ({'right' if answer == right else f'should be: {right}'})")
overview.conversation(image, pairs[:5], answers[:5])

# %% [markdown] lang="en"
# ## The words we use
#
# | term | Chinese | meaning |
# |---|---|---|
# | token | 词元 | what a text is cut into: a word, a part of one, a sign |
# | patch | 图块 | a square of pixels, which becomes one vector |
# | vision tower | 视觉塔 | turns patches into vectors; also vision encoder |
# | projector | 投影层 | translates these vectors for the language model |
# | language model | 语言模型 | gives the next token's probabilities |
# | adapter, LoRA | 适配器 | small trained matrices beside frozen ones |
# | label | 标签 | the token to be learned at a place; -100: none |
# | batch | 批次 | records that go through the model together |
# | checkpoint | 检查点 | the state of a training, saved so that it can resume (续训) |
# | held-out data | 测试集 | data that no training has seen |
# | ZeRO-2 | | shares optimizer states and gradients among GPUs |
# | inference | 推理 | asking the trained model |

# %% [markdown] lang="zh"
# ## 术语
#
# | 术语 | 英文 | 意思 |
# |---|---|---|
# | 词元 | token | 文字切成的小段：一个词、词的一部分，或一个符号 |
# | 图块 | patch | 一小块方形的像素，会变成一个向量 |
# | 视觉塔 | vision tower | 把图块变成向量；也叫视觉编码器 |
# | 投影层 | projector | 把这些向量翻译给语言模型 |
# | 语言模型 | language model | 给出下一个词元的概率 |
# | 适配器 | adapter, LoRA | 不变的大矩阵旁可训练的小矩阵 |
# | 标签 | label | 这个位置要学的词元；-100 表示不学 |
# | 批次 | batch | 一起送进模型的若干条数据 |
# | 检查点 | checkpoint | 保存下来、可以续训（resume）的训练状态 |
# | 测试集 | held-out data | 训练中从没见过的数据 |
# | ZeRO-2 | | 把优化器状态和梯度分摊到多张 GPU 上 |
# | 推理 | inference | 向训练好的模型提问 |

# %% [markdown] lang="en"
# ## The lessons
#
# | | lesson | question |
# |---|---|---|
# | 1 | [Image](01_image.ipynb) | how does an image become vectors? |
# | 2 | [Text](02_text.ipynb) | how does text, and where does the image go? |
# | 3 | [Tiny](03_tiny.ipynb) | can I write a LLaVA in 60 lines? |
# | 4 | [Build](../../code03_build_model_show.ipynb) | how do I build one from a CLIP and a chat model? |
# | 5 | [Data](05_data.ipynb) | what is learned from a record, and what is not? |
# | 6 | [Loop](06_loop.ipynb) | what happens in a training? |
# | 7 | [Strategies](07_strategies.ipynb) | which weights should I train? |
# | 8 | [ZeRO](08_zero.ipynb) | where does the memory go? |
# | 9 | Ask [a whole model](../../code05_infer.ipynb) or [an adapter](../../code05_infer_lora.ipynb) | how is an answer written? |
# | 10 | [Diagnosis](10_diagnosis.ipynb) | it does not work: why? |
# | 11 | [Scores](11_scores.ipynb) | how good is it? |
# | 12 | [The real size](12_real_size.ipynb) | what does a real training need? |
# | 13 | [Project](13_project.ipynb) | what will you teach it? |
#
# ## Where it comes from
#
# These lessons rebuild [train_llava](https://github.com/yuanzhoulvpi2017/zero_nlp/tree/main/train_llava) by yuanzhoulvpi2017. His videos, in Chinese, go with lessons 3 and 4 ([the source](https://www.bilibili.com/video/BV1nw4m1S7nZ/), [build one](https://www.bilibili.com/video/BV1GS411P74b/)) and with lessons 5 to 8 ([data and Trainer](https://www.bilibili.com/video/BV1Si421v7j1/)). LLaVA itself is by [Liu et al.](https://arxiv.org/abs/2304.08485)
#
# ## Common questions
#
# **What must I know before?** Python, and roughly what a matrix product is. PyTorch is explained where it is used.
#
# **Do I need a GPU?** Not for the lessons: each runs in less than a minute on a CPU. The real training does, and lesson 12 says how many.
#
# **Does the demo carry over to the real model?** The steps, the code and the files do. Which strategy is best does not: the demo has two million weights, and knows coloured digits and shapes, but no photos.
#
# **Are image vectors words?** No. They stand in the row like words, but no word in the table has such a vector. Lesson 2 looks for the nearest words.

# %% [markdown] lang="zh"
# ## 课程
#
# | | 课 | 回答的问题 |
# |---|---|---|
# | 1 | [图片](01_image.ipynb) | 图片怎样变成向量？ |
# | 2 | [文字](02_text.ipynb) | 文字怎样变成向量，图片插在哪里？ |
# | 3 | [60 行](03_tiny.ipynb) | 能不能用 60 行写一个 LLaVA？ |
# | 4 | [搭建](code03_build_model_show.ipynb) | 怎样用 CLIP 和对话模型拼出 LLaVA？ |
# | 5 | [数据](05_data.ipynb) | 一条数据里，哪些要学，哪些不学？ |
# | 6 | [训练循环](06_loop.ipynb) | 训练时发生了什么？ |
# | 7 | [训练策略](07_strategies.ipynb) | 该训练哪些权重？ |
# | 8 | [ZeRO](08_zero.ipynb) | 显存用到哪里去了？ |
# | 9 | 推理：[完整模型](code05_infer.ipynb)、[适配器](code05_infer_lora.ipynb) | 回答是怎样写出来的？ |
# | 10 | [诊断](10_diagnosis.ipynb) | 不对劲，问题出在哪里？ |
# | 11 | [评估](11_scores.ipynb) | 模型有多好？ |
# | 12 | [真实规模](12_real_size.ipynb) | 真正的训练需要什么？ |
# | 13 | [自己的项目](13_project.ipynb) | 你想教它什么？ |
#
# ## 来历
#
# 这套课程重写了 yuanzhoulvpi2017 的教程 [train_llava](https://github.com/yuanzhoulvpi2017/zero_nlp/tree/main/train_llava)。他在 B 站的视频值得对照着看：第 3、4 课对应[源码解读](https://www.bilibili.com/video/BV1nw4m1S7nZ/)和[自己搭一个](https://www.bilibili.com/video/BV1GS411P74b/)，第 5 到 8 课对应[数据与 Trainer](https://www.bilibili.com/video/BV1Si421v7j1/)。LLaVA 本身出自 [Liu 等人的论文](https://arxiv.org/abs/2304.08485)。
#
# ## 常见问题
#
# **要先会什么？** 会 Python，大致知道矩阵乘法是怎么回事就够了。用到 PyTorch 的地方都会解释。
#
# **需要 GPU 吗？** 学这些课不需要：每一课在 CPU 上一分钟之内跑完。真实的训练需要，第 12 课会算要几张。
#
# **演示里学到的，用到真实模型上还成立吗？** 步骤、代码、文件都一样。但各种策略孰优孰劣不能照搬：演示模型只有两百万个权重，只认识彩色的数字和形状，不认识照片。
#
# **图像向量是词吗？** 不是。它们像词一样排在序列里，但词向量表里没有一行和它们相同。第 2 课会找出离它们最近的词。

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** A prompt has 40 tokens of text and two images. How long is its row in the demo, and how long in the real model?
#
# 🐕 **Middle.** Stage 1 trains the projector alone. What share of the real model's weights does it have, and in how many matrices? (Look into `whole.model.multi_modal_projector`.)
#
# 🦁 **Hard.** Suppose the tower took 672 × 672 pixels instead of 336 × 336, with patches of the same size. How many vectors would an image become? In the language model each position looks at itself and at all positions before it (this is called attention). How many such pairs are there within one image, and by what factor do they grow?

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 一条提示有 40 个文字词元和两张图片。在演示模型里序列有多长？真实模型里呢？
#
# 🐕 **中等。** 第一阶段只训练投影层。它占真实模型全部权重的多大比例？分布在几个矩阵里？（看看 `whole.model.multi_modal_projector`。）
#
# 🦁 **困难。** 假设视觉塔的输入从 336 × 336 像素变成 672 × 672 像素，图块大小不变，一张图会变成多少个向量？在语言模型里，每个位置都要看自己和前面的所有位置（这叫注意力）。一张图内部这样的位置对有多少？变成原来的几倍？

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 Each image takes as many places as it has patches.

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 一张图有多少个图块，就占多少个位置。

# %% tags=["solution"]
for each in demo, real:
    print(f"40 + 2 x {each.vectors} = {40 + 2 * each.vectors}")

# %% [markdown] lang="en"
# 🐕 About 0.2%, in two matrices, each with a bias. All other weights stay as they are in stage 1, so training cannot harm them.

# %% [markdown] lang="zh"
# 🐕 大约 0.2%，只有两个矩阵，各带一个偏置。第一阶段其余的权重都不变，所以训练伤不到它们。

# %% tags=["solution"]
projector = dict(whole.model.multi_modal_projector.named_parameters())
for name, weight in projector.items():
    print(f"{name:<16}{tuple(weight.shape)}")
share = sum(weight.numel() for weight in projector.values()) / sum(weight.numel() for weight in whole.parameters())
print(f"{share:.2%} of all weights")
assert share < 0.005

# %% [markdown] lang="en"
# 🦁 2,304 vectors, four times as many, and about sixteen times as many pairs. This is why resolution is expensive.

# %% [markdown] lang="zh"
# 🦁 2304 个向量，是原来的 4 倍；位置对大约是 16 倍。这就是高分辨率昂贵的原因。


# %% tags=["solution"]
def pairs(length: int) -> int:
    return length * (length + 1) // 2


for pixels in (336, 672):
    print(f"{pixels} pixels: {(pixels // 14) ** 2} vectors, {pairs((pixels // 14) ** 2):,} pairs")
assert round(pairs(48**2) / pairs(24**2)) == 16

# %% [markdown] lang="en"
# Next lesson: [how an image becomes vectors](01_image.ipynb).

# %% [markdown] lang="zh"
# 下一课：[图片怎样变成向量](01_image.ipynb)。
