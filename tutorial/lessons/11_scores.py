# %% [markdown] lang="en"
# # 11. Scores and serving
#
# "It works well" is no result. This lesson puts numbers on a model: how many answers are right, by which rule, and whether the image had any part in it. Then the model goes to work, and answers over HTTP. The scores are those of `python -m train_llava.evaluate`; here you see how each is made.
#
# ## What you will know
#
# - what exact match says, and what it hides;
# - how VQAv2, ChartQA, DocVQA and POPE count, with small examples;
# - why a blind model scores more than zero, and how to catch it with three losses;
# - how sure a score is, and who can serve the model.

# %% [markdown] lang="zh"
# # 11. 评估与部署
#
# “效果不错”不算结论。这一课给模型打分：答对多少，按什么规则算对，图片到底起没起作用。然后让模型上岗，通过 HTTP 回答问题。这里的指标就是 `python -m train_llava.evaluate` 给出的那些；这一课看它们各自是怎么算出来的。
#
# ## 你会学到
#
# - 完全匹配（exact match）说明了什么，又掩盖了什么；
# - VQAv2、ChartQA、DocVQA、POPE 各怎么计分，都配小例子；
# - 看不见图的模型为什么也能得分，怎样用三个损失揪出它；
# - 一个分数有多可靠，模型可以用什么来部署。

# %% tags=["figure"]
from tutorial import bars, score_figures, sheets
from tutorial.quiet import quiet

quiet()

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from demo.make_data import write_records
from train_llava.build_model import build_llava
from train_llava.data import LlavaDataset
from train_llava.model.generate import caption_rows, generate
from tutorial.trained import trained_llava

FOLDER = Path("output/tutorial/11_scores")
write_records(FOLDER, "held_out", "held_out", 130, seed=0)  # ten questions of each kind
dataset = LlavaDataset(FOLDER, held_out=True)
torch.manual_seed(0)  # of the projector that is untrained
trained, processor = trained_llava()  # what bash run_zero2.sh makes
untrained, _ = build_llava("demo/clip", "demo/qwen", torch.float32)
blind = deepcopy(trained)
blind.model.multi_modal_projector.linear_2.weight.data.zero_()  # every patch of every image is now the same vector
models = {"trained": trained, "blind": blind, "untrained": untrained.eval()}

rows = {name: caption_rows(model, processor, dataset) for name, model in models.items()}
english = [row for row in rows["trained"] if row["reference"].isascii()]
first = {row["category"]: row for row in reversed(english)}  # the first of each kind stays
sheets.sheet([*first.values()][:-9:-1], "Eight held-out images with a question each, and the trained model's answer")

# %% [markdown] lang="en"
# ## Exactly right
#
# Each record of the held-out data asks one question, of one of 13 kinds. The strictest rule is **exact match**: the answer is the reference, letter by letter. We ask three models. *Trained* has the demo's adapter. *Untrained* has a new projector. *Blind* is the trained one with a projector that gives the same vector whatever the image shows.

# %% [markdown] lang="zh"
# ## 一字不差
#
# 测试集里每条数据问一个问题，共 13 类。最严的规则是**完全匹配**：回答和参考答案一字不差。我们问三个模型：*trained* 装着演示用的适配器；*untrained* 的投影层是全新的；*blind* 是把训练好的模型弄瞎：不管图上是什么，投影层都输出同一个向量。

# %% tags=["figure"]
bars.exactly_right(rows)

# %%
chinese = [row for row in rows["trained"] if not row["reference"].isascii()]
no_image = [row for row in rows["blind"] if row["category"] == "text"]
for name, some in {**rows, "trained, in English": english, "in Chinese": chinese, "blind, no image": no_image}.items():
    print(f"{name:<20}{bars.percent(some):4.0f}% of {len(some)}")
assert bars.percent(rows["trained"]) > bars.percent(rows["blind"]) > 0

# %% [markdown] lang="en"
# The other two see nothing of use, and still get something right. Some questions need no image, and others can be guessed: "Is there a heart?" has two answers. So a score means little without the score of somebody who does not look. Exact match also hides a lot. One wrong word of twenty counts as much as nonsense:

# %% [markdown] lang="zh"
# 另外两个模型从图里看不出东西，照样答对了一些。有的问题根本不用看图，有的能猜：“有爱心吗？”只有两种答案。所以报分数时，要同时报一个“不看图”的分数，否则说明不了什么。完全匹配还会掩盖不少东西。二十个词里错一个，和满口胡话同样算错：

# %%
from difflib import SequenceMatcher

wrong = [row for row in english if not row["exact"]]
for row in sorted(wrong, key=lambda row: -len(row["reference"]))[:3]:
    share = SequenceMatcher(None, row["caption"].split(), row["reference"].split()).ratio()
    print(f"{row['caption']}\n{row['reference']}\n  -> {share:.0%} of the words agree, exact match 0\n")

# %% [markdown] lang="en"
# ## How benchmarks count
#
# Each benchmark softens "right" in its own way:
#
# - **VQA accuracy** (VQAv2, TextVQA): ten people answered. Who agrees with four of them or more is fully right.
# - **Relaxed accuracy** (ChartQA): a number may be 5% off.
# - **ANLS** (DocVQA): letters count. It is 1 minus the number of letters to change, divided by the length of the longer text; below a half it is 0.

# %% [markdown] lang="zh"
# ## 基准测试怎样计分
#
# 各个基准都放宽了“对”的标准，方式各不相同：
#
# - **VQA 准确率**（VQAv2、TextVQA）：每题有十个人作答，和其中四人以上一致就得满分；
# - **宽松准确率**（ChartQA）：数字允许差 5%；
# - **ANLS**（DocVQA）：按字母算。1 减去要改的字母数与较长文本长度之比；不到一半记 0。

# %% tags=["figure"]
score_figures.soft_scores()

# %%
from train_llava.pages.scores.scoring import METRICS

people = ["red"] * 2 + ["dark red"] * 7 + ["brown"]
cases = [("exact", "Yellow.", ["yellow"]), ("vqa", "red", people), ("vqa", "The dark red", people)]
cases += [("relaxed", "104", ["100"]), ("relaxed", "106", ["100"]), ("anls", "Invoice 4711", ["invoice 4712"])]
for metric, answer, references in [*cases, ("choice", "The answer is B.", ["B"])]:
    name, score = METRICS[metric]
    print(f"{name:<17} {answer:<17} {', '.join(dict.fromkeys(references)):<21} {score(answer, references):.2f}")

# %% [markdown] lang="en"
# Yes/no questions need more than accuracy, since a model may say yes to anything. **Precision**: of its yes, how many are right? **Recall**: of what is there, how much does it see? **F1** is one number for both. **yes_share** shows the flatterer. Here are 80 questions "Is there ...?", half of them with the answer no, and one more model, which always says yes.

# %% [markdown] lang="zh"
# 是非题光看准确率不够，因为模型可能什么都说“有”。**精确率（precision）**：它说“有”的，多少是对的？**召回率（recall）**：真有的，它看到了多少？**F1** 把两者合成一个数。**yes_share** 是它说“有”的比例，专门揭穿老好人。下面有 80 个“有没有……”的问题，大约一半答案是“没有”；再加一个只会说“有”的模型。

# %% tags=["figure"]
from train_llava.pages.scores.scoring import score
from tutorial.presence import presence_questions

questions, right = presence_questions(80)
said = {name: generate(models[name], processor, questions, max_new_tokens=20) for name in ("trained", "blind")}
said["always yes"] = ["Yes."] * len(right)
yes_no = {}
for name, answers in said.items():
    asked = [{"caption": a, "reference": b} for a, b in zip(answers, right, strict=True)]
    yes_no[name] = {key: value for key, value in score(asked, "yes_no").items() if key.startswith("yes")}
assert yes_no["always yes"]["yes_recall"] == 1 and yes_no["always yes"]["yes_f1"] > 0.6
bars.grouped(yes_no, "", "Accuracy, precision, recall, F1 and share of yes of three models", 1.05)

# %% [markdown] lang="en"
# Who always says yes sees everything that is there, and has a fair F1 for nothing. His accuracy and his `yes_share` give him away.
#
# ## Does it look at the image?
#
# There is a test that needs no rule of what is right. Take the **loss** of the reference answers: with the record's own image, with another record's, and with a grey one. Who looks is surprised by a foreign image, and his loss rises. `evaluate` does this always.

# %% [markdown] lang="zh"
# 只会说“有”的模型，凡是存在的都“看到”了，白得一个还过得去的 F1；准确率和 `yes_share` 让它露馅。
#
# ## 它看图了吗？
#
# 有一种检验不需要规定什么算对：看参考答案的**损失**。分别配上自己的图、别的数据的图和一张灰图。真看图的模型遇到别人的图会“吃惊”，损失上升。`evaluate` 每次都会做这个检验。

# %% tags=["figure"]
from train_llava.model.image_use import figures, losses_by_image, sample, verdict

use = {}
for name, model in models.items():
    use[name] = figures(list(losses_by_image(model, processor, dataset, sample(dataset)[:96], batch_size=16)))
shown = {which: f"loss_{which}_image" for which in ("own", "other", "grey")}
losses = {which: {name: use[name][key] for name in models} for which, key in shown.items()}
bars.grouped(losses, "loss of the right answers", "The loss of three models with the own, another and a grey image")

# %%
for name in models:
    print(f"{name}: {', '.join(f'{which} {some[name]:.3f}' for which, some in losses.items())}\n  {verdict(use[name])}")
assert verdict(use["trained"]).startswith("The model looks at the image")
assert verdict(use["blind"]).startswith("The model ignores the image")

# %% [markdown] lang="en"
# ## Serving
#
# | who asks | what serves |
# |---|---|
# | people with a browser | `python -m train_llava.app` |
# | programs that speak OpenAI's HTTP | `transformers serve`, or vLLM on a GPU |
# | computers without Python | llama.cpp, Ollama |
#
# The page takes an adapter as it is. The others want a whole folder, so merge first; `python -m train_llava.export` writes the files that vLLM, llama.cpp and Ollama read. [Serving](../../docs/serving.md) says what was tested with each. The page is a small server: we start it inside this notebook, and ask it as a program would: JSON with the image in base64. It answers with a line for each piece.

# %% [markdown] lang="zh"
# ## 部署
#
# | 谁来问 | 用什么 |
# |---|---|
# | 用浏览器的人 | `python -m train_llava.app` |
# | 会用 OpenAI 接口的程序 | `transformers serve`，GPU 上用 vLLM |
# | 没装 Python 的电脑 | llama.cpp、Ollama |
#
# 网页可以直接用适配器；其他几种要完整的模型文件夹，所以先合并。vLLM、llama.cpp、Ollama 要读的文件由 `python -m train_llava.export` 生成。各自测试到什么程度，见[部署](../../docs/serving_zh.md)。网页背后是个小服务器，我们在 notebook 里把它启动，像程序那样提问：一段 JSON，图片用 base64 编码。它每写出一小段，就回一行。

# %%
from base64 import b64encode
from urllib.request import Request, urlopen

from train_llava.app import App
from tutorial.page_server import served

image = b64encode(next((FOLDER / "images").glob("held_out_000000.*")).read_bytes()).decode()
message = {"role": "user", "content": "How many things are in the image?", "images": [image]}
with served(App(trained, processor, "demo", [], auth=None)) as address:
    question = Request(f"{address}/answer", json.dumps({"messages": [message]}).encode())
    print(urlopen(question).read().decode())

# %% [markdown] lang="en"
# ## What we see
#
# - **A score needs a floor.** Say what the blind and the untrained model get.
# - **A score needs a rule.** "Right" is something else in each benchmark.
# - **Three losses tell more than one score.** They show whether the image counts at all.
#
# ## Common questions
#
# - **How many questions are enough?** The standard error of a share p over n questions is sqrt(p (1 - p) / n). Two of them to either side hold the true value 19 times in 20. The cell below shows how slowly this shrinks.
# - **The loss is low, but answers are wrong. Why?** The loss is worked out with the right beginning of the answer before each word. When the model writes alone, one early mistake stays.
# - **Which metric for my data?** Sentences: `caption`. A word or a number: `exact` or `relaxed`. [Scoring](../../docs/evaluation.md) has the table, and `--metric` or a field in the record chooses.
# - **Can I compare with a paper?** Only with the same questions, the same prompt and the same metric. lmms-eval does that, and reads our merged folders.

# %% [markdown] lang="zh"
# ## 我们看到
#
# - **分数要有底线。** 把不看图的模型和没训练的模型的得分也报出来。
# - **分数要有规则。** 每个基准对“对”的定义都不一样。
# - **三个损失胜过一个分数。** 它们能看出图片究竟起没起作用。
#
# ## 常见问题
#
# - **测多少题才够？** n 题里答对的比例是 p，标准误差就是 sqrt(p (1 - p) / n)。左右各取两个标准误差，20 次里有 19 次能罩住真实值。下面的单元能看出它缩小得有多慢。
# - **损失很低，回答却错，为什么？** 算损失时，每个词前面都是正确的开头；模型自己写的时候，前面错一个词，后面就一直带着这个错。
# - **我的数据用哪个指标？** 整句用 `caption`，一个词或一个数用 `exact` 或 `relaxed`。[评估](../../docs/evaluation_zh.md)里有对照表；用 `--metric` 选，或者写在数据的字段里。
# - **能和论文里的数比吗？** 题目、提示词、指标都相同才行。lmms-eval 就是做这个的，能直接读合并后的文件夹。

# %%
p = bars.percent(rows["trained"]) / 100
for n in (130, 650, 5000):
    print(f"{n:5} questions: {p:.0%} plus or minus {2 * (p * (1 - p) / n) ** 0.5:.1%}")

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Work out by hand, then check: the ANLS of "cat" for the references "cart" and "dog"; the relaxed accuracy of "48%" for "0.5".
#
# 🐕 **Middle.** What does somebody get who never looks, but knows the data? For each kind of question answer with what is most frequent in the held-out references. How many are exactly right?
#
# 🦁 **Hard.** Is the trained model better than the blind one by luck? Draw 130 questions with replacement, a thousand times, and work out the difference each time. In how many of them is it positive? Which interval holds 95% of them?
#
# ## Solutions
#
# 🐢 "cart" is nearer: one letter of four must be put in, so 0.75. And 48% is 0.48, which is 4% off.

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 先手算再验证："cat" 对参考答案 "cart" 和 "dog" 的 ANLS 是多少？"48%" 对 "0.5" 的宽松准确率是多少？
#
# 🐕 **中等。** 一个从不看图、却了解数据的人能得多少分？每类问题都用测试集参考答案里最常见的那句来答，有多少一字不差？
#
# 🦁 **困难。** 训练好的模型比弄瞎的好，会不会只是运气？有放回地抽 130 题，重复一千次，每次算两者之差。多少次为正？95% 的差落在什么区间？
#
# ## 答案
#
# 🐢 "cart" 更近：四个字母里补一个，所以是 0.75。48% 就是 0.48，差 4%，算对。

# %% tags=["solution"]
print(METRICS["anls"][1]("cat", ["cart", "dog"]), METRICS["relaxed"][1]("48%", ["0.5"]))

# %% [markdown] lang="en"
# 🐕 He gets a part for nothing. A model must beat him to have learned to see.

# %% [markdown] lang="zh"
# 🐕 什么都不看也能得一部分分。模型要超过他，才算学会了看图。

# %% tags=["solution"]
from collections import Counter

right = {kind: Counter(row["reference"] for row in rows["blind"] if row["category"] == kind) for kind in first}
hits = sum(counts.most_common(1)[0][1] for counts in right.values())
print(f"the most frequent answer of each kind: {hits / len(rows['trained']):.0%} exactly right")

# %% [markdown] lang="en"
# 🦁 This is the bootstrap. Both models answered the same questions, so we draw questions, not answers: the comparison is paired.

# %% [markdown] lang="zh"
# 🦁 这就是自助法（bootstrap）。两个模型答的是同一批题，所以抽的是题目而不是答案，即配对比较。

# %% tags=["solution"]
gains = np.array([a["exact"] - b["exact"] for a, b in zip(rows["trained"], rows["blind"], strict=True)], float)
drawn = np.random.default_rng(0).choice(gains, (1000, len(gains))).mean(1)
low, high = np.percentile(drawn, [2.5, 97.5])
print(f"positive in {(drawn > 0).sum()} of 1,000; 95% of the differences lie between {low:.0%} and {high:.0%}")

# %% [markdown] lang="en"
# Next lesson: [the real size](12_real_size.ipynb): what a real training needs.

# %% [markdown] lang="zh"
# 下一课：[真实大小](12_real_size.ipynb)，真正的训练需要什么。
