# %% [markdown] lang="en"
# # 13. A project of your own
#
# Thirteen lessons about how a LLaVA is made; in this one you use it. You have images of your own, you want answers of your own, and there is a trained model to start from. The project here is small enough for a minute: dice, which the demo's model has never seen. Its steps are those of any project. Nothing changes in them when your images are X-rays or receipts.
#
# ## What you will know
#
# - how to write your data down, and what to keep out of training;
# - which looks at the data cost a second and save a day;
# - how to tell what the model has learned, and what it has forgotten meanwhile.

# %% [markdown] lang="zh"
# # 13. 做一个自己的项目
#
# 前面讲的是 LLaVA 怎样做出来，这一课来用它：你有自己的图片，想要自己的回答，手上还有一个训练好的模型。这里的项目很小，一分钟就能跑完：认骰子，演示模型从来没见过骰子。步骤却和任何项目都一样，换成 X 光片或者小票也不用改。
#
# ## 你会学到
#
# - 自己的数据怎样写，哪些要留出来不参加训练；
# - 训练前花一秒看哪些东西，能省下一整天；
# - 怎样知道模型学会了什么，又忘掉了什么。

# %%
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.scenes import COLOURS
from tutorial import project_figures
from tutorial.commands import run
from tutorial.quiet import quiet

quiet()
FOLDER = Path("output/lesson_13")
shutil.rmtree(FOLDER, ignore_errors=True)

DICE = dict(zip("⚀⚁⚂⚃⚄⚅", ["one", "two", "three", "four", "five", "six"], strict=True))
HELD_OUT = [*zip(DICE, COLOURS, strict=True)]  # ⚀ in red, ⚁ in green and so on: never in training
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def draw_die(face, colour, rng):
    """A die in an image of 112 x 112 pixels, of any size, at any place."""
    image = Image.new("RGB", (112, 112), tuple(rng.integers(10, 40, 3)))
    font = ImageFont.truetype(FONT, int(rng.integers(90, 120)))
    left, top, right, bottom = font.getbbox(face)
    corner = rng.integers(0, 112 - right + left), rng.integers(0, 112 - bottom + top)
    ImageDraw.Draw(image).text((corner[0] - left, corner[1] - top), face, tuple(COLOURS[colour]), font)
    return image


rng = np.random.default_rng(0)
PAIRS = [(face, colour) for face in DICE for colour in COLOURS]
project_figures.sheet({pair: draw_die(*pair, rng) for pair in PAIRS}, HELD_OUT)

# %% [markdown] lang="en"
# ## Write it down
#
# Six faces in six colours. The six framed pairs never occur in training: they are the *held-out* data. Choose such data so that it differs in kind, not by chance alone. A model that has learned what a three is and what blue is can name a blue three. One that has learned images by heart cannot.
#
# A data set is a folder: the images, and `chat.json` with a question and an answer for each. The scores will be sorted by `category`. (The demo's language model knows few words; the answers use those. A real one knows all that you need.)

# %% [markdown] lang="zh"
# ## 把数据写下来
#
# 六种点数，六种颜色。带框的六种组合从不在训练里出现，它们就是测试集。选测试集要选实质上不同的数据，不能只是随机抽几张：真学会了什么是三点、什么是蓝色的模型，认得出蓝色的三点；靠死记图片的模型认不出来。
#
# 一个数据集就是一个文件夹：里面有图片，还有 `chat.json`，每张图一问一答。打分时按 `category` 分组。（演示的语言模型只认识很少的词，所以回答只用这些词；真实的语言模型没有这个限制。）

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
# Before we go on, let us make two mistakes that everybody makes: a wrong file name, and an answer that is empty.

# %% [markdown] lang="zh"
# 先别急，故意犯两个谁都犯过的错：文件名写错一个，答案空着一个。

# %%
faulty = json.loads(json.dumps(records))
faulty[3]["image"] = "3.jpg"
faulty[5]["conversations"][1]["value"] = ""
chat = FOLDER / "train" / "chat.json"
chat.write_text(json.dumps(faulty))
run(f"train_llava.check_data --data_path {FOLDER}/train --output_dir {FOLDER}/report --workers 0")

# %% [markdown] lang="en"
# `check_data` reads everything and names both. We mend them, and look at what the model will get. `show_batch` makes a page of that; here are four of its samples as a figure. Green is what is learned.

# %% [markdown] lang="zh"
# `check_data` 把数据从头读到尾，两个错都点了名。改好之后，再看看模型实际拿到的是什么。`show_batch` 会生成一个网页，这里把其中四条画出来。绿色是要学的部分。

# %%
from train_llava.data import LlavaDataset
from train_llava.model.folder import save_llava
from tutorial.trained import trained_llava

chat.write_text(json.dumps(records))
model, processor = trained_llava()  # what `bash run_zero2.sh` makes: our base
save_llava(model, processor, FOLDER / "base")
run(
    f"train_llava.show_batch --model_name_or_path {FOLDER}/base --data_path {FOLDER}/train --output {FOLDER}/batch.html"
)
train_set, test_set = LlavaDataset(FOLDER / "train"), LlavaDataset(FOLDER / "test")
project_figures.batch(processor, [train_set[i] for i in (0, 25, 50, 75)])

# %% [markdown] lang="en"
# ## Before
#
# Score the base first. Without this number you cannot say afterwards what your training has changed.

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

# %% [markdown] lang="en"
# Nothing is right, of course: it has never been asked this.
#
# ## Train
#
# LoRA and the projector, 100 steps of 8. This is the command of lesson 7, with the demo's rate.

# %% [markdown] lang="zh"
# 当然全错：从来没有人这样问过它。
#
# ## 训练
#
# LoRA 加投影层，每步 8 条，共 100 步。命令就是第 7 课的那一条，学习率用演示的。


# %%
def train(name, data, steps=100):
    """Adapts the base to some data; returns the losses."""
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

# %% [markdown] lang="en"
# The last lines are worth reading: `evaluate` also shows each question with another image. If the loss stays the same, the model does not look.

# %% [markdown] lang="zh"
# 最后几行值得细看：`evaluate` 还会给每个问题配上另一张图片。如果损失没有变化，说明模型没在看图。

# %%
project_figures.result(losses, {"before": before, "after": after})

# %% [markdown] lang="en"
# ## What we see
#
# The loss falls, and the score rises on new drawings. But look at the two bars apart: *known* says whether it has learned the dice, *held out* whether it has understood that a number and a colour are two things. Only the second is a promise for images that nobody has shown it.
#
# Numbers hide faults, so look at answers. Here are the first ones of the held-out pairs; `report.html` in the same folder shows the worst and the best of all.

# %% [markdown] lang="zh"
# ## 我们看到
#
# 损失降了，新画的图片上得分也升了。但两组要分开看：known 说明它学会了认骰子，held out 说明它是否明白点数和颜色是两回事。只有后者，才能保证它见到没人教过的图片时也答得对。
#
# 数字会掩盖问题，所以还要看具体的回答。下面是没参加训练的那几种组合；同一个文件夹里的 `report.html` 列出了全部回答里最差的和最好的。

# %%
project_figures.answers(test_set, [row for row in answers if row["category"] == "held out"][:6])

# %% [markdown] lang="en"
# A check list for every project; each line is a lesson:
#
# 1. Ten records by hand. Would *you* know the answer from the image alone, at the tower's size? (1, 5)
# 2. Something held out that differs in kind.
# 3. `check_data`, `show_batch`, `estimate`. (5, 12)
# 4. The base's score, before anything else. (11)
# 5. A training of minutes on a tenth of the data. Does the loss leave the shelf? (6)
# 6. Own image, other image, grey image: does it look? (10)
# 7. What has it forgotten? (below)
# 8. Only then more data, more steps, other strategies. (7)

# %% [markdown] lang="zh"
# 每个项目都适用的清单，括号里是对应的课：
#
# 1. 亲手写十条数据。按视觉塔看到的大小，只看图，*你自己*答得出来吗？（1、5）
# 2. 留出一部分实质上不同的数据。
# 3. `check_data`、`show_batch`、`estimate`。（5、12）
# 4. 先给基座打分。（11）
# 5. 用十分之一的数据训练几分钟。损失离开平台了吗？（6）
# 6. 自己的图、别人的图、灰图：它在看图吗？（10）
# 7. 它忘了什么？（见下文）
# 8. 然后才轮到更多数据、更多步数、别的策略。（7）

# %% [markdown] lang="en"
# ## Common questions
#
# **Has it forgotten what it could do?** Most likely, if you train on new data alone. The cell below asks the base and our model for captions of the demo's own images. The remedy is to mix in old data: `DATA="data/mine data/old:0.1"`; the last exercise does it.
#
# **How many records do I need?** Fewer than you think for a new format of answers, more than you think for a new kind of thing. Do not guess: take a part of your data away, and see how much the score falls (second exercise).
#
# **Which strategy?** `use_lora` first. If the images are of another world than CLIP's photos, such as X-rays, try `none` with a small `--vision_learning_rate`, too.
#
# **Can it answer in Chinese?** Yes. Write the answers in Chinese. Qwen knows the language; the projector does not care.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **原来会的，它忘了吗？** 只用新数据训练，多半会忘。下面的代码让基座和我们的模型都给演示自带的图片写描述。办法是混入旧数据：`DATA="data/mine data/old:0.1"`，最后一道练习就做这件事。
#
# **要多少条数据？** 学一种新的回答格式，比你想的少；学一类新事物，比你想的多。不用猜：拿掉一部分数据，看分数掉多少（第二道练习）。
#
# **选哪种策略？** 先用 `use_lora`。如果图片和 CLIP 见过的照片差得很远，比如 X 光片，也试试 `none` 加一个很小的 `--vision_learning_rate`。
#
# **能用中文回答吗？** 能，把答案写成中文就行。Qwen 本来就会中文，投影层不管语言。

# %%
from demo.make_data import write_records
from train_llava.model.load import load

write_records(FOLDER / "old", "captions", "train", 24, seed=1)
old = LlavaDataset(FOLDER / "old")


def right_captions(folder):
    """How many of the demo's images it describes rightly."""
    return sum(row["exact"] for row in caption_rows(*load(folder), old, batch_size=24))


for name in ("base", "dice"):
    print(f"{name}: {right_captions(FOLDER / name)} of {len(old)} captions of the demo's images are right")

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Ask the trained model in other words: "What does the image show?" Does it still answer?
#
# 🐕 **Middle.** Train on a third of the records. Which of the two bars suffers more?
#
# 🦁 **Hard.** Mix 180 captions of the demo into the training, so that about half of each batch is old. What do you gain, and what do you lose?
#
# And then a real one. Take 200 photos of one thing that you know better than any model: plants on your balcony, screens of your program, parts in your workshop. Write one question and one answer for each, keep out a fifth that differs in kind, and go through the list above with the [real model](12_real_size.ipynb).

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 换一种问法问训练好的模型："What does the image show?" 它还答得上来吗？
#
# 🐕 **中等。** 只用三分之一的数据训练。两组分数哪一组掉得更多？
#
# 🦁 **困难。** 训练时混入 180 条演示的图片描述，让每个批次大约一半是旧数据。得到了什么，失去了什么？
#
# 最后做一个真的。挑一样你比任何模型都熟的东西，拍 200 张照片：阳台上的植物、自己程序的界面、车间里的零件。每张写一问一答，留出五分之一实质上不同的，用[真实大小的模型](12_real_size.ipynb)把上面的清单走一遍。

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 Small models hang on the words they were trained with. The remedy is data: several wordings of each question, as the demo's own data has.

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 小模型很依赖训练时的原话。办法在数据里：每个问题准备几种问法，演示自己的数据就是这样做的。

# %% tags=["solution"]
from train_llava.model.generate import ask, generate

trained = load(FOLDER / "dice")
for question in (QUESTION, "What does the image show?", "Which colour does the die have?"):
    print(f"{question:<34}{generate(*trained, [ask(question, test_set[0]['images'])])[0]}")

# %% [markdown] lang="en"
# 🐕 Two drawings of each known pair. `train` takes half of the steps, so that each record is seen more often, not less.

# %% [markdown] lang="zh"
# 🐕 每种已知组合只剩两张。步数减半，每条数据被看到的次数反而更多。

# %% tags=["solution"]
write_data("few", KNOWN, 2)
train("few_dice", FOLDER / "few", steps=50)
fewer, _ = score(FOLDER / "few_dice", "after_few")
for kind in after:
    print(f"{kind}: {after[kind]:.0%} with {len(train_set)} records, {fewer[kind]:.0%} with {len(KNOWN) * 2}")

# %% [markdown] lang="en"
# 🦁 The old skill stays, and the new one takes more steps. That is why instruction data of real models is always a mixture.

# %% [markdown] lang="zh"
# 🦁 旧本领保住了，新本领学得慢一些。真实模型的指令数据总是混合的，原因就在这里。

# %% tags=["solution"]
write_records(FOLDER / "more", "captions", "train", 180, seed=2)
train("mixed", f"{FOLDER}/train {FOLDER}/more")
mixed, _ = score(FOLDER / "mixed", "after_mixed")
print(f"held out: {mixed['held out']:.0%}; old captions: {right_captions(FOLDER / 'mixed')} of {len(old)}")

# %% [markdown] lang="en"
# Next lesson: there is none. The next one is your project. [Lesson 0](00_map.ipynb) has the map, if you want to look something up.

# %% [markdown] lang="zh"
# 下一课：没有了，接下来是你自己的项目。想查什么，[第 0 课](00_map.ipynb)有地图。
