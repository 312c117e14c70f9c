# %% [markdown] lang="en"
# # 5. How data becomes batches
#
# A file holds questions, answers and the names of images. The model reads whole numbers in rows of equal length. This lesson follows one record from the file to the batch, and looks at the numbers that decide what is learned: the labels.
#
# ## What you will know
#
# - what ids and labels are, and why most labels are -100;
# - why the model cannot see the answer that it learns, and what happens if it never learns to stop;
# - why padding on the right changes nothing in training, and how to find the faults in your own data.

# %% [markdown] lang="zh"
# # 5. 数据怎样变成批次
#
# 文件里放的是问题、回答和图片的名字，模型读的却是一行行等长的整数。这一课跟着一条数据，从文件一直走到批次（batch），重点看决定“学什么”的那一行数：标签（labels）。
#
# ## 你会学到
#
# - ids 和 labels 各是什么，为什么大部分标签是 -100；
# - 模型为什么看不到它正在学的答案；没学过“停下来”的模型又会怎样；
# - 训练时为什么在右边填充不会有任何影响，以及怎样找出自己数据里的错误。

# %% tags=["figure"]
from tutorial.tools.quiet import quiet

quiet()

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from demo.language_half import new_language_model
from demo.make_data import write_records
from demo.scenes import DIGITS
from train_llava.build_model import build_llava
from train_llava.data import LlavaCollator, LlavaDataset
from tutorial.figures import batches
from tutorial.tools import commands, planted_faults

FOLDER = Path("output/tutorial/05_data")
write_records(FOLDER / "conversations", "conversations", "train", 24, seed=0)
dataset = LlavaDataset(FOLDER / "conversations")
torch.manual_seed(0)  # the projector is new, so random
model, processor = build_llava("demo/clip", "demo/qwen", torch.float32)
tokenizer, encoder = processor.tokenizer, LlavaCollator(processor).encoder
short = [one for one in dataset if len(one["images"]) == 1 and len(one["messages"]) == 4]  # two questions
in_english = [one for one in short if str(one["messages"]).isascii()]
example = min(in_english, key=lambda one: abs(len(encoder.encode(one["messages"])[0]) - 96))  # eight rows of twelve
ids, labels = encoder.encode(example["messages"])
batches.record(tokenizer, example["images"][0], ids, labels)

# %% [markdown] lang="en"
# ## One record
#
# The figure shows all that the model gets from one record. Each box is a **token**, a piece of text that has a number of its own (␣ is a blank, ↵ a line break). The upper number is this number, its **id**. The lower one is its **label**: what the model should learn to say there. -100 means that nothing is learned. In the file the same record is much shorter, in LLaVA's own form:

# %% [markdown] lang="zh"
# ## 一条数据
#
# 上图就是模型从一条数据里拿到的全部内容。每个格子是一个**词元（token）**，也就是有自己编号的一小段文字（␣ 是空格，↵ 是换行）。上面的数就是这个编号，叫 **id**；下面的数是**标签**，即模型在这里要学着说的内容，-100 表示什么都不学。同一条数据在文件里要短得多，用的是 LLaVA 自己的格式：

# %%
records = json.loads((FOLDER / "conversations" / "chat.json").read_text(encoding="utf-8"))
print(json.dumps(next(each for each in records if each["id"] == example["id"]), indent=1))
learned = [label for label in labels if label != -100]
print(f"{len(ids)} tokens: {ids.count(encoder.image_ids[0])} of the image, {len(learned)} to be learned")
print(tokenizer.decode(learned))

# %% [markdown] lang="en"
# Three things happened on the way. The **chat template**, the form of conversation that the chat model has learned, wrapped each turn in `<|im_start|>` and `<|im_end|>`, and put a system message in front. `<image>` became 16 tokens, one for each patch of the image. And the labels were set: the answers, with the `<|im_end|>` behind them, and nothing else.
#
# ## Shift by one
#
# At every position the model says which token it expects **next**. So the label of a token is compared with what the model says one position earlier. transformers does this shift inside the model. That is why a green token in the first figure has its own id as its label.

# %% [markdown] lang="zh"
# 中间发生了三件事。**对话模板**（chat template，即对话模型学过的格式）给每一轮加上 `<|im_start|>` 和 `<|im_end|>`，并在最前面补上系统提示；`<image>` 变成了 16 个词元，图片的每个图块一个；最后设好标签：只有回答和它后面的 `<|im_end|>`，其他都是 -100。
#
# ## 错开一位
#
# 在每个位置上，模型预测的都是**下一个**词元。所以一个词元的标签，要和它前一个位置的输出比较。这一步错位由 transformers 在模型内部完成，因此第一张图里，绿色词元的标签就是它自己的 id。

# %% tags=["figure"]
first = next(i for i, label in enumerate(labels) if label != -100)  # where the first answer begins
batches.shift(tokenizer, ids, labels, start=first - 5)

# %%
batch = LlavaCollator(processor)([example])
with torch.no_grad():
    output = model(**batch)  # logits: batch, positions, a number for each token of the vocabulary
by_hand = torch.nn.functional.cross_entropy(output.logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100)
print(f"loss of the model {output.loss:.4f}, by hand {by_hand:.4f}")
assert torch.allclose(output.loss, by_hand, atol=1e-4)

# %% [markdown] lang="en"
# At each label we take the probability p that the model gave to this token, and -log p: near 0 if the model was sure of the right token, large if it was not. The **loss** is the mean of these numbers. `ignore_index=-100` leaves out all other positions. That is all that -100 does.
#
# ## Why it does not see the answer
#
# Question and answer stand in one row. Is that not cheating? No: attention, the step in which positions read from each other, has a **causal mask**. A position looks at itself and to its left, never to its right. The position that has to say the first word of the answer sees the image and the question, and no word of the answer. In the figure each row is a position, and the columns are those that it looks at: left what is allowed, right what the model does.

# %% [markdown] lang="zh"
# 在每个有标签的位置，取模型给正确词元的概率 p，算出 -log p：有把握就接近 0，没把握就很大。这些数的平均值就是**损失**（loss）。`ignore_index=-100` 让其余位置不参与计算，-100 的作用仅此而已。
#
# ## 为什么看不到答案
#
# 问题和回答排在同一行，这不是作弊吗？不是。各个位置通过注意力互相读取信息，而注意力带有**因果掩码（causal mask）**：每个位置只能看自己和左边，永远看不到右边。要说出回答第一个词的那个位置，看得到图片和问题，回答却一个词也看不到。图中每一行是一个位置，每一列是被看的位置：左图是允许看哪里，右图是模型实际看了哪里。

# %% tags=["figure"]
model.set_attn_implementation("eager")  # the slow way, which shows its weights
with torch.no_grad():
    attention = model(**batch, output_attentions=True).attentions[0][0].mean(0)  # first layer, mean of its heads
model.set_attn_implementation("sdpa")
batches.causal_mask(batches.kinds_of(tokenizer, ids, labels)[: first + 12], attention, first)

# %%
other = {name: value.clone() for name, value in batch.items()}
other["input_ids"][0, first:] = tokenizer.convert_tokens_to_ids("?")
with torch.no_grad():
    changed = (model(**other).logits - output.logits)[0].abs().amax(-1) > 1e-4
print(f"the answer begins at {first}; the output changed from {changed.nonzero().min().item()} on")
assert attention.triu(1).max() == 0 and not changed[:first].any() and changed[first]

# %% [markdown] lang="en"
# That is the proof: no position gives any attention to one on its right. And we replaced all tokens from the answer on by question marks: what the model says before them stays the same, its guess of the answer's first token included. (Try it: [tokens](../interactive/tokens.html).)
#
# ## Without an end it never stops
#
# `<|im_end|>` is a token like any other, and the model says it only if it has learned to. We train two new, small language models on nine questions without images, such as "Which number comes after four?". For one the end is among the labels, for the other it is not.

# %% [markdown] lang="zh"
# 这就是证明：没有一个位置的注意力落在它的右边；把从回答开始的词元全部换成问号，前面各个位置的输出不变，包括对回答第一个词元的预测。（动手试试：[词元](../interactive/tokens.html)。）
#
# ## 没有结尾就停不下来
#
# `<|im_end|>` 和别的词元一样，学过才会说。我们用九个不带图片的问题（例如 "Which number comes after four?"）训练两个全新的小语言模型：一个标签里有结尾，另一个没有。

# %%
pairs = [(f"Which number comes after {DIGITS[i]}?", f"After {DIGITS[i]} comes {DIGITS[i + 1]}.") for i in range(9)]
chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
encoded = torch.tensor([encoder.encode(chat) for chat in chats])  # all are equally long
rows, answers, END = encoded[:, 0, :-1], encoded[:, 1, :-1], encoder.end_of_turn_id


def train(small: torch.nn.Module, labels: torch.Tensor, steps: int = 80, rate: float = 2e-3) -> list[float]:
    optimizer, ends = torch.optim.AdamW(small.parameters(), lr=rate), []
    for _ in range(steps):
        output = small(input_ids=rows, labels=labels)
        ends.append(output.logits[:, -2].softmax(-1)[:, END].mean().item())  # how probable it is behind the answer
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ends


torch.manual_seed(0)
with_end, without_end = new_language_model(896, tokenizer), new_language_model(896, tokenizer)
rising, flat = train(with_end, answers), train(without_end, answers.masked_fill(answers == END, -100))

# %%
prompt = torch.tensor([encoder.encode(chats[4][:1], add_generation_prompt=True)[0]])
for name, small in (("with", with_end), ("without", without_end)):
    answer = small.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    print(f"{name:>8}: {tokenizer.decode(answer)!r}")
    assert (answer[-1] == END) == (name == "with")
batches.ends({"<|im_end|> is a label": rising, "<|im_end|> is -100": flat})

# %% [markdown] lang="en"
# Both know the answer. The second does not know that the answer is over, and writes on until `max_new_tokens` stops it. If your model repeats itself or asks itself the next question, look at the labels first: is the last green box `<|im_end|>`?
#
# ## What we see
#
# A batch is a table, so its rows must be equally long. Short ones are filled with a **padding** token. An **attention mask** of ones and zeros says which tokens are real, so that nobody looks at the padding. Here are six records, the padding in white. A row with several green parts is a conversation of several answers: all are learned in one pass. The padding stands on the right, where no real token looks anyway, and it has no labels. So the loss is the same with the mask, without it, and if the records go through one at a time and we average their losses, weighted by their numbers of labels.

# %% [markdown] lang="zh"
# 两个模型都知道答案。第二个不知道话已经说完，会一直写到 `max_new_tokens` 为止。如果你的模型不停重复，或者自问自答，先看标签：最后一个绿格子是不是 `<|im_end|>`？
#
# ## 我们看到
#
# 批次是一张表，每一行必须等长，短的行用**填充**（padding）词元补齐。**注意力掩码**（attention mask）由 1 和 0 组成，标明哪些词元是真的，这样就没有位置会去看填充。下面是六条数据，白色是填充。一行里有好几段绿色，说明这段对话有好几个回答：一次前向传播就能全部学到。填充都在右边，真正的词元本来就看不到右边，填充也没有标签。所以加不加掩码，损失都一样；把数据一条一条送进模型，再把各条的损失按标签数加权平均，结果也一样。

# %%
tokenizer.padding_side = "right"  # as in training
collator, some = LlavaCollator(processor), [dataset[i] for i in range(6)]
batch = collator(some)
with torch.no_grad():
    masked = model(**batch).loss
    unmasked = model(**{name: value for name, value in batch.items() if name != "attention_mask"}).loss
    each = [(model(**one).loss, (one["labels"] != -100).sum()) for one in (collator([record]) for record in some)]
alone = sum(loss * count for loss, count in each) / sum(count for _, count in each)
print(f"with a mask {masked:.4f}, without {unmasked:.4f}, one by one {alone:.4f}")
assert torch.allclose(masked, unmasked, atol=1e-4) and torch.allclose(masked, alone, atol=1e-4)
batches.batch(tokenizer, batch)

# %% [markdown] lang="en"
# Now your own data. Here are eight records about two photos, and five of them have a fault. Can you find them by reading?

# %% [markdown] lang="zh"
# 轮到你自己的数据了。下面是关于两张照片的八条数据，其中五条有错。只靠读，你能找出来吗？

# %%
print(planted_faults.write(FOLDER / "mine"))

# %%
commands.run(f"train_llava.check_data --data_path {FOLDER}/mine --output_dir {FOLDER}/report --workers 0")
refused = [json.loads(line)["id"] for line in (FOLDER / "report" / "refused.jsonl").read_text().splitlines()]
assert refused == ["mine_2", "mine_4", "mine_5", "mine_6", "mine_7"]

# %% [markdown] lang="en"
# All five are found, each with its reason (the last line counts records without usable text; images are counted above it): an image that is not there, one `<image>` too many, an unknown role, a file that was cut off, an answer without words. Then look with your own eyes, too: `python -m train_llava.show_batch --model_name_or_path … --data_path …` makes a page with the tokens and labels of your own data, as in the first figure.
#
# ## Common questions
#
# **Question and answer are put together. Does the model not see the answer?** ([asked here](https://github.com/yuanzhoulvpi2017/zero_nlp/issues/192)) No. Each position sees its left side only. They are put together because one pass then teaches every token of every answer.
#
# **My model does not stop. Why?** (asked [here](https://github.com/yuanzhoulvpi2017/zero_nlp/issues/211) and [here](https://github.com/haotian-liu/LLaVA/issues/682)) Either the end was not among the labels, as above, or generation waits for another token than the one that was taught. This repository takes both from the chat template, and refuses a template whose answers have no end.
#
# **Why is the question not learned?** In use somebody else writes it. Its tokens are read, and shape what comes after them; they just do not count in the loss.
#
# **Why is padding on the right here, and on the left in generation?** A generated answer continues at the right end of its row. There must be no padding in between: see the [lesson on inference](../../code05_infer.ipynb).
#
# **What if a conversation is too long?** `--model_max_length` cuts it behind an answer, never inside one:

# %% [markdown] lang="zh"
# 五处错误全部找到，每处都说明了原因（最后一行只数文本有问题的数据，图片在上面另算）：图片不存在、`<image>` 多了一个、角色名不认识、文件被截断、回答是空的。然后还要亲眼看一看：`python -m train_llava.show_batch --model_name_or_path … --data_path …` 会生成一个页面，像第一张图那样画出你自己数据的词元和标签。
#
# ## 常见问题
#
# **问题和回答拼在一起，模型不就看到答案了吗？**（[有人这样问过](https://github.com/yuanzhoulvpi2017/zero_nlp/issues/192)）看不到。每个位置只能看自己和左边。之所以这样拼，是为了一次前向就学到每个回答的每个词元。
#
# **我的模型停不下来，为什么？**（[这里](https://github.com/yuanzhoulvpi2017/zero_nlp/issues/211)和[这里](https://github.com/haotian-liu/LLaVA/issues/682)都有人问）要么标签里没有结尾，就像上面那样；要么生成时等的结束符，和训练时教的不是同一个。本仓库两者都取自对话模板；如果模板的回答没有结尾，会直接拒绝。
#
# **为什么不学问题？** 使用时问题是别人写的。问题里的词元模型照样会读，也影响后面的输出，只是不计入损失。
#
# **为什么这里在右边填充，生成时却在左边？** 生成的回答要接在一行的最右端，中间不能隔着填充，见[推理那一课](code05_infer.ipynb)。
#
# **对话太长怎么办？** `--model_max_length` 会在某个回答之后截断，绝不会截在回答中间：

# %%
kept, _ = LlavaCollator(processor, max_length=len(ids) - 5).encoder.encode(example["messages"])
print(f"{len(ids)} tokens become {len(kept)}, which end with {tokenizer.decode(kept[-4:])!r}")
assert kept == ids[: len(kept)] and kept[-1] == END

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Which share of all tokens of the 24 records is learned? And which share are image tokens?
#
# 🐕 **Middle.** Pad the six records on the left (set `tokenizer.padding_side`, then make a new `LlavaCollator`, which makes batches of records) and leave the mask out. Is the loss still the same? Why?
#
# 🦁 **Hard.** Train the demo's own chat model, `demo/qwen`, on the nine questions, again without the end. `train` above takes it; 20 steps at a rate of 3e-4 are enough. Does it write on, too?
#
# ## Solutions
#
# 🐢 Less than a third is learned. With 576 tokens for an image instead of 16, as in a real model, it would be far less: such a training spends most of its time on image tokens.
#
# 🐕 No. Now every position looks to its left, where the padding stands, and takes it for text. With the mask the loss is right again.
#
# 🦁 No: it learned to stop long ago, and a label of -100 teaches nothing, so it does not unlearn it either. With a chat model the fault stays hidden; it shows with a base model, which has read much text but learned no chats.

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 24 条数据的全部词元里，要学的占多少？图片的词元又占多少？
#
# 🐕 **中等。** 把那六条数据改成左填充（先设 `tokenizer.padding_side`，再新建一个 `LlavaCollator`，它把几条数据拼成批次），并且去掉掩码。损失还一样吗？为什么？
#
# 🦁 **困难。** 不用全新的模型，改用演示自带的对话模型 `demo/qwen` 学这九个问题，标签里同样没有结尾。可以直接用上面的 `train`，学习率 3e-4，20 步就够。它也会停不下来吗？
#
# ## 答案
#
# 🐢 要学的不到三分之一。真实的模型里，一张图片是 576 个词元而不是 16 个，这个比例会小得多：训练的大部分时间花在图片词元上。
#
# 🐕 不一样。这回填充在左边，每个位置都看得到它，还把它当成了正文。加上掩码，损失又对了。
#
# 🦁 不会。它早就学会了停下来；标签是 -100，什么都不教，也就不会让它忘掉。所以用对话模型看不出这个错误，换成只读过大量文本、没学过对话的基座模型（base model）就会暴露。

# %% tags=["solution"]
every = torch.cat([torch.tensor(encoder.encode(one["messages"])) for one in dataset], dim=1)  # ids, labels
learned, image = (every[1] != -100).float().mean(), (every[0] == encoder.image_ids[0]).float().mean()
print(f"of {every.shape[1]} tokens {learned:.0%} are learned, {image:.0%} are of images")
assert learned < 1 / 3

# %% tags=["solution"]
tokenizer.padding_side = "left"
left = LlavaCollator(processor)(some)
with torch.no_grad():
    left_masked, left_unmasked = model(**left).loss, model(**{**left, "attention_mask": None}).loss
print(f"right {masked:.4f}, left with a mask {left_masked:.4f}, left without {left_unmasked:.4f}")
assert torch.allclose(masked, left_masked, atol=1e-3) and not torch.allclose(masked, left_unmasked, atol=1e-3)

# %% tags=["solution"]
chat_model = AutoModelForCausalLM.from_pretrained("demo/qwen", dtype=torch.float32)
train(chat_model, answers.masked_fill(answers == END, -100), steps=20, rate=3e-4)
answer = chat_model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
print(tokenizer.decode(answer))
assert answer[-1] == END

# %% [markdown] lang="en"
# Next lesson: [the training loop](06_loop.ipynb) that these batches go through.

# %% [markdown] lang="zh"
# 下一课：这些批次要走的[训练循环](06_loop.ipynb)。
