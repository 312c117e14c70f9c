# %% [markdown] lang="en"
# # 3. A LLaVA in 60 lines
#
# You know how an image becomes vectors and where they go. Now write the whole model yourself. LLaVA did not invent the layers of CLIP and of Qwen, so we take them from transformers. All that makes a LLaVA of them is here: a class of about 40 lines, and about 20 lines that give it trained weights. Then we compare it with transformers' `LlavaForConditionalGeneration`, weight by weight and number by number.
#
# ## What you will know
#
# - what happens between an image and the next word, line by line;
# - where the same lines are in transformers' source;
# - which mistakes strict loading catches, and which ones raise no error at all.

# %% [markdown] lang="zh"
# # 3. 60 行写一个 LLaVA
#
# 图片怎样变成向量、放到哪里，你已经知道了。现在自己把整个模型写出来。CLIP 和 Qwen 的各层不是 LLaVA 发明的，我们直接取自 transformers；拼成 LLaVA 的代码都写在这里：一个大约 40 行的类，外加大约 20 行装入训练好的权重。写完之后和 transformers 的 `LlavaForConditionalGeneration` 对照，逐个权重、逐个数字地比。
#
# ## 你会学到
#
# - 从图片到下一个词，每一行代码做了什么；
# - transformers 源码里，对应的代码在哪里；
# - 严格加载（strict）能抓住哪些错，又有哪些错谁都不会提醒你。

# %% tags=["figure"]
import inspect
from textwrap import dedent

import numpy as np

from demo.scenes import Item, draw
from tutorial.figures import tiny_llava
from tutorial.tools.trained import trained_llava

llava, processor = trained_llava()

scene = (Item(10, "red", 1, large=True), Item(13, "yellow", 2, large=True, cell=1))
image = draw(scene, np.random.default_rng(0), "train")
chat = [{"role": "user", "content": "<image>\nWhat can you see at the bottom left?"}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
batch = processor(images=image, text=text, return_tensors="pt")

vision, language = llava.config.vision_config, llava.config.text_config
patches, length = llava.config.image_seq_length, batch.input_ids.shape[1]
depth = vision.num_hidden_layers
stations = [  # what is done, in which code, and what shape comes out
    ("the image", "pixels", tuple(batch.pixel_values.shape)),
    ("patches, CLS, positions", "embeddings, norm", (1, patches + 1, vision.hidden_size)),
    (f"{depth - 1} of {depth} layers", "layers", (1, patches + 1, vision.hidden_size)),
    ("CLS dropped", "x[:, 1:]", (1, patches, vision.hidden_size)),
    ("translated", "linear_1, gelu, linear_2", (1, patches, language.hidden_size)),
    ("put among the words", "row[here] = ...", (1, length, language.hidden_size)),
    ("read", "language", (1, length, language.hidden_size)),
    ("scored", "head", (1, length, language.vocab_size)),
]
tiny_llava.steps(image, stations)

# %% [markdown] lang="en"
# Blue is the shape of what comes out of each step: batch, positions, numbers in a vector. The pixels have other sides: batch, colours, rows, columns. The prompt has 16 positions for the image; the rest is text.
#
# ## The class
#
# `see` is the vision tower, `translate` the projector, `forward` the whole model. GELU, between the two matrices of the projector, changes each number by itself; without it two matrices would be no more than one. `answer` writes token by token, and always takes the likeliest. Like LLaVA, `see` stops before the tower's last layer, and drops CLS (lesson 1 says why).

# %% [markdown] lang="zh"
# 蓝色的是每一步输出的形状：批次、位置、每个向量有几个数（像素是批次、颜色、行、列）。提示里有 16 个位置留给图片，其余是文字。
#
# ## 这个类
#
# `see` 是视觉塔，`translate` 是投影层，`forward` 是整个模型。投影层的两个矩阵之间是 GELU，它逐个改变每个数；没有它，两个矩阵就等于一个。`answer` 逐个写出词元，每次都取概率最大的。和 LLaVA 一样，`see` 跳过视觉塔的最后一层，也不要 CLS（原因见第 1 课）。


# %%
import torch
from torch import nn


class TinyLlava(nn.Module):
    """What LlavaForConditionalGeneration does, written out."""

    def __init__(self, tower, language, image_token: int):
        super().__init__()
        seen, known = tower.config.hidden_size, language.config.hidden_size
        self.embeddings, self.norm = tower.embeddings, tower.pre_layrnorm  # (CLIP's typo)
        self.layers = tower.encoder.layers[:-1]  # the last layer is not read
        self.linear_1 = nn.Linear(seen, known)
        self.linear_2 = nn.Linear(known, known)
        self.language = language
        self.head = nn.Linear(known, language.config.vocab_size, bias=False)
        self.image_token = image_token

    def see(self, pixels):
        x = self.norm(self.embeddings(pixels))
        for layer in self.layers:
            x = layer(x, attention_mask=None)  # every patch looks at every other
        return x[:, 1:]  # CLS comes first

    def translate(self, x):
        return self.linear_2(nn.functional.gelu(self.linear_1(x)))

    def forward(self, ids, pixels):
        row = self.language.embed_tokens(ids)
        here = ids == self.image_token
        row[here] = self.translate(self.see(pixels)).flatten(0, 1)  # patch after patch
        return self.head(self.language(inputs_embeds=row).last_hidden_state)

    @torch.no_grad()
    def answer(self, ids, pixels, end: int, most: int = 20):
        for _ in range(most):
            best = self(ids, pixels)[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], dim=1)
            if best.item() == end:
                break
        return ids


# %% [markdown] lang="en"
# ## Its weights
#
# The weights come from the trained demo model. Their names differ from ours, so we rename them. `load_state_dict` is **strict**: each tensor must have its place in the model, and each place its tensor.

# %% [markdown] lang="zh"
# ## 它的权重
#
# 权重来自训练好的演示模型，名字和我们的不同，改一下名。`load_state_dict` 默认是**严格**的：每个张量在模型里都要有位置放，每个位置都要有张量填。

# %%
NAMES = {
    "model.vision_tower.embeddings": "embeddings",
    "model.vision_tower.pre_layrnorm": "norm",
    "model.vision_tower.encoder.layers": "layers",
    "model.multi_modal_projector.": "",
    "model.language_model": "language",
    "lm_head": "head",
}


def renamed(name: str) -> str:
    found = next((old for old in NAMES if name.startswith(old)), "")
    return NAMES.get(found, "") + name.removeprefix(found)


from transformers import AutoModel

weights = {renamed(name): weight for name, weight in llava.state_dict().items()}
parts = AutoModel.from_config(llava.config.vision_config), AutoModel.from_config(llava.config.text_config)
tiny = TinyLlava(*parts, image_token=llava.config.image_token_id).eval()
try:
    tiny.load_state_dict(weights)
except RuntimeError as error:
    print(str(error)[:180], "...")

# %% [markdown] lang="en"
# It is refused, and the message tells us something about LLaVA. The trained model holds weights that we have no place for: the tower's last layer, and the norm after it. LLaVA never reads what they compute. We leave them out, and say so in code:

# %% [markdown] lang="zh"
# 加载被拒绝了，报错顺便告诉了我们 LLaVA 的一个特点：训练好的模型里有些权重我们没地方放，就是视觉塔的最后一层，还有它后面的归一化。它们算出来的东西，LLaVA 从不读。我们把它们去掉，并且在代码里写明白：

# %%
unread = (f"layers.{depth - 1}.", "model.vision_tower.post_layernorm")
needed = {name: weight for name, weight in weights.items() if not name.startswith(unread)}
print(tiny.load_state_dict(needed))

forgetful = dict(needed)
del forgetful["linear_2.bias"]
try:
    tiny.load_state_dict(forgetful)
except RuntimeError as error:
    print(dedent(str(error)))

# %% [markdown] lang="en"
# The first of these fits. The second leaves out one tensor of many, and is refused. With `strict=False` the random numbers of the new model would stay there, without an error.
#
# ## What we see
#
# Both models get the same prompt. Left: the likeliest next tokens. Right: how far apart the **logits**, the scores of all tokens, are at each position.

# %% [markdown] lang="zh"
# 第一次正好装满。第二次故意少给了一个张量，于是被拒绝。要是写了 `strict=False`，那里就会留着新模型的随机数，而且一声不吭。
#
# ## 我们看到
#
# 两个模型，同一条提示。左图是最可能的下一个词元；右图是每个位置上，两边的 **logits**（所有词元的得分）相差多少：

# %%
tiny.requires_grad_(False)
ours = tiny(batch.input_ids, batch.pixel_values)
theirs = llava(**batch).logits
chances, best = theirs[0, -1].softmax(-1).topk(5)

words = [processor.decode([each]) for each in best.tolist()]
apart = (ours - theirs).abs().amax(-1)[0]
tiny_llava.agreement(words, ours[0, -1].softmax(-1)[best], chances, apart)

# %%
assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
print(f"{theirs.numel():,} logits up to {theirs.abs().max():.1f}; largest difference {apart.max():.1e}")

end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
written = tiny.answer(batch.input_ids, batch.pixel_values, end)
assert torch.equal(written, llava.generate(**batch, max_new_tokens=20))
print(processor.decode(written[0, length:]))

# %% [markdown] lang="en"
# The logits agree at every position, and the answers are the same.
#
# ## The same in transformers
#
# Where we have a line, transformers has a function. Here are the lines that matter:

# %% [markdown] lang="zh"
# 每个位置的 logits 都对得上，回答也一样。
#
# ## 在 transformers 里
#
# 我们的一行，在 transformers 里是一个函数。挑关键的几行看：

# %%
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector


def excerpt(function, first: str, last: str) -> None:
    """The lines of a function from the one that has `first` in it to the next that has `last`."""
    lines = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i >= start and last in line)
    print(f"# {function.__qualname__}", dedent("\n".join(lines[start : stop + 1])), "", sep="\n")


excerpt(LlavaModel.get_image_features, "if isinstance(vision_feature_layer, int)", "[:, 1:]")
excerpt(LlavaMultiModalProjector.forward, "linear_1", "linear_2")
excerpt(LlavaModel.get_placeholder_mask, "input_ids == self.config", "input_ids == self.config")
excerpt(LlavaModel.forward, "masked_scatter", "masked_scatter")

# %% [markdown] lang="en"
# | ours | theirs | why theirs has more |
# |---|---|---|
# | `layers[:-1]` | `hidden_states[-2]` | the layer is a setting; all layers are computed |
# | `x[:, 1:]` | only for `"default"` | a tower without CLS (SigLIP) takes `"full"` |
# | `linear_1`, `gelu`, `linear_2` | the same | another activation may be set |
# | `row[here] = ...` | `masked_scatter` | writes a new tensor, and keeps the old one |
# | nothing | a check of the counts | as many `<image>` as vectors (lesson 2) |
#
# Nearly everything else in `modeling_llava.py` passes arguments on. The author of the original tutorial goes through the file in a [video](https://www.bilibili.com/video/BV1nw4m1S7nZ/) (Chinese).
#
# ## What no error tells you
#
# Strict loading compares names and shapes. It cannot see that a line of code is wrong. We make seven mistakes, one at a time. Each of these models runs without an error:

# %% [markdown] lang="zh"
# | 我们 | transformers | 多出来的是为了什么 |
# |---|---|---|
# | `layers[:-1]` | `hidden_states[-2]` | 读哪一层是一项配置；每一层都会算 |
# | `x[:, 1:]` | 只在 `"default"` 时 | 没有 CLS 的视觉塔（如 SigLIP）用 `"full"` |
# | `linear_1`、`gelu`、`linear_2` | 一样 | 激活函数可以换 |
# | `row[here] = ...` | `masked_scatter` | 写到新的张量里，原来的不动 |
# | 没有 | 检查数量 | `<image>` 和向量必须一样多（第 2 课） |
#
# `modeling_llava.py` 里其余的代码，几乎都只是在传参数。原教程的作者有一个[视频](https://www.bilibili.com/video/BV1nw4m1S7nZ/)，带着大家读这个文件。
#
# ## 没有人提醒你的错
#
# 严格加载只比名字和形状，看不出代码哪一行写错了。下面故意犯七个错，每次一个。这些模型照样能跑，什么错也不报：

# %%
from copy import copy


def mistaken(**methods):
    """A TinyLlava that shares its weights with the right one, with other methods."""
    other = copy(tiny)
    other.__dict__.update(methods)
    return other


tower = llava.model.vision_tower
torch.manual_seed(0)
untrained = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128)).requires_grad_(False)
mistakes = {
    "right": tiny,
    "GELU's fast form": mistaken(
        translate=lambda x: tiny.linear_2(nn.functional.gelu(tiny.linear_1(x), approximate="tanh"))
    ),
    "ReLU for GELU": mistaken(translate=lambda x: tiny.linear_2(tiny.linear_1(x).relu())),
    "the tower's last layer": mistaken(see=lambda pixels: tower(pixels).last_hidden_state[:, 1:]),
    "CLS kept, last patch lost": mistaken(
        see=lambda pixels: tower(pixels, output_hidden_states=True).hidden_states[-2][:, :-1]
    ),
    "colours not normalised": mistaken(see=lambda pixels: tiny.see(pixels * 0.27 + 0.45)),
    "patches in reverse order": mistaken(see=lambda pixels: tiny.see(pixels).flip(1)),
    "a random projector": mistaken(translate=untrained),
}
change, said = {}, []
for name, model in mistakes.items():
    change[name] = (model(batch.input_ids, batch.pixel_values) - theirs)[0, -1].abs().max().item()
    said.append(processor.decode(model.answer(batch.input_ids, batch.pixel_values, end)[0, length:-1]))
assert change.pop("right") <= 1e-5 < min(change.values()) and len(set(said)) > 1
tiny_llava.mistakes({"right": 0, **change}, said)

# %% [markdown] lang="en"
# The bars show how far each mistake moves the logits; beside them stands the answer. Some mistakes leave the answer as it is, others change it, and none raises an error. So an answer that looks right proves little: compare numbers with a model that you trust. `build_model` of this repository does so: before it saves, it compares the logits of two texts with those of the chat model.

# %% [markdown] lang="zh"
# 条形表示每个错让 logits 变了多少，旁边是它的回答。有的错不影响回答，有的会改变它，但没有一个会报错。所以回答看上去对，说明不了什么，一定要拿数字和可信的模型对一对。本仓库的 `build_model` 就是这样做的：保存之前，先用两段文字把 logits 和原来的对话模型对一遍。

# %% [markdown] lang="en"
# ## Common questions
#
# **Why the last layer but one?** LLaVA's authors suppose that CLIP's last layer serves its own task, to match a whole image with a whole caption, and that the layer before it keeps more details. Lesson 1 measures it: in the demo's tower the two are nearly equal. (In the figure the last layer moves the logits most, because this projector was trained on layer −2.) For another tower, try it.
#
# **Why is CLS dropped?** It belongs to no patch: it is one vector for the whole image. The patches tell what is there place by place.
#
# **Has the image an attention mask of its own?** No. In the tower every patch looks at every other. In the language model the 16 positions are read like words: each looks at what stands before it. Lesson 5 draws that.
#
# **How does the model know where the image ends?** Nobody tells it. It has learned what image vectors look like.
#
# **Why `1e-5` and not zero?** Computers round. The same sum in another order can give another last digit. Numbers in bfloat16 have fewer digits, so there the differences are larger.
#
# **Do I need TinyLlava later?** No. The model of transformers has a cache, takes batches, and can be saved. From here on we use that one.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **为什么读倒数第二层？** LLaVA 的作者推测：CLIP 的最后一层是为它自己的任务服务的，要让整张图和整句描述对上；前一层则保留了更多细节。第 1 课在演示模型的视觉塔上量过：两层几乎一样。（上图里最后一层让 logits 变得最多，因为这个投影层是按第 −2 层训练的。）换了视觉塔可能不同，可以自己试。
#
# **CLS 为什么丢掉？** 它不属于任何图块，整张图只有这一个。图块向量则逐处说明那里有什么。
#
# **图片有自己的注意力掩码吗？** 没有。在视觉塔里，每个图块都看得到其他所有图块；在语言模型里，这 16 个位置和文字一样，各自只看自己和前面的内容。第 5 课会把它画出来。
#
# **模型怎么知道图片到哪里结束？** 没有人告诉它。它学会了图像向量长什么样。
#
# **为什么是 `1e-5`，而不是 0？** 计算机会舍入。同样几个数，换个顺序加，最后一位就可能不同。bfloat16 的有效位更少，差别也更大。
#
# **后面还用 TinyLlava 吗？** 不用了。transformers 的模型有缓存，支持批次和保存，后面都用它。

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Count the parameters of `tiny` and of `llava`. Where does the difference come from?
#
# 🐕 **Middle.** Ask about two images in one question. Must TinyLlava change? Compare with transformers again.
#
# 🦁 **Hard.** `self.language` is still a black box. Write its loop over the layers by hand, and get the same logits. (Each layer wants `position_embeddings`, which `language.rotary_emb(row, places)` gives; `places` are the numbers of the positions. `language.norm`, which brings each vector to one size, comes last. No mask is needed.)

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 数一数 `tiny` 和 `llava` 的参数量。差在哪里？
#
# 🐕 **中等。** 一个问题里放两张图片。TinyLlava 要改吗？再和 transformers 比一次。
#
# 🦁 **困难。** `self.language` 还是个黑盒。把它逐层的循环自己写出来，得到同样的 logits。（每一层都要 `position_embeddings`，由 `language.rotary_emb(row, places)` 给出，`places` 是各个位置的序号；最后还有一个归一化 `language.norm`。不需要掩码。）

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 From the tower's last layer and the norm after it, which LLaVA does not read.

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 差的是视觉塔的最后一层和它后面的归一化，LLaVA 不读它们。


# %% tags=["solution"]
def count(module) -> int:
    return sum(weight.numel() for weight in module.parameters())


difference = count(llava) - count(tiny)
print(f"{count(llava):,} - {count(tiny):,} = {difference:,}")
assert difference == count(tower.encoder.layers[-1]) + count(tower.post_layernorm)

# %% [markdown] lang="en"
# 🐕 No: `flatten(0, 1)` lays the patches of all images one after another, in the order of the `<image>`.

# %% [markdown] lang="zh"
# 🐕 不用改：`flatten(0, 1)` 把所有图片的图块依次排成一列，顺序和 `<image>` 一致。

# %% tags=["solution"]
other = draw((Item(12, "green", 1, large=True),), np.random.default_rng(1), "train")
chat = [{"role": "user", "content": "<image>\n<image>\nDescribe the second image."}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
two = processor(images=[image, other], text=text, return_tensors="pt")
print(tuple(two.pixel_values.shape), tuple(two.input_ids.shape))
assert torch.allclose(tiny(two.input_ids, two.pixel_values), llava(**two).logits, rtol=0, atol=1e-4)

# %% [markdown] lang="en"
# 🦁 Each layer takes the row, and the angles by which attention turns its vectors: from them it knows the positions (rotary embeddings). Without a mask, the attention of these layers is causal by itself: each position looks only at itself and what stands before it.

# %% [markdown] lang="zh"
# 🦁 每一层的输入是整个序列，以及注意力用来旋转向量的角度：位置信息就是这样给进去的（旋转位置编码）。不传掩码时，这些层的注意力本身就是因果的：每个位置只看自己和前面的内容。


# %% tags=["solution"]
def read(language, row):
    places = torch.arange(row.shape[1])[None]
    angles = language.rotary_emb(row, places)
    for layer in language.layers:
        row = layer(row, attention_mask=None, position_embeddings=angles, position_ids=places)
    return language.norm(row)


row = tiny.language.embed_tokens(batch.input_ids)
row[batch.input_ids == tiny.image_token] = tiny.translate(tiny.see(batch.pixel_values)).flatten(0, 1)
by_hand = tiny.head(read(tiny.language, row))
assert torch.allclose(by_hand, theirs, rtol=0, atol=1e-5)
print(f"largest difference {(by_hand - theirs).abs().max():.1e}")

# %% [markdown] lang="en"
# Next lesson: [build a LLaVA](../../code03_build_model_show.ipynb) with transformers' own class, and with other towers and language models.

# %% [markdown] lang="zh"
# 下一课：用 transformers 自己的类[搭一个 LLaVA](code03_build_model_show.ipynb)，再换上别的视觉塔和语言模型。
