# %% [markdown] lang="en"
# # 9. Asking a trained LLaVA: full weights
#
# The model is trained. Now you show it an image and ask. This lesson takes the answering apart: how an answer is written, why it is fast, which mistakes in use make a good model answer wrongly, and where the model looks. It is for a model trained with `TRAIN_TYPE=freeze_vision`, `none` or `projector`, or a merged one. For the demo's, first run `TRAIN_TYPE=freeze_vision bash run_zero2.sh`, a few minutes on two CPU cores; lesson 0's run made an adapter. For an adapter see [the other half of this lesson](code05_infer_lora.ipynb).
#
# ## What you will know
#
# - how a model that says one token at a time writes a sentence;
# - what the KV cache saves, and what it costs;
# - why prompts are padded on the left, and why they must have the form that the training used;
# - which patches of the image the model looks at for each word.
#
# **For your own** change the two lines below: `MODEL` to your run's `--output_dir`, `IMAGES` to any folder of images. A GPU is used where there is one.

# %% [markdown] lang="zh"
# # 9. 向训练好的 LLaVA 提问：完整权重
#
# 模型训练好了，接下来就是给它看图、向它提问。这一课把推理过程拆开来看：回答是怎样写出来的，为什么写得快，好模型在哪些用法下会答错，以及它在看图片的哪里。适用于用 `TRAIN_TYPE=freeze_vision`、`none`、`projector` 训练的模型，或者合并过的模型。用演示的模型，请先运行 `TRAIN_TYPE=freeze_vision bash run_zero2.sh`，两个 CPU 核上几分钟；第 0 课训练出的是适配器。如果你训练的是适配器，请看[这一课的另一半](code05_infer_lora.ipynb)。
#
# ## 你会学到
#
# - 模型一次只说一个词元，一句话是怎么来的；
# - KV 缓存省下了什么，代价是什么；
# - 为什么要在左边填充，为什么提示词的格式必须和训练时一样；
# - 写每个词时，模型在看哪些图块。
#
# **换成你自己的**：改下面两行即可。`MODEL` 填训练时的 `--output_dir`，`IMAGES` 填任意一个图片文件夹。有 GPU 时会自动使用。

# %% tags=["parameters"]
MODEL = "output/demo-freeze_vision"
IMAGES = "output/demo/data/held_out/images"  # new images, with pairs of a shape and a colour that it has never seen

# %% tags=["figure"]
from tutorial.figures import generation, sheets
from tutorial.tools.quiet import quiet

quiet()

from pathlib import Path

import torch

from train_llava.ingest.image_kinds import SUFFIXES
from train_llava.model.generate import ask, generate, stream
from train_llava.model.load import load
from train_llava.processing.images import open_image
from tutorial.tools.asking import Asker, longer, padded_right, seconds

model, processor = load(MODEL)
asker = Asker(model, processor)
files = sorted(file for file in Path(IMAGES).iterdir() if file.suffix.lower() in SUFFIXES)
images = [open_image(file) for file in files[:8]]
QUESTION = "What do you see in the image?"
example = ask(QUESTION, images[:1])
generation.next_tokens(asker, [ask(QUESTION, [image]) for image in images])

# %% [markdown] lang="en"
# ## One token at a time
#
# From left to right you see the first seven steps of one answer; of eight images, the figure takes the one at which the model is least sure. At each step the model gives every token of the vocabulary a probability; the figure shows the four largest. (… is one that the figure's font lacks, such as Chinese.) The most probable token is taken (orange) and put behind the prompt, and the model is asked again. To take always the most probable token is called **greedy** decoding. Here it is by hand, for the first image. It stops at a token that ends answers, such as `<|im_end|>`.

# %% [markdown] lang="zh"
# ## 一次一个词元
#
# 从左到右是同一个回答的前七步；图中选的是八张图片里模型最拿不准的那一张。每一步，模型都给词表里的每个词元一个概率，图中画出最高的四个（“…”是图中字体画不出的词元，如中文）。取概率最大的词元（橙色），接到提示词后面，再问一遍模型。每次都取概率最大的词元，就叫**贪心解码（greedy）**。下面对第一张图手写一遍；遇到表示回答结束的词元（例如 `<|im_end|>`）就停。


# %%
@torch.no_grad()
def write(batch, choose=torch.argmax, most=40):
    answer = []
    while len(answer) < most and not set(answer[-1:]) & set(asker.ends):
        scores = model(**batch).logits[:, -1]  # of the last position: what comes next
        new = choose(scores).view(1, 1)
        answer.append(new.item())
        batch = longer(batch, new)
    return answer


batch = asker.batch(example)  # ids, mask and pixels; you saw them in lesson 5
by_hand, by_generate = asker.text(write(batch)), generate(model, processor, [example], max_new_tokens=40)[0]
print(f"by hand:  {by_hand}\ngenerate: {by_generate}")
assert by_hand == by_generate or model.dtype != torch.float32  # 16 bits may round an undecided word

# %% [markdown] lang="en"
# ## The KV cache
#
# Our loop is wasteful. At each step it computes the whole prompt again, image included. But attention looks only to the left (lesson 5): what the model has computed for a position never changes. So each layer keeps two vectors of each position, the **key** and the **value**. The key says what the position offers, and the value is what others take from it. Both are cut into pieces that are used apart, the **heads**. This is the **KV cache**. From the second step on, only the new token is computed.

# %% [markdown] lang="zh"
# ## KV 缓存
#
# 上面的循环很浪费：每一步都把整个提示词（包括图片）重读一遍。可注意力只往左看（第 5 课），一个位置上算好的东西以后不会再变。所以每一层都把每个位置的两个向量存下来：**键**（key）表示这个位置有什么，**值**（value）是别的位置从它那里取走的内容。向量切成几段分开用，每段叫一个**头**。这就是 **KV 缓存**。从第二步起，只需要算新词元这一个位置。

# %% tags=["figure"]
generation.cache_costs(asker, batch)

# %%
fast, slow = (seconds(asker.answers, batch, min_new_tokens=40, use_cache=cached) for cached in (True, False))
print("with the cache, 40 tokens take less time:", fast < slow)

# %% [markdown] lang="en"
# The first token costs the same: the prompt has to be read once. After it the blue line falls to almost nothing. The price is memory that grows with every token; many long conversations at once can fill a GPU (exercise 🦁).
#
# ## Padding: left or right?
#
# A batch is a table, so short prompts are filled with padding tokens. Here are three questions about one image, padded on either side. The next token is always predicted at the last column, and written behind it.

# %% [markdown] lang="zh"
# 第一个词元两边一样贵：提示词总要读一遍。之后蓝线几乎落到底。代价是缓存随着词元一直变大，许多长对话同时进行，能把一块 GPU 的显存占满（见练习 🦁）。
#
# ## 填充在左还是在右？
#
# 批次是一张表，短的提示词要用填充词元补齐。下面是关于同一张图的三个问题，分别在左边和右边填充。新词元总是在最后一列上预测，写在它的后面。

# %% tags=["figure"]
QUESTIONS = ["Where is the star?", "Write a brief description of the image."]
QUESTIONS.append("Read the digits from left to right, the top row first.")
left = asker.batch(*[ask(question, images[:1]) for question in QUESTIONS])
right = padded_right(left)
generation.padding(asker, left, right)

# %%
alone = [asker.answers(asker.batch(ask(question, images[:1])))[0] for question in QUESTIONS]
for question, *answers in zip(QUESTIONS, alone, asker.answers(left), asker.answers(right), strict=True):
    print("{}\n  alone         {}\n  padded left   {}\n  padded right  {}".format(question, *answers))
assert asker.answers(left) == alone or model.dtype != torch.float32

# %% [markdown] lang="en"
# On the left, a batch answers exactly as one question at a time. On the right, the last column of a short prompt is padding: the model is asked what follows a padding token, which no training has shown it. Only the longest prompt, which has no padding, is safe. In training it does not matter: nothing is written there, and padding has no labels (lesson 5).
#
# ## The prompt must have the form of the training
#
# A chat model has learned one form of prompt, its chat template. The model's folder holds it, and this repository uses it for training and asking alike. What if a program writes prompts of another form?

# %% [markdown] lang="zh"
# 填在左边，一批一起问和一个个单独问，答案完全一样。填在右边，短提示词的最后一列就是填充：等于问模型填充后面该写什么，这种情形训练时从没出现过；只有最长的那个没有填充，不受影响。训练时则无所谓：那时并不生成，填充也没有标签（第 5 课）。
#
# ## 提示词的格式必须和训练时一样
#
# 对话模型只学过一种提示词格式，也就是它的对话模板（chat template）。模板存在模型文件夹里，本仓库训练和提问用的是同一份。如果某个程序用别的格式拼提示词呢？

# %%
as_trained = asker.collator.encoder.render(example["messages"], add_generation_prompt=True)
print(as_trained)
others = {"no template": f"<image>\n{QUESTION}", "another model's": f"USER: <image>\n{QUESTION} ASSISTANT:"}
for name, text in {"as in training": as_trained, **others}.items():
    written = processor(text=text, images=images[0], return_tensors="pt").to(model.device, model.dtype)
    print(f"{name:<16} -> {asker.answers(written)[0]!r}")

# %% [markdown] lang="en"
# The weights are the same each time, and yet the answers are not. If a model that was good after training is worse in another program, look at the prompt first.
#
# ## A conversation
#
# The model remembers nothing between two questions. So each time it gets the whole history: a list of messages, and an image for each `<image>` in them, in order. A question may change the language.

# %% [markdown] lang="zh"
# 三次用的权重完全相同，回答却不一样。训练完效果很好的模型，换个程序就变差，先查提示词。
#
# ## 多轮对话
#
# 两次提问之间，模型什么都不记得。所以每次都要把全部历史交给它：一串消息，再加上其中每个 `<image>` 对应的图片，按顺序排好。中途可以换语言。

# %%
from demo import chinese

in_chinese = [chinese.sentence(words) for words in (chinese.INSTRUCTIONS[1], chinese.DETAILED[0])]
messages = []
for question in ["<image>\nHow many things are in the image?", "What is at the top left?", *in_chinese]:
    messages.append({"role": "user", "content": question})
    answer = generate(model, processor, [{"messages": messages, "images": images[:1]}])[0]
    messages.append({"role": "assistant", "content": answer})
    print(question.removeprefix("<image>\n"), " ->  ", answer)

# %% [markdown] lang="en"
# ## Where it looks
#
# Before each token, attention decides how much the model takes from each position to the left. So for each word we can ask: how much from which patch? In the first figure below, the four words of the answer that look at the image most have a row each; a column is a layer. The more attention a patch gets, the more orange it is; the number is the share of all attention that goes to the image. One answer proves little, so the second figure counts. In 40 new scenes of the demo we know where each thing is. We let the model read along the right captions: when size, colour and kind of a thing come next, does the patch with this thing get the most attention of all patches?

# %% [markdown] lang="zh"
# ## 它在看哪里
#
# 写每个词元之前，注意力决定从左边各个位置各取多少信息。所以可以问：写这个词时，从哪个图块取了多少？下面第一张图选了回答里看图最多的四个词，每词一行，每一列是一层。图块越橙，得到的注意力越多；数字是图片分到的注意力占全部注意力的比例。一个回答说明不了什么，所以第二张图是统计。取 40 个新场景，每样东西在哪儿都是已知的。让模型顺着正确的描述读，在接下来该说某样东西的大小、颜色、种类时，看所有图块里得到注意力最多的，是不是放着这样东西的那一块。

# %% tags=["figure"]
generation.attention_maps(asker, batch, write(batch))

# %% tags=["figure"]
generation.attention_on_things(asker, QUESTION)

# %% [markdown] lang="en"
# ## What we see
#
# - **An answer is a loop.** Read, take the most probable token, put it behind, repeat. The cache only makes it faster.
# - **The model looks at the image again and again while it writes.** The image's vectors stay in the row, and different words take from different patches.
# - **The layers share the work.** Layer 0 spreads its attention over many patches; in the last, the demo's model nearly always looks at the thing that it names. Still, attention says where a model looks, and not what it takes from there. Lesson 10 has a stronger test.
#
# ## Common questions
#
# - **Can I ask about many images?** Yes: each with its own question, in one batch, as in the sheet below. Or several in one question: `<image>` says where each stands. How well that works depends on the training data.
# - **Why is the answer cut off?** It reached `max_new_tokens`, the most tokens that an answer may have.
# - **Can I see an answer while it is written?** Yes, with `stream`.
# - **Do I need this repository to ask?** No. The folder has the ordinary form of transformers, so its `pipeline` reads it.

# %% [markdown] lang="zh"
# ## 我们看到
#
# - **回答就是一个循环。** 读一遍，取概率最大的词元，接到后面，再来。缓存只是让它更快。
# - **它边写边看图。** 图片的向量一直留在序列里，不同的词从不同的图块取信息。
# - **各层有分工。** 第 0 层的注意力摊得很开；到最后一层，演示模型几乎总是盯着它正在说的东西。不过注意力只说明模型在看哪里，不说明它从那里取了什么。更有力的检验在第 10 课。
#
# ## 常见问题
#
# - **能问很多张图吗？** 能。可以每张图各问各的，放在一个批次里，就像下面的拼图；也可以一个问题带几张图，`<image>` 写在哪里，图片就插在哪里。后一种效果好不好，取决于训练数据。
# - **回答为什么只有半句？** 达到了 `max_new_tokens`，即一个回答最多的词元数。
# - **能边写边看吗？** 能，用 `stream`。
# - **提问一定要用本仓库吗？** 不用。这就是一个普通的 transformers 模型文件夹，`pipeline` 可以直接读。

# %%
from transformers import pipeline

two = ask("<image>\n<image>\nWhat does the second image show?", [images[0], images[-1]])
print("two images:", generate(model, processor, [two])[0])
print("cut off:   ", generate(model, processor, [example], max_new_tokens=5)[0])
print("streamed:  ", *stream(model, processor, example), sep="|")
# folders of transformers 4, such as the original tutorial's, have no processor_config.json; these get the one from above
whole = (Path(MODEL) / "processor_config.json").is_file()
pipe = pipeline("image-text-to-text", model=MODEL, processor=None if whole else processor)
content = [{"type": "image", "image": images[0]}, {"type": "text", "text": QUESTION}]
told = pipe(text=[{"role": "user", "content": content}], return_full_text=False, max_new_tokens=40)
print("pipeline:  ", told[0]["generated_text"])
prompt = "What is at the bottom right?"
answers = generate(model, processor, [ask(prompt, [image]) for image in images])
rows = [{"image": i, "prompt": prompt, "caption": answer} for i, answer in zip(images, answers, strict=True)]
sheets.sheet(rows, "Up to eight images, and what the model says is at the bottom right of each")

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Ask something that the training never asked, such as "Who painted this?". What does a model do that has not learned to say "I do not know"?
#
# 🐕 **Middle.** Write sampling by hand: divide the scores by a number, the **temperature**, make probabilities of them (softmax), and draw the token by these. `write` above takes your function as `choose`. Ask ten times at each of the temperatures 0.5, 1 and 2. How many different answers do you get?
#
# 🦁 **Hard.** How many bytes does the KV cache take for one position? Compute it from the config, and compare with a real cache. Then do it for Qwen1.5-4B in 16 bits (its config lies in `benchmarks/full_size/configs/qwen`), with one image of 576 tokens and 1,000 tokens of text.
#
# ## Solutions
#
# 🐢 It answers all the same, in the form of an answer that it knows, and sounds as sure as ever.

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 问一个训练里从没问过的问题，例如 "Who painted this?"。没学过说“不知道”的模型会怎么办？
#
# 🐕 **中等。** 手写采样：分数除以一个数，即**温度**（temperature），用 softmax 变成概率，再按概率抽词元。写成函数，作为 `choose` 传给上面的 `write`。温度取 0.5、1、2，各问十次，分别得到多少种不同的回答？
#
# 🦁 **困难。** KV 缓存里一个位置占多少字节？从配置算出来，和真实的缓存对一下。再算一算 Qwen1.5-4B（配置在 `benchmarks/full_size/configs/qwen`）用 16 位精度、一张图片（576 个词元）加 1000 个文字词元要占多少。
#
# ## 答案
#
# 🐢 它照样回答，套用某种学过的句式，口气和平时一样肯定。

# %% tags=["solution"]
for question in ("Who painted this?", "How old is the red thing?"):
    print(question, "->", generate(model, processor, [ask(question, images[:1])])[0])

# %% [markdown] lang="en"
# 🐕 A low temperature makes the most probable token even more probable, a high one makes the probabilities more equal. At 2 nearly all answers differ from each other.

# %% [markdown] lang="zh"
# 🐕 温度低，概率最大的词元概率更大；温度高，各词元的概率更接近。温度为 2 时，几乎每个回答都不相同。

# %% tags=["solution"]
torch.manual_seed(0)
for temperature in (0.5, 1.0, 2.0):
    answers = {tuple(write(batch, lambda s, t=temperature: (s / t).softmax(-1).multinomial(1))) for _ in range(10)}
    print(f"temperature {temperature}: {len(answers)} different answers of 10")

# %% [markdown] lang="en"
# 🦁 Two vectors, key and value, in each layer: layers × 2 × key-value heads (`num_key_value_heads`) × size of a head (`hidden_size` / `num_attention_heads`) × bytes of a number.

# %% [markdown] lang="zh"
# 🦁 每层两个向量，键和值：层数 × 2 × 键值头数（`num_key_value_heads`）× 每个头的维度（`hidden_size` / `num_attention_heads`）× 每个数的字节数。

# %% tags=["solution"]
from transformers import AutoConfig

qwen, sizes = AutoConfig.from_pretrained("benchmarks/full_size/configs/qwen"), []
for text, number in ((model.config.text_config, model.dtype.itemsize), (qwen, 2)):
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes.append(2 * text.num_hidden_layers * text.num_key_value_heads * head * number)
with torch.no_grad():
    layers = model(**batch, use_cache=True).past_key_values.layers
assert sum(2 * each.keys.nbytes for each in layers) == sizes[0] * batch["input_ids"].shape[1]
print(f"{sizes[0]:,} bytes for a position; Qwen1.5-4B {sizes[1]:,}, for 1,576 {1576 * sizes[1] / 2**30:.2f} GiB")

# %% [markdown] lang="en"
# Next lesson: the same [for an adapter](code05_infer_lora.ipynb).

# %% [markdown] lang="zh"
# 下一课：[适配器的推理](code05_infer_lora.ipynb)。
