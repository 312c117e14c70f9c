# %% [markdown] lang="en"
# # 11. Scores and serving
#
# "It works well" is no result. This lesson puts numbers on a model: how many answers are right, by which rule, and whether the image had any part in it. Then we serve the model: a program asks it over HTTP. The scores are those of `python -m train_llava.evaluate`; here you see how each is computed.
#
# ## What you will know
#
# - what exact match says, and what it hides;
# - how VQAv2, ChartQA, DocVQA and POPE count, with small examples;
# - why a blind model scores more than zero, and how to catch it with three losses;
# - how far to trust a score, and what can serve the model.

# %% [markdown] lang="zh"
# # 11. 评估与部署
#
# “效果不错”不算结论。这一课给模型打分：答对多少，按什么规则算对，图片到底起没起作用。然后部署模型，让程序通过 HTTP 向它提问。这里的指标就是 `python -m train_llava.evaluate` 给出的那些；这一课看它们各自是怎么算出来的。
#
# ## 你会学到
#
# - 完全匹配（exact match）说明了什么，又掩盖了什么；
# - VQAv2、ChartQA、DocVQA、POPE 各怎么计分，都配小例子；
# - 看不见图的模型为什么也能得分，怎样用三个损失揪出它；
# - 一个分数有多可靠，模型可以用什么来部署。

# %% tags=["figure"]
from tutorial.figures import bars, sheets, soft_scores
from tutorial.tools.quiet import quiet

quiet()

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from demo.make_data import write_records
from demo.show import first_of_each_kind
from train_llava.build_model import build_llava
from train_llava.data import LlavaDataset
from train_llava.model.generate import caption_rows, generate
from tutorial.tools.trained import trained_llava

FOLDER = Path("output/tutorial/11_scores")
write_records(FOLDER, "held_out", "held_out", 140, seed=0)  # ten questions of each kind
dataset = LlavaDataset(FOLDER, held_out=True)
torch.manual_seed(0)  # of the projector that is untrained
trained, processor = trained_llava()  # what bash run_zero2.sh makes
untrained, _ = build_llava("demo/clip", "demo/qwen", torch.float32)
blind = deepcopy(trained)
blind.model.multi_modal_projector.linear_2.weight.data.zero_()  # every patch of every image is now the same vector
models = {"trained": trained, "blind": blind, "untrained": untrained.eval()}

rows = {name: caption_rows(model, processor, dataset) for name, model in models.items()}
first = first_of_each_kind(rows["trained"], language="en")  # nobody chose them
sheets.sheet(first[:8], "Eight held-out images with a question each, and the trained model's answer")

# %% [markdown] lang="en"
# ## Exactly right
#
# Each record of the held-out data asks one question, of one of 14 kinds. Each of its images has at least one pair of a shape and a colour that no training has shown, such as a green square, and its digits are scans that no training has seen. The right answer in the data is called the **reference**. The strictest rule is **exact match**: the answer equals the reference, letter by letter. We ask three models. *Trained* has the demo's adapter. *Untrained* has a new, random projector. *Blind* is the trained one with a projector that gives the same vector whatever the image shows. The figure has a group of bars for each kind of question.

# %% [markdown] lang="zh"
# ## 一字不差
#
# 测试集里每条数据问一个问题，共 14 类。每张图至少有一个训练中从没出现过的组合（形状加颜色，例如绿色的方形），手写数字也来自没参加过训练的样本。数据里写好的正确回答叫**参考答案（reference）**。最严的规则是**完全匹配**：回答和参考答案一字不差。我们问三个模型：*trained* 装着演示用的适配器；*untrained* 的投影层是全新的、随机的；*blind* 是把训练好的模型弄瞎：不管图上是什么，投影层都输出同一个向量。图中每一组是一类问题。

# %% tags=["figure"]
bars.exactly_right(rows)

# %%
english = [row for row in rows["trained"] if row["reference"].isascii()]
chinese = [row for row in rows["trained"] if not row["reference"].isascii()]
no_image = [row for row in rows["blind"] if row["category"] == "text"]
for name, some in {**rows, "trained, in English": english, "in Chinese": chinese, "blind, no image": no_image}.items():
    print(f"{name:<20}{bars.percent(some):4.0f}% of {len(some)}")
assert bars.percent(rows["trained"]) > bars.percent(rows["blind"]) > 0

# %% [markdown] lang="en"
# The other two see nothing of use, and still get something right. Some questions need no image (kind *text*), and others can be guessed: "Do you see a heart?" has two answers. So a score means little without the score of a model that does not look. Exact match also hides a lot. A single wrong word counts as much as nonsense:

# %% [markdown] lang="zh"
# 另外两个模型从图里看不出东西，照样答对了一些。有的问题根本不用看图（*text* 这一类），有的能猜：“你看到爱心了吗？”只有两种答案。所以报分数时，要同时报一个“不看图”的分数，否则说明不了什么。完全匹配还会掩盖不少东西：一句话只错一个词，和满口胡话同样算错。

# %%
from difflib import SequenceMatcher

wrong = [row for row in english if not row["exact"]]
for row in sorted(wrong, key=lambda row: -len(row["reference"]))[:3]:
    share = SequenceMatcher(None, row["caption"].split(), row["reference"].split()).ratio()
    print(f"{row['caption']}\n{row['reference']}\n  -> {share:.0%} of the words agree, exact match 0\n")

# %% [markdown] lang="en"
# ## How benchmarks count
#
# A benchmark is a public set of questions with a rule for scoring. Each softens "right" in its own way:
#
# - **VQA accuracy** (VQAv2, TextVQA): ten people answered each question. An answer that four or more of them gave is fully right, fewer make it partly right.
# - **Relaxed accuracy** (ChartQA): a number may be 5% off. A percentage counts as a share: 50% is 0.5.
# - **ANLS** (DocVQA): letters count. It is 1 - d / n, where d is the number of letters to put in, take out or change, and n the length of the longer text. Below a half it is 0. Of several references the nearest counts.
#
# The cell below uses `evaluate`'s own rules, which are milder still: exact match ignores capitals and a final full stop, VQA articles as well, ANLS capitals. `choice` looks for the letter of an option.

# %% [markdown] lang="zh"
# ## 基准测试怎样计分
#
# 基准测试（benchmark）是公开的一套题目，附带计分规则。各个基准都放宽了“对”的标准，方式各不相同：
#
# - **VQA 准确率**（VQAv2、TextVQA）：每题有十个人作答，和其中至少四人一致就得满分，人数再少就只得一部分分；
# - **宽松准确率**（ChartQA）：数字允许差 5%；百分数按小数算，50% 就是 0.5；
# - **ANLS**（DocVQA）：按字母算，等于 1 - d / n，其中 d 是要增、删、改的字母数，n 是较长文本的长度；不到一半记 0。有几个参考答案时，取最接近的那个。
#
# 下面用的是 `evaluate` 自己的规则，还要宽一些：完全匹配不管大小写和句末句点，VQA 还不管冠词，ANLS 不管大小写；`choice` 找的是选项的字母。

# %% tags=["figure"]
soft_scores.soft_scores()

# %%
from train_llava.pages.scores.scoring import METRICS

people = ["red"] * 2 + ["dark red"] * 7 + ["brown"]
cases = [("exact", "Yellow.", ["yellow"]), ("vqa", "red", people), ("vqa", "The dark red", people)]
cases += [("relaxed", "104", ["100"]), ("relaxed", "106", ["100"]), ("anls", "Invoice 4711", ["invoice 4712"])]
for metric, answer, references in [*cases, ("choice", "The answer is B.", ["B"])]:
    name, score = METRICS[metric]
    print(f"{name:<17} {answer:<17} {', '.join(dict.fromkeys(references)):<21} {score(answer, references):.2f}")

# %% [markdown] lang="en"
# Yes/no questions (POPE) need more than accuracy, since a model may say yes to anything. **Precision**: of the times it says yes, how often is that right? **Recall**: of what is there, how much does it see? **F1** is one number for both, their harmonic mean. **yes_share** is how often it says yes; an answer without "no" or "not" in its first sentence counts as yes. Here are 80 questions such as "Is there a heart in the image?", about half of them with the answer no, and one more model, which always says yes.

# %% [markdown] lang="zh"
# 是非题（POPE）光看准确率不够，因为模型可能什么都说“有”。**精确率（precision）**：它说“有”的，多少是对的？**召回率（recall）**：真有的，它看到了多少？**F1** 是两者的调和平均，把两个数合成一个。**yes_share** 是它说“有”的比例；第一句里没有 no 或 not 的回答，都算“有”。下面有 80 个“图里有没有……”的问题，大约一半答案是“没有”；再加一个只会说“有”的模型。

# %% tags=["figure"]
from train_llava.pages.scores.scoring import score
from tutorial.tools.presence import presence_questions

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
# The model that always says yes misses nothing that is there, so its recall is 1 and its F1 looks fair. Its accuracy and its `yes_share` show that it does not look.
#
# ## Does it look at the image?
#
# One test needs no rule of what is right. Take the **loss** of the reference answers: with the record's own image, with another record's, and with a grey one (lesson 10). If a model looks at images, another image makes the right answer less likely, and the loss rises. `evaluate` always does this test, and prints the sentence that you see below.

# %% [markdown] lang="zh"
# 只会说“有”的模型，凡是存在的一个不漏，召回率是 1，F1 也还过得去；准确率和 `yes_share` 让它露馅。
#
# ## 它看图了吗？
#
# 有一种检验不需要规定什么算对：看参考答案的**损失**。分别配上自己的图、别的数据的图和一张灰图。如果模型真的看图，换成别人的图，正确答案的概率就变小，损失上升（第 10 课）。`evaluate` 每次都会做这个检验，并打印下面这样的一句结论。

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
# | who asks | what serves the model |
# |---|---|
# | people with a browser | `python -m train_llava.app` |
# | programs that speak OpenAI's HTTP | `transformers serve`, or vLLM on a GPU |
# | computers without Python | llama.cpp, Ollama |
#
# The web page (the app) takes an adapter as it is. The others want a whole model folder, so merge first (lesson 9); `python -m train_llava.export` writes the files that vLLM, llama.cpp and Ollama read. [Serving](../../docs/serving.md) says what was tested with each.
#
# Behind the page is a small server. We start it inside this notebook and ask it as a program would: we send JSON, with the image written as text (base64). The server sends a line for each piece of the answer as it is written.

# %% [markdown] lang="zh"
# ## 部署
#
# | 谁来问 | 用什么 |
# |---|---|
# | 用浏览器的人 | `python -m train_llava.app` |
# | 会用 OpenAI 接口的程序 | `transformers serve`，GPU 上用 vLLM |
# | 没装 Python 的电脑 | llama.cpp、Ollama |
#
# 网页可以直接用适配器；其他几种要完整的模型文件夹，所以先合并（第 9 课）。vLLM、llama.cpp、Ollama 要读的文件由 `python -m train_llava.export` 生成。各自测试到什么程度，见[部署](../../docs/serving_zh.md)。
#
# 网页背后是个小服务器，我们在 notebook 里把它启动，像程序那样提问：发一段 JSON，图片用 base64 编码成文本。模型每写出一小段，服务器就回一行。

# %%
from base64 import b64encode
from urllib.request import Request, urlopen

from train_llava.app import App
from tutorial.tools.page_server import served

image = b64encode(next((FOLDER / "images").glob("held_out_000000.*")).read_bytes()).decode()
message = {"role": "user", "content": "How many things are in the image?", "images": [image]}
with served(App(trained, processor, "demo", [], auth=None)) as address:
    question = Request(f"{address}/answer", json.dumps({"messages": [message]}).encode())
    print(urlopen(question).read().decode())

# %% [markdown] lang="en"
# ## What we see
#
# - **A score needs a floor.** Report what the blind and the untrained model get, too.
# - **A score needs a rule.** Each benchmark means something else by "right".
# - **Three losses tell more than one score.** They show whether the image counts at all.
#
# ## Common questions
#
# - **How many questions are enough?** If a share p of n answers is right, its standard error is sqrt(p (1 - p) / n). The true share lies within two standard errors 19 times in 20. The cell below shows how slowly these shrink.
# - **The loss is low, but answers are wrong. Why?** For the loss, each word is predicted behind the right beginning of the answer. When the model writes alone, an early mistake stays in front of all that follows.
# - **Which metric for my data?** Sentences: `caption`. A word or a number: `exact` or `relaxed`. [Scoring](../../docs/evaluation.md) has the table, and `--metric` or a field in the record chooses.
# - **Can I compare with a paper?** Only with the same questions, the same prompt and the same metric. lmms-eval does that, and reads our merged folders.

# %% [markdown] lang="zh"
# ## 我们看到
#
# - **分数要有下限作比较。** 把不看图的模型和没训练的模型的得分也报出来。
# - **分数要有规则。** 每个基准对“对”的定义都不一样。
# - **三个损失胜过一个分数。** 它们能看出图片究竟起没起作用。
#
# ## 常见问题
#
# - **测多少题才够？** n 题里答对的比例是 p，标准误差就是 sqrt(p (1 - p) / n)。左右各取两个标准误差，20 次里有 19 次包含真实值。题多了它也缩得很慢，见下面。
# - **损失很低，回答却错，为什么？** 算损失时，每个词前面都是正确的开头；模型自己写的时候，前面错一个词，后面就一直带着这个错。
# - **我的数据用哪个指标？** 整句用 `caption`，一个词或一个数用 `exact` 或 `relaxed`。[评估](../../docs/evaluation_zh.md)里有对照表；用 `--metric` 选，或者写在数据的字段里。
# - **能和论文里的数比吗？** 题目、提示词、指标都相同才行。lmms-eval 就是做这个的，能直接读合并后的文件夹。

# %%
p = bars.percent(rows["trained"]) / 100
for n in (140, 1400, 14000):
    print(f"{n:5} questions: {p:.0%} plus or minus {2 * (p * (1 - p) / n) ** 0.5:.1%}")

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Work out by hand, then check with `METRICS`: the ANLS of "cat" for the references "cart" and "dog"; the relaxed accuracy of "48%" for "0.5".
#
# 🐕 **Middle.** What does a program get that never looks, but knows the data? For each kind of question it gives the answer that is most frequent among the held-out references. How many are exactly right?
#
# 🦁 **Hard.** Is the trained model better than the blind one by luck? Draw 140 of the 140 questions with replacement, a thousand times, and work out the difference of the two scores each time. How often is it positive? Between which values lie the middle 95%?
#
# ## Solutions
#
# 🐢 "cart" is nearer: one letter must be put in, and the longer text has four, so 1 - 1/4 = 0.75. And 48% is 0.48, which is 4% off 0.5, so it counts as right: 1.

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 先手算，再用 `METRICS` 验证："cat" 对参考答案 "cart" 和 "dog" 的 ANLS 是多少？"48%" 对 "0.5" 的宽松准确率是多少？
#
# 🐕 **中等。** 一个从不看图、却了解数据的程序能得多少分？每类问题都用测试集参考答案里最常见的那句来答，有多少一字不差？
#
# 🦁 **困难。** 训练好的模型比弄瞎的好，会不会只是运气？从这 140 题里有放回地抽 140 题，重复一千次，每次算两个分数之差。多少次为正？中间 95% 的差在什么区间？
#
# ## 答案
#
# 🐢 "cart" 更近：要补一个字母，较长的文本有四个字母，所以是 1 - 1/4 = 0.75。48% 就是 0.48，和 0.5 差 4%，算对，得 1。

# %% tags=["solution"]
print(METRICS["anls"][1]("cat", ["cart", "dog"]), METRICS["relaxed"][1]("48%", ["0.5"]))

# %% [markdown] lang="en"
# 🐕 It gets a part of the answers right for nothing. A model below it has shown nothing yet: perhaps it is blind, perhaps it words its answers in another way. The three losses tell, above the line, too.

# %% [markdown] lang="zh"
# 🐕 什么都不看也能得一部分分。低于它，什么也说明不了：模型也许没看图，也许只是换了种说法。不管高于还是低于它，都要看那三个损失。

# %% tags=["solution"]
from collections import Counter, defaultdict

counts = defaultdict(Counter)  # of each kind, how often each reference occurs
for row in rows["trained"]:
    counts[row["category"]][row["reference"]] += 1
hits = sum(max(each.values()) for each in counts.values())
print(f"the most frequent answer of each kind: {hits / len(rows['trained']):.0%} exactly right")

# %% [markdown] lang="en"
# 🦁 This is the **bootstrap**. Both models answered the same questions, so we draw questions and compare the two answers to each: the comparison is paired. If the interval leaves out 0, luck does not explain the difference.

# %% [markdown] lang="zh"
# 🦁 这就是**自助法（bootstrap）**。两个模型答的是同一批题，所以抽的是题目，每题比较两个回答，即配对比较。区间里不含 0，差别就不能归于运气。

# %% tags=["solution"]
gains = np.array([a["exact"] - b["exact"] for a, b in zip(rows["trained"], rows["blind"], strict=True)], float)
drawn = np.random.default_rng(0).choice(gains, (1000, len(gains))).mean(1)
low, high = np.percentile(drawn, [2.5, 97.5])
print(
    f"positive in {(drawn > 0).sum()} of 1,000; the middle 95% of the differences lie between {low:.0%} and {high:.0%}"
)

# %% [markdown] lang="en"
# Next lesson: [the real size](12_real_size.ipynb): what a real training needs.

# %% [markdown] lang="zh"
# 下一课：[真实规模](12_real_size.ipynb)，真正的训练需要什么。
