# %% [markdown] lang="en"
# # 4. Build a LLaVA, by hand and by function
#
# A LLaVA is three things in a row: a **vision tower**, which turns an image into vectors; a small **projector**, which moves these into the space of word vectors; and a **language model**, which reads them as if they were words. Two of the three exist already. This lesson puts them together and looks inside. It follows [zero_nlp/train_llava](https://github.com/yuanzhoulvpi2017/zero_nlp/tree/main/train_llava), whose author has a [video on this step](https://www.bilibili.com/video/BV1GS411P74b/) (Chinese).
#
# ## What you will know
#
# - how to build a LLaVA from any CLIP and any chat model, by hand and with one function;
# - what an image looks like at each station of its way;
# - how large each part is, here and in the real size;
# - how to change tower and language model, and which mistakes are caught.

# %% [markdown] lang="zh"
# # 4. 从 0 到 1 搭建 LLaVA：先手写，再用函数
#
# LLaVA 由三部分依次组成：**视觉塔**把图片变成向量；小小的**投影层（projector）** 把这些向量搬进词向量的空间；**语言模型**再把它们当成词来读。三者之中有两个是现成的。这一课把它们拼起来，再打开看看里面。原教程是 [zero_nlp/train_llava](https://github.com/yuanzhoulvpi2017/zero_nlp/tree/main/train_llava)，作者为这一步录了[视频](https://www.bilibili.com/video/BV1GS411P74b/)。
#
# ## 你会学到
#
# - 怎样用任意一个 CLIP 和任意一个对话模型搭出 LLaVA：手写一遍，再用一个函数完成；
# - 图片一路上每一站长什么样；
# - 各部分有多大，demo 里多大，真实模型里又多大；
# - 怎样换视觉塔和语言模型，哪些错误会被拦住。

# %% tags=["parameters"]
VISION = "demo/clip"  # a CLIP folder or hub id
LANGUAGE = "demo/qwen"  # a chat model folder or hub id

# %% tags=["figure"]
from tutorial.quiet import quiet

quiet()

from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from demo.scenes import draw, random_scene
from train_llava.build_model import build_llava
from train_llava.model.config import compose_config, read_text_config, read_vision_config
from train_llava.model.folder import save_llava
from train_llava.model.structure import components_table
from tutorial import build_figures, other_halves

torch.manual_seed(0)
model, _ = build_llava(VISION, LANGUAGE)
rng = np.random.default_rng(6)
image = draw(random_scene(rng, "held_out"), rng, "held_out")
width, patches = model.config.text_config.hidden_size, model.config.image_seq_length
shapes = {"vision tower": (patches + 1, model.config.vision_config.hidden_size), "projector": (patches, width)}
shapes |= {"language model": ("tokens", width), "head": ("1", model.config.text_config.vocab_size)}
build_figures.parts(image, shapes)

# %% [markdown] lang="en"
# Everything runs on two miniatures that lie in `demo/`. **For the real thing** change the two names above to `"openai/clip-vit-large-patch14-336"` and `"Qwen/Qwen1.5-4B-Chat"`; nothing else changes. It then needs about 35 GB of memory, since the model is there three times, once in fp32.
#
# ## By hand
#
# Load both halves as they are, and give the tokenizer one more token, `<image>`: the place that an image will take. Then one config names both, and the weights are copied over part by part. `load_state_dict` is strict: a tensor that is missing is an error. The projector stays as it is, random.

# %% [markdown] lang="zh"
# 这里用的是 `demo/` 里的两个迷你模型。**想搭真的**，把上面两个名字改成 `"openai/clip-vit-large-patch14-336"` 和 `"Qwen/Qwen1.5-4B-Chat"`，其余都不用动。那时大约需要 35 GB 内存，因为模型会同时有三份，其中一份是 fp32。
#
# ## 手写
#
# 把两半原样加载进来，再给分词器（tokenizer）加一个词元 `<image>`：图片要占的位置。然后用一份配置把两半写在一起，逐个部分复制权重。`load_state_dict` 默认是严格的，少一个张量就会报错。投影层保持原样，也就是随机的。

# %%
vision = AutoModel.from_pretrained(VISION, config=AutoConfig.from_pretrained(VISION).vision_config, dtype="auto")
language = AutoModelForCausalLM.from_pretrained(LANGUAGE, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(LANGUAGE)
tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
IMAGE = tokenizer.convert_tokens_to_ids("<image>")
rows = language.get_input_embeddings().num_embeddings
print(f"<image> is token {IMAGE}; the table of word vectors has {rows} rows, so it needs no new one")
assert rows > IMAGE

# %%
tokens = (vision.config.image_size // vision.config.patch_size) ** 2  # in place of one image
both = {"vision_config": vision.config, "text_config": language.config}
config = LlavaConfig(**both, image_token_index=IMAGE, image_seq_length=tokens)
by_hand = LlavaForConditionalGeneration(config).float().eval()
by_hand.model.vision_tower.load_state_dict(vision.state_dict())
by_hand.model.language_model.load_state_dict(language.model.state_dict())
by_hand.lm_head.load_state_dict(language.lm_head.state_dict())

# %% [markdown] lang="en"
# The **processor** turns an image and a text into what the model reads. It must write as many `<image>` tokens as the tower gives vectors: one for each patch. CLIP has one position more, CLS, which stands for the whole image; LLaVA drops it.

# %% [markdown] lang="zh"
# **处理器（processor）** 把图片和文字变成模型能读的东西。它写出的 `<image>` 个数，必须等于视觉塔给出的向量个数：每个图块一个。CLIP 还多一个代表整张图片的位置 CLS，LLaVA 不用它。

# %%
settings = {"patch_size": vision.config.patch_size, "vision_feature_select_strategy": "default"}  # which drops CLS
template = Path("train_llava/processing/content_parts.jinja").read_text() + tokenizer.chat_template
image_processor = AutoImageProcessor.from_pretrained(VISION)
processor = LlavaProcessor(
    image_processor, tokenizer, num_additional_image_tokens=1, **settings, chat_template=template
)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What do you see in the image?"}]}]
inputs = processor(image, processor.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt")
print({name: tuple(value.shape) for name, value in inputs.items()}, f"{(inputs.input_ids == IMAGE).sum()} x <image>")

# %% [markdown] lang="en"
# ## An image on its way
#
# Now the whole model in five lines. The tower's last layer but one is read, `hidden_states[-2]`: the last is shaped by CLIP's own task, to match an image as a whole with a caption ([lesson 1](tutorial/en/01_image.ipynb)).

# %% [markdown] lang="zh"
# ## 图片一路上的样子
#
# 整个模型只要五行。读的是视觉塔的倒数第二层 `hidden_states[-2]`：最后一层是为 CLIP 自己的任务服务的，即拿整张图片去配一句话（[第 1 课](01_image.ipynb)）。

# %%
where = inputs.input_ids[0] == IMAGE
with torch.no_grad():
    seen = by_hand.model.vision_tower(inputs.pixel_values, output_hidden_states=True).hidden_states[-2][0, 1:]
    vectors = by_hand.model.multi_modal_projector(seen)
    row = by_hand.get_input_embeddings()(inputs.input_ids[0])
    row[where] = vectors  # the image takes its places among the words
    logits = by_hand.lm_head(by_hand.model.language_model(inputs_embeds=row[None]).last_hidden_state)
    assert torch.allclose(logits, by_hand(**inputs).logits, atol=1e-4)
tables = {"out of the tower": seen, "out of the projector": vectors, "the row that is read": row}
build_figures.on_the_way(image, vision.config.patch_size, tables, where)

# %% [markdown] lang="en"
# Each row of colours is a vector. In the frame are the image's, above and below it the words'. To the language model they are all alike. (The projector is still random, and its numbers are small.)
#
# ## By function
#
# `build_llava` does the same for any CLIP or SigLIP and any chat model of the usual form, without a second copy in memory. Everything but the random projector must be equal. And for the real size the configs are enough: on torch's `meta` device a model has shapes, but no numbers.

# %% [markdown] lang="zh"
# 每一行颜色是一个向量。框里是图片的，框上面和下面是词的，对语言模型来说没有区别。（投影层还是随机的，数值很小。）
#
# ## 用函数
#
# `build_llava` 做的是同一件事，适用于任意 CLIP 或 SigLIP，以及常见结构的对话模型，而且不会在内存里多存一份。除了随机的投影层，两者应该完全相同。至于真实模型有多大，有配置就够了：放在 torch 的 `meta` 设备上，模型只有形状，没有数值。

# %%
mine, theirs = by_hand.state_dict(), model.state_dict()
different = [name for name in theirs if not torch.equal(mine[name].to(theirs[name].dtype), theirs[name])]
print("different:", different, "\n")
print(components_table(model))
assert different and all("multi_modal_projector" in name for name in different)

# %%
FULL = Path("benchmarks/full_size/configs")  # of CLIP-ViT-L/336 and Qwen1.5-4B
with torch.device("meta"):
    config_of_both = compose_config(read_vision_config(FULL / "clip"), read_text_config(FULL / "qwen"))
    full = LlavaForConditionalGeneration(config_of_both)
assert list(build_figures.counts(full).values()) == [303_507_456, 9_180_160, 3_561_413_120, 388_956_160]
build_figures.sizes({"the demo": model, "the real size": full})

# %% [markdown] lang="en"
# In the demo tower and language model are alike; in the real one the language model is nearly everything, and the projector, the only part that must be learned from nothing, is hardly to be seen.
#
# ## Another tower, another language model
#
# A SigLIP has no CLS: all its vectors are read (`"full"` instead of `"default"`). A Llama has other names inside. Here are both, tiny and with random weights; [docs/models.md](docs/models.md) lists what fits, and what does not.

# %% [markdown] lang="zh"
# demo 里视觉塔和语言模型差不多大；真实模型里，语言模型几乎就是全部，而唯一要从零学起的投影层细得看不见。
#
# ## 换视觉塔，换语言模型
#
# SigLIP 没有 CLS，它的向量全部要读（`"full"`，而不是 `"default"`）。Llama 内部是另一套结构。下面两个都是迷你的，权重随机；哪些模型能用、哪些不能，见 [docs/models_zh.md](../../docs/models_zh.md)。

# %%
FOLDER = Path("output/tutorial/04_build")
siglip, llama = other_halves.siglip(FOLDER / "siglip"), other_halves.llama(FOLDER / "llama")
other, _ = build_llava(siglip, llama, random_weights=True)
print({name: type(part).__name__ for name, part in other.model.named_children()})
build_figures.towers(image, {"CLIP": model, "SigLIP": other})

# %% [markdown] lang="en"
# ## What the checks catch
#
# A wrong LLaVA often runs, and only answers badly. So the build looks first. Three mistakes: a tensor is lost, the chat template leaves out the end of an answer, the image processor belongs to another tower.

# %% [markdown] lang="zh"
# ## 哪些错误会被拦住
#
# 搭错的 LLaVA 往往照样能跑，只是答得很差。所以搭建时先检查。下面犯三个错：丢一个张量；对话模板漏掉回答的结尾；图像处理器属于另一个视觉塔。

# %%
lost = other_halves.without_a_tensor(FOLDER / "lost")
endless = other_halves.without_an_end(FOLDER / "endless")
too_large = other_halves.siglip(FOLDER / "too_large", pixels=224)
for halves in ((lost, LANGUAGE), (VISION, endless), (too_large, LANGUAGE)):
    print("-", other_halves.refusal(build_llava, *halves))

# %% [markdown] lang="en"
# ## What we see
#
# Save it. The folder needs nothing of ours: plain transformers reads it and answers.

# %% [markdown] lang="zh"
# ## 我们看到
#
# 把它存下来。这个文件夹不依赖本仓库，直接用 transformers 就能加载和提问。

# %%
model, processor = build_llava(VISION, LANGUAGE)
save_llava(model, processor, FOLDER / "llava", overwrite=True)
pipe = pipeline("image-text-to-text", model=str(FOLDER / "llava"))
chat[0]["content"][0]["image"] = image
print(pipe(text=chat, max_new_tokens=30, return_full_text=False)[0]["generated_text"])

# %% [markdown] lang="en"
# It speaks, but not about this image: nobody has taught the projector to translate. That is what training is for.
#
# ## Common questions
#
# **Why is nothing resized for `<image>`?** Because the table has more rows than there are tokens. Qwen1.5-4B's has 151,936, and `<image>` becomes number 151,646. If no row were free, `build_llava` would add some.
#
# **Must both halves have the same dtype?** No. Each keeps the one that it was published in, and the projector takes that of the language model: see the table above.
#
# **"Image features and image tokens do not match": what does it mean?** The processor wrote another number of `<image>` than the tower gives vectors, mostly because of CLS ([transformers#36002](https://github.com/huggingface/transformers/issues/36002)). Here it is, made on purpose. The processor believes that there is no CLS, and writes one `<image>` too few; the other number counts single numbers, 16 vectors of 128:

# %% [markdown] lang="zh"
# 它会说话，但说的不是这张图：还没有人教过投影层怎样翻译。这正是训练要做的事。
#
# ## 常见问题
#
# **加了 `<image>`，为什么不用改 embedding 的大小？** 因为词向量表的行数比词元多。Qwen1.5-4B 的表有 151,936 行，`<image>` 的编号是 151,646。要是没有空行，`build_llava` 会自动加。
#
# **两半的 dtype 必须一样吗？** 不必。各自保持发布时的精度，投影层跟语言模型一致，见上面的表。
#
# **“Image features and image tokens do not match” 是什么意思？** 处理器写的 `<image>` 个数和视觉塔给的向量个数对不上，多半是 CLS 造成的（[transformers#36002](https://github.com/huggingface/transformers/issues/36002)）。下面故意犯一次：处理器以为没有 CLS，少写了一个 `<image>`；另一个数是按单个数值计的，也就是 16 个 128 维的向量：

# %%
wrong = LlavaProcessor(image_processor, tokenizer, num_additional_image_tokens=0, **settings, chat_template=template)
mismatched = wrong(image, wrong.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt")
print(other_halves.refusal(by_hand, **mismatched))

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** The projector is two matrices with a bias each, from 1,024 to 2,560 and from 2,560 to 2,560. Work out its 9,180,160 parameters.
#
# 🐕 **Middle.** Build with a Llama whose head is its table of word vectors (`tie_word_embeddings=True`). How many parameters does that save?
#
# 🦁 **Hard.** The first LLaVA had a single matrix as its projector. Put one in. Does the model run? Can it be saved and read again?
#
# ## Solutions
#
# 🐢 A matrix has inputs × outputs weights, and a bias one for each output.
#
# 🐕 As many as the head has: rows × width. Small language models do that, since for them the table is a large part.
#
# 🦁 It runs, since nobody asks what the projector is inside. But the class that reads a folder builds two layers, and strict loading says so.

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 投影层是两个带偏置的矩阵，从 1024 到 2560，再从 2560 到 2560。算出它的 9,180,160 个参数。
#
# 🐕 **中等。** 用一个输出头与词向量表共用的 Llama 来搭（`tie_word_embeddings=True`）。省下多少参数？
#
# 🦁 **困难。** 最早的 LLaVA，投影层只有一个矩阵。换上去试试：模型还能跑吗？存下来还能再读吗？
#
# ## 答案
#
# 🐢 矩阵有“输入 × 输出”个权重，偏置每个输出一个。
#
# 🐕 省下的正好是输出头：行数 × 宽度。小的语言模型常这样做，因为词向量表在它们身上占很大一块。
#
# 🦁 能跑，因为没有人问投影层里面是什么。但读文件夹的类会造出两层，严格加载时就会报错。

# %% tags=["solution"]
print(f"{1024 * 2560 + 2560:,} + {2560 * 2560 + 2560:,} = {1024 * 2560 + 2560 + 2560 * 2560 + 2560:,}")

# %% tags=["solution"]
llama = other_halves.llama(FOLDER / "tied", tie_word_embeddings=True)
tied, _ = build_llava(siglip, llama, random_weights=True)
saved = sum(p.numel() for p in other.parameters()) - sum(p.numel() for p in tied.parameters())
print(components_table(tied), f"\n{saved:,} parameters less")
assert saved == 896 * 64

# %% tags=["solution"]
first_width, last_width = vision.config.hidden_size, language.config.hidden_size
by_hand.model.multi_modal_projector = torch.nn.Linear(first_width, last_width)
print("it runs:", tuple(by_hand(**inputs).logits.shape))
print(other_halves.refusal(LlavaForConditionalGeneration(config).load_state_dict, by_hand.state_dict())[:200])

# %% [markdown] lang="en"
# Next lesson: [how data becomes batches](tutorial/en/05_data.ipynb).

# %% [markdown] lang="zh"
# 下一课：[数据怎样变成批次](05_data.ipynb)。
