# %% [markdown] lang="en"
# # 13. A project of your own
#
# The lessons so far showed how a LLaVA is made; in this one you use it. You have images of your own, you want answers of your own kind, and there is a trained model to start from, the **base**. The project here takes a minute: the model learns to read dice, which the demo's model has never seen. Its steps are those of any project, and stay the same if your images are X-rays or receipts.
#
# ## What you will know
#
# - how to write your data down, and what to keep out of training;
# - which checks of the data take a second and may save a day;
# - how to tell what the model has learned, and what it has forgotten meanwhile.

# %% [markdown] lang="zh"
# # 13. 做一个自己的项目
#
# 前面讲的是 LLaVA 怎样做出来，这一课来用它：你有自己的图片，想要自己的那种回答，手上还有一个训练好的模型作**基座（base）**。这里的项目很小，一分钟就能跑完：教模型认骰子，演示模型从来没见过骰子。步骤却和任何项目都一样，换成 X 光片或者小票也不用改。
#
# ## 你会学到
#
# - 自己的数据怎样写，哪些要留出来不参加训练；
# - 训练前花一秒检查哪些东西，能省下一整天；
# - 怎样知道模型学会了什么，又忘掉了什么。

# %% tags=["figure"]
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.scenes import COLOURS
from tutorial.figures import dice
from tutorial.tools.commands import run
from tutorial.tools.quiet import quiet

quiet()
FOLDER = Path("output/lesson_13")
shutil.rmtree(FOLDER, ignore_errors=True)

DICE = dict(zip("⚀⚁⚂⚃⚄⚅", ["one", "two", "three", "four", "five", "six"], strict=True))
PAINTS = ["red", "green", "blue", "yellow", "purple", "white"]  # six of the demo's eight colours
HELD_OUT = [*zip(DICE, PAINTS, strict=True)]  # ⚀ in red, ⚁ in green and so on: never in training
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def draw_die(face, colour, rng):
    """A die near the middle of an image of 112 x 112 pixels, a little larger or smaller each time."""
    image = Image.new("RGB", (112, 112), tuple(rng.integers(10, 40, 3)))  # dark, as in the demo
    font = ImageFont.truetype(FONT, int(rng.integers(100, 110)))
    middle = 56 + rng.integers(-3, 4, 2)
    ImageDraw.Draw(image).text(tuple(middle), face, tuple(COLOURS[colour]), font, anchor="mm")
    return image


rng = np.random.default_rng(0)
PAIRS = [(face, colour) for face in DICE for colour in PAINTS]
dice.sheet({pair: draw_die(*pair, rng) for pair in PAIRS}, HELD_OUT)

# %% [markdown] lang="en"
# ## Write it down
#
# The figure shows six faces in six colours. The six framed pairs never occur in training: they are the *held-out* data. Do not pick held-out data at random; choose what differs in kind from the training data. A model that has learned what a three is and what blue is can name a blue three. A model that has learned images by heart cannot.
#
# A data set is a folder: the images, and `chat.json` with a question and an answer for each (lesson 5). The scores will be given for each `category`. (The demo's language model knows few words, and the answers use only those. A real language model knows all that you need.)

# %% [markdown] lang="zh"
# ## 把数据写下来
#
# 图中是六种点数、六种颜色。带框的六种组合从不在训练里出现，它们就是测试集（held-out data）。测试集要选和训练数据有实质区别的，不能只是随机抽几张：真学会了什么是三点、什么是蓝色的模型，认得出蓝色的三点；靠死记图片的模型认不出来。
#
# 一个数据集就是一个文件夹：里面有图片，还有 `chat.json`，每张图一问一答（第 5 课）。打分时按 `category` 分组。（演示的语言模型只认识很少的词，所以回答只用这些词；真实的语言模型没有这个限制。）

# %%
QUESTION = "Which number do you see?"


def write_data(name, pairs, each):
    """A folder of `each` images of every pair."""
    folder, records = FOLDER / name, []
    (folder / "images").mkdir(parents=True)
    for face, colour in pairs * each:
        image, answer = f"{len(records)}.png", f"It shows a {colour} {DICE[face]}."
        draw_die(face, colour, rng).save(folder / "images" / image)
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        category = "held out" if (face, colour) in HELD_OUT else "known"
        records.append({"id": image, "image": image, "category": category, "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records, indent=1))
    return records


KNOWN = [pair for pair in PAIRS if pair not in HELD_OUT]
records = write_data("train", KNOWN, 6)
write_data("test", KNOWN + HELD_OUT * 3, 1)  # new drawings of known pairs, and the pairs that were held out
print(json.dumps(records[0], indent=1))

# %% [markdown] lang="en"
# Before we go on, we make two common mistakes on purpose: a wrong file name, and an empty answer.

# %% [markdown] lang="zh"
# 先故意犯两个常见的错：写错一个文件名，空着一个答案。

# %%
faulty = json.loads(json.dumps(records))
faulty[3]["image"] = "3.jpg"
faulty[5]["conversations"][1]["value"] = ""
chat = FOLDER / "train" / "chat.json"
chat.write_text(json.dumps(faulty))
run(f"train_llava.check_data --data_path {FOLDER}/train --output_dir {FOLDER}/report --workers 0")

# %% [markdown] lang="en"
# `check_data` reads everything and names both mistakes; its last line counts the records without usable text. We correct them, and look at what the model will get. `show_batch` makes a web page of that; here are four samples as a figure. The question is above, and what is learned stands below in green.

# %% [markdown] lang="zh"
# `check_data` 把数据从头读到尾，两个错都指了出来；最后一行只数文本有问题的数据。改好之后，再看看模型实际拿到的是什么。`show_batch` 会生成一个网页，这里画出其中四条：上面是问题，下面绿色的是要学的部分。

# %%
from train_llava.data import LlavaDataset
from train_llava.model.folder import save_llava
from tutorial.tools.trained import trained_llava

chat.write_text(json.dumps(records))
model, processor = trained_llava()  # what `bash run_zero2.sh` makes: our base
save_llava(model, processor, FOLDER / "base")
run(
    f"train_llava.show_batch --model_name_or_path {FOLDER}/base --data_path {FOLDER}/train --output {FOLDER}/batch.html"
)
train_set, test_set = LlavaDataset(FOLDER / "train"), LlavaDataset(FOLDER / "test")
dice.batch(processor, [train_set[i] for i in (0, 25, 50, 75)])

# %% [markdown] lang="en"
# ## Before
#
# Score the base first. Without this number you cannot say later what your training has changed.

# %% [markdown] lang="zh"
# ## 训练之前
#
# 先给基座打一次分。没有这个数，训练之后就说不清改变了什么。

# %%
from train_llava.model.generate import caption_rows


def score(model_folder, name):
    """The answers to the test data, by `train_llava.evaluate`, and the share of each category that is exactly right."""
    run(
        f"train_llava.evaluate --model_name_or_path {model_folder} --data_path {FOLDER}/test"
        f" --output_dir {FOLDER}/{name} --max_new_tokens 40 --batch_size 32"
    )
    metrics = json.loads((FOLDER / name / "metrics.json").read_text())
    answers = [json.loads(line) for line in (FOLDER / name / "samples.jsonl").read_text().splitlines()]
    return {kind: each["exact_match"] for kind, each in metrics["categories"].items()}, answers


before, answers = score(FOLDER / "base", "before")
print("it answers:", answers[0]["answer"])
assert not any(before.values())

# %% [markdown] lang="en"
# Nothing is right, as expected: the base was never trained on dice or on this question.
#
# ## Train
#
# We train LoRA and the projector, in 100 steps of 8 samples. `train_llava.train` is what `run_zero2.sh` starts (lesson 6); here it runs in one process, with the strategy `use_lora` (lesson 7) and a learning rate of 2e-3.

# %% [markdown] lang="zh"
# 不出所料，全错：基座没学过骰子，也没学过这个问题。
#
# ## 训练
#
# 训练 LoRA 和投影层，每步 8 条，共 100 步。`run_zero2.sh`（第 6 课）启动的就是 `train_llava.train`；这里只用一个进程，策略换成 `use_lora`（第 7 课），学习率 2e-3。


# %%
def train(name, data, steps=100):
    """Trains the base on some data; returns the losses."""
    run(
        f"train_llava.train --model_name_or_path {FOLDER}/base --data_path {data} --output_dir {FOLDER}/{name}"
        f" --train_type use_lora --max_steps {steps} --per_device_train_batch_size 8 --learning_rate 2e-3"
        " --adam_beta2 0.95 --lr_scheduler_type cosine --warmup_steps 0.03"
        " --logging_steps 1 --save_strategy no --report_to none --use_cpu true",
        show=False,  # a line for each step
    )
    history = json.loads((FOLDER / name / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


losses = train("dice", FOLDER / "train")
after, answers = score(FOLDER / "dice", "after")
assert after["known"] > after["held out"] > 0.4

# %% [markdown] lang="en"
# Read the last lines, too: `evaluate` also computes the loss with another image. If it stays the same, the model does not look (lesson 10).

# %% [markdown] lang="zh"
# 最后几行值得细看：`evaluate` 还会给每个问题配上另一张图片，再算损失。如果损失没有变化，说明模型没在看图（第 10 课）。

# %%
dice.result(losses, {"before": before, "after": after})

# %% [markdown] lang="en"
# ## What we see
#
# The loss falls, and the score rises on new drawings. But read the two groups of bars apart. *Known* says whether the model has learned the dice. *Held out* says whether it has learned that number and colour are two things. Only the second tells how it will do on pairs that it has not seen.
#
# Numbers hide faults, so read answers. Here are the first six about held-out pairs; `report.html`, which `evaluate` writes beside its metrics, shows the worst and the best of all.

# %% [markdown] lang="zh"
# ## 我们看到
#
# 损失降了，新画的图片上得分也升了。但两组要分开看：known 说明它有没有学会认骰子，held out 说明它有没有学会点数和颜色是两回事。遇到没见过的组合，它能答得怎样，只有后者能告诉你。
#
# 数字会掩盖问题，所以还要看具体的回答。下面是没参加训练的组合里的前六条；`evaluate` 在指标旁边写的 `report.html` 列出了全部回答里最差的和最好的。

# %%
dice.answers(test_set, [row for row in answers if row["category"] == "held out"][:6])

# %% [markdown] lang="en"
# A check list for every project, with the lessons in brackets:
#
# 1. Write ten records by hand. Would *you* know the answer from the image alone, as small as the tower sees it? (1, 5)
# 2. Hold out something that differs in kind. (this one)
# 3. `check_data`, `show_batch`, `estimate`. (5, 12)
# 4. Score the base before you train. (11)
# 5. Train for minutes on a tenth of the data. Does the loss leave the shelf? (6)
# 6. Own image, other image, grey image: does it look? (10)
# 7. What has it forgotten? (see below)
# 8. Only then take more data, more steps, other strategies. (7)

# %% [markdown] lang="zh"
# 每个项目都适用的清单，括号里是对应的课：
#
# 1. 亲手写十条数据。按视觉塔看到的大小，只看图，*你自己*答得出来吗？（1、5）
# 2. 留出一部分有实质区别的数据。（本课）
# 3. `check_data`、`show_batch`、`estimate`。（5、12）
# 4. 先给基座打分。（11）
# 5. 用十分之一的数据训练几分钟。损失离开平台了吗？（6）
# 6. 自己的图、别人的图、灰图：它在看图吗？（10）
# 7. 它忘了什么？（见下文）
# 8. 然后才轮到更多数据、更多步数、别的策略。（7）

# %% [markdown] lang="en"
# ## Common questions
#
# **Has it forgotten what it could do?** Most likely, if you train on new data alone. The cell below asks the base and our model for captions of the demo's own images. The remedy is to mix in old data: `DATA="data/mine data/old:0.1"` takes a tenth of it in each epoch. Exercise 🦁 does it.
#
# **How many records do I need?** Fewer than you think for a new format of answers, more than you think for a new kind of thing. Do not guess: take a part of your data away, and see how much the score falls (exercise 🐕).
#
# **Which strategy?** `use_lora` first. If your images differ much from the photos CLIP was trained on, as X-rays do, try `none` with a small `--vision_learning_rate`, too (lesson 7).
#
# **Can it answer in Chinese?** Yes. Write the answers in Chinese. Qwen knows the language, and the projector passes on vectors, not words.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **原来会的，它忘了吗？** 只用新数据训练，多半会忘。下面的代码让基座和我们的模型都给演示自带的图片写描述。办法是混入旧数据：`DATA="data/mine data/old:0.1"` 表示每轮取其中的十分之一。练习 🦁 就做这件事。
#
# **要多少条数据？** 学一种新的回答格式，比你想的少；学一类新事物，比你想的多。不用猜：拿掉一部分数据，看分数掉多少（练习 🐕）。
#
# **选哪种策略？** 先用 `use_lora`。如果图片和 CLIP 见过的照片差得很远，比如 X 光片，也试试 `none` 加一个很小的 `--vision_learning_rate`（第 7 课）。
#
# **能用中文回答吗？** 能，把答案写成中文就行。Qwen 本来就会中文，投影层传递的是向量，和语言无关。

# %%
from demo.make_data import write_records
from train_llava.model.load import load

write_records(FOLDER / "old", "captions", "train", 24, seed=1)
old = LlavaDataset(FOLDER / "old")


def right_captions(folder):
    """How many of the demo's images it describes rightly."""
    return sum(row["exact"] for row in caption_rows(*load(folder), old, batch_size=24))


right = {name: right_captions(FOLDER / name) for name in ("base", "dice")}
for name, count in right.items():
    print(f"{name}: {count} of {len(old)} captions of the demo's images are right")
assert right["dice"] < right["base"] / 2

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Ask the trained model in other words: "What does the image show?" Does it still answer right? (Lesson 9 has `ask` and `generate`.)
#
# 🐕 **Middle.** Train on two drawings of each known pair instead of six, 100 steps. Which score falls more, *known* or *held out*?
#
# 🦁 **Hard.** Mix 180 captions of the demo into the training, so that about half of the data is old. What do you gain, and what do you lose?
#
# Then do a real one. Take 200 photos of one thing that you know better than any model: plants on your balcony, screens of your program, parts in your workshop. Write one question and one answer for each, hold out a fifth that differs in kind, and go through the list above with the [real model](12_real_size.ipynb).

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 换一种问法问训练好的模型："What does the image show?" 它还答得对吗？（`ask` 和 `generate` 见第 9 课。）
#
# 🐕 **中等。** 每种已知组合只用两张图训练，而不是六张，还是 100 步。known 和 held out，哪一组的分数掉得更多？
#
# 🦁 **困难。** 训练时混入 180 条演示的图片描述，让旧数据大约占一半。得到了什么，失去了什么？
#
# 最后做一个真的。挑一样你比任何模型都熟的东西，拍 200 张照片：阳台上的植物、自己程序的界面、车间里的零件。每张写一问一答，留出有实质区别的五分之一，用[真实大小的模型](12_real_size.ipynb)把上面的清单走一遍。

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 Yes. But ask for the colour, and it says the same sentence: it met one question only, and learned to answer without reading it. The remedy is data: several questions and several wordings of each, as the demo's own data has.

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 答得对。但问颜色，它说的还是同一句：训练里只有一个问题，它学会了不读问题就回答。办法在数据里：准备几种问题，每种问题几种问法，演示自己的数据就是这样做的。

# %% tags=["solution"]
from train_llava.model.generate import ask, generate

trained = load(FOLDER / "dice")
for question in (QUESTION, "What does the image show?", "Which colour does the die have?"):
    print(f"{question:<34}{generate(*trained, [ask(question, test_set[0]['images'])])[0]}")

# %% [markdown] lang="en"
# 🐕 The steps are the same, so what differs is how many drawings there are. Both scores fall. But *held out* had less, so it loses the larger part of its right answers. With few drawings it is easier to learn pairs by heart.

# %% [markdown] lang="zh"
# 🐕 步数相同，差别只在图片少了。两组的分数都掉了，但 held out 本来就低，所以它丢掉的正确回答占的比例更大。图少了，更容易死记组合。

# %% tags=["solution"]
write_data("few", KNOWN, 2)
train("few_dice", FOLDER / "few")
fewer, _ = score(FOLDER / "few_dice", "after_few")
for kind in after:
    print(f"{kind}: {after[kind]:.0%} with {len(train_set)} records, {fewer[kind]:.0%} with {len(KNOWN) * 2}")
assert fewer["held out"] / after["held out"] < fewer["known"] / after["known"] < 1

# %% [markdown] lang="en"
# 🦁 The old skill stays, and in the same number of steps the new one is learned less well. This is why real models are trained on mixtures of data.

# %% [markdown] lang="zh"
# 🦁 旧本领保住了；步数相同，新本领学得差一些。真实模型的训练数据总是混合的，原因就在这里。

# %% tags=["solution"]
write_records(FOLDER / "more", "captions", "train", 180, seed=2)
train("mixed", f"{FOLDER}/train {FOLDER}/more")
mixed, _ = score(FOLDER / "mixed", "after_mixed")
right["mixed"] = right_captions(FOLDER / "mixed")
for name, scores in {"dice": after, "mixed": mixed}.items():
    print(f"{name}: held out {scores['held out']:.0%}, old captions right {right[name]} of {len(old)}")

# %% [markdown] lang="en"
# Next lesson: there is none; your own project comes next. To look something up, [lesson 0](00_map.ipynb) has the map.

# %% [markdown] lang="zh"
# 下一课：没有了，接下来是你自己的项目。想查什么，[第 0 课](00_map.ipynb)有地图。
