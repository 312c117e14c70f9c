# %% [markdown] lang="en"
# # 4. Build a LLaVA, by hand and by function
#
# A LLaVA has three parts, one after the other: a **vision tower**, which turns an image into vectors; a small **projector**, which translates these into vectors like those of words; and a **language model**, which reads them as if they were words. Two of the three exist already. This lesson puts the three together and looks inside. It follows [zero_nlp/train_llava](https://github.com/yuanzhoulvpi2017/zero_nlp/tree/main/train_llava), whose author has a [video on this step](https://www.bilibili.com/video/BV1GS411P74b/) (Chinese).
#
# ## What you will know
#
# - how to build a LLaVA from any CLIP and any chat model, by hand and with one function;
# - what an image looks like after each part;
# - how large each part is, in the demo and in a real model;
# - how to use another tower or another language model, and which mistakes are caught.

# %% [markdown] lang="zh"
# # 4. 从 0 到 1 搭建 LLaVA：先手写，再用函数
#
# LLaVA 由三部分依次组成：**视觉塔**把图片变成向量；小小的**投影层**（projector）把这些向量翻译成像词向量那样的向量；**语言模型**再把它们当成词来读。三者之中有两个是现成的。这一课把它们拼起来，再打开看看里面。原教程是 [zero_nlp/train_llava](https://github.com/yuanzhoulvpi2017/zero_nlp/tree/main/train_llava)，作者为这一步录了[视频](https://www.bilibili.com/video/BV1GS411P74b/)。
#
# ## 你会学到
#
# - 怎样用任意一个 CLIP 和任意一个对话模型搭出 LLaVA：手写一遍，再用一个函数完成；
# - 图片经过每个部分之后变成什么样；
# - 各部分有多大：演示模型里多大，真实模型里又多大；
# - 怎样换视觉塔和语言模型，哪些错误会被拦住。

# %% tags=["parameters"]
VISION = "demo/clip"  # a CLIP folder or hub id
LANGUAGE = "demo/qwen"  # a chat model folder or hub id

# %% tags=["figure"]
from tutorial.tools.quiet import quiet

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
from train_llava.model.load import load
from train_llava.model.structure import components_table
from tutorial.figures import structure
from tutorial.tools import other_halves

torch.manual_seed(0)
model, _ = build_llava(VISION, LANGUAGE)
rng = np.random.default_rng(6)
image = draw(random_scene(rng, "held_out"), rng, "held_out")
width, patches = model.config.text_config.hidden_size, model.config.image_seq_length
shapes = {"vision tower": (patches + 1, model.config.vision_config.hidden_size), "projector": (patches, width)}
shapes |= {"language model": ("tokens", width), "head": ("tokens", model.config.text_config.vocab_size)}
structure.parts(image, shapes)

# %% [markdown] lang="en"
# Each box shows the shape of what comes out of it. Everything runs on two miniatures that lie in `demo/`. **For the real thing** change the two names above to `"openai/clip-vit-large-patch14-336"` and `"Qwen/Qwen1.5-4B-Chat"`; nothing else changes. The lesson then needs about 45 GB of memory, since it holds the model up to four times, once in fp32, numbers of 4 bytes.
#
# ## By hand
#
# Load both halves as they are; of CLIP we need the vision tower alone, not its text half. Give the tokenizer one more token, `<image>`: the place that an image will take. Then write one config that holds both configs, and copy the weights over part by part. `load_state_dict` is strict: a missing tensor is an error. The projector gets no weights. It stays random.

# %% [markdown] lang="zh"
# 每个方框里写着它输出的形状。这里用的是 `demo/` 里的两个迷你模型。**想搭真的**，把上面两个名字改成 `"openai/clip-vit-large-patch14-336"` 和 `"Qwen/Qwen1.5-4B-Chat"`，其余都不用动。那时这一课大约需要 45 GB 内存，因为模型最多会同时有四份，其中一份是 fp32（每个数 4 字节）。
#
# ## 手写
#
# 把两个模型原样加载进来；CLIP 只要视觉塔，不要它处理文字的那一半。给分词器（tokenizer）加一个词元 `<image>`：图片要占的位置。然后写一份包含两份配置的总配置，逐个部分复制权重。`load_state_dict` 默认是严格的，少一个张量就会报错。投影层没有权重可复制，仍然是随机的。

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
# The **processor** turns an image and a text into what the model reads. It must write as many `<image>` tokens as the tower gives vectors: one for each patch. CLIP has one position more, CLS, which stands for the whole image; LLaVA drops it. Qwen's chat template takes messages of text alone. We put a piece in front of it, `content_parts.jinja`, so that a message may also be a list of images and texts, as transformers' pipelines send it.

# %% [markdown] lang="zh"
# **处理器（processor）** 把图片和文字变成模型能读的东西。它写出的 `<image>` 个数，必须等于视觉塔给出的向量个数：每个图块一个。CLIP 还多一个代表整张图片的位置 CLS，LLaVA 不用它。Qwen 的对话模板只接受纯文字的消息；我们在它前面加一段 `content_parts.jinja`，消息也可以是图片和文字组成的列表，transformers 的 pipeline 就是这样传的。

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
# Now the whole model in five lines. Of the tower we read the last layer but one, `hidden_states[-2]`, without CLS: the last layer serves CLIP's own task, to match an image as a whole with a caption ([lesson 1](tutorial/en/01_image.ipynb)).

# %% [markdown] lang="zh"
# ## 图片一路上的样子
#
# 整个模型只要五行。读的是视觉塔的倒数第二层 `hidden_states[-2]`，不要 CLS：最后一层是为 CLIP 自己的任务服务的，即拿整张图片去配一句描述（[第 1 课](01_image.ipynb)）。

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
structure.on_the_way(image, vision.config.patch_size, tables, where)

# %% [markdown] lang="en"
# Each row of colours is a vector. In the frame are those of the image, above and below it those of the words. The language model treats them all alike. (The projector is still random, and its numbers are small; each panel has its own scale of colours.)
#
# ## By function
#
# `build_llava` does the same for any CLIP or SigLIP and any chat model of the usual form, without a second copy in memory. All weights must be equal to ours, but for those of the random projector:

# %% [markdown] lang="zh"
# 每一行颜色是一个向量。框里是图片的，框上面和下面是词的，语言模型对它们一视同仁。（投影层还是随机的，数值很小；各图的颜色标度不同。）
#
# ## 用函数
#
# `build_llava` 做的是同一件事，适用于任意 CLIP 或 SigLIP，以及常见结构的对话模型，而且不会在内存里多存一份。除了随机的投影层，所有权重都应该和我们手写的完全相同：

# %%
model, processor = build_llava(VISION, LANGUAGE)
mine, theirs = by_hand.state_dict(), model.state_dict()
different = [name for name in theirs if not torch.equal(mine[name].to(theirs[name].dtype), theirs[name])]
print("different:", different, "\n")
print(components_table(model))
assert different and all("multi_modal_projector" in name for name in different)

# %% [markdown] lang="en"
# To see how large the parts are in the real size, configs are enough: on torch's `meta` device a model has shapes, but no numbers.

# %% [markdown] lang="zh"
# 真实模型的各部分有多大，有配置就能知道：放在 torch 的 `meta` 设备上，模型只有形状，没有数值。

# %%
FULL = Path("benchmarks/full_size/configs")  # of CLIP-ViT-L/336 and Qwen1.5-4B
with torch.device("meta"):
    config_of_both = compose_config(read_vision_config(FULL / "clip"), read_text_config(FULL / "qwen"))
    full = LlavaForConditionalGeneration(config_of_both)
assert list(structure.counts(full).values()) == [303_507_456, 9_180_160, 3_561_413_120, 388_956_160]
structure.sizes({"the demo": model, "the real size": full})

# %% [markdown] lang="en"
# In the demo, tower and language model are about equally large. In the real model the language model is nearly everything. The projector, the only part that must be learned from nothing, can hardly be seen.
#
# ## Another tower, another language model
#
# A SigLIP is a tower trained much like CLIP, but without CLS: all its vectors are read (`"full"` instead of `"default"`). A Llama is a language model of another class than Qwen. Here are both, tiny and with random weights; [docs/models.md](docs/models.md) lists what fits, and what does not.

# %% [markdown] lang="zh"
# 演示模型里，视觉塔和语言模型差不多大；真实模型里，语言模型几乎就是全部，而唯一要从零学起的投影层细得几乎看不见。
#
# ## 换视觉塔，换语言模型
#
# SigLIP 也是视觉塔，训练方法和 CLIP 相近，但没有 CLS，它的向量全部要读（`"full"`，而不是 `"default"`）。Llama 是语言模型，和 Qwen 不是同一个类。下面两个都是迷你的，权重随机；哪些模型能用、哪些不能，见 [docs/models_zh.md](../../docs/models_zh.md)。

# %%
FOLDER = Path("output/tutorial/04_build")
siglip, llama = other_halves.siglip(FOLDER / "siglip"), other_halves.llama(FOLDER / "llama")
other, _ = build_llava(siglip, llama, random_weights=True)
print({name: type(part).__name__ for name, part in other.model.named_children()})
structure.towers(image, {"CLIP": model, "SigLIP": other})

# %% [markdown] lang="en"
# ## What the checks catch
#
# A wrong LLaVA often runs, and only answers badly. So `build_llava` checks first. We make three mistakes: a tensor of the tower is lost; the chat template leaves out the end of an answer; the image processor makes images of 224 pixels for a tower of 112.

# %% [markdown] lang="zh"
# ## 哪些错误会被拦住
#
# 搭错的 LLaVA 往往照样能跑，只是答得很差。所以 `build_llava` 先检查。下面故意犯三个错：视觉塔丢了一个张量；对话模板漏掉回答的结尾；视觉塔要 112 像素，图像处理器却给出 224 像素的图片。

# %%
lost = other_halves.without_a_tensor(FOLDER / "lost")
endless = other_halves.without_an_end(FOLDER / "endless")
too_large = other_halves.siglip(FOLDER / "too_large", pixels=224)
for halves in ((lost, LANGUAGE), (VISION, endless), (too_large, LANGUAGE)):
    print("-", other_halves.refusal(build_llava, *halves))

# %% [markdown] lang="en"
# ## What we see
#
# Save the model and ask it. The folder needs no code of this repository: transformers alone reads it and answers.

# %% [markdown] lang="zh"
# ## 我们看到
#
# 把模型存下来，问它一个问题。这个文件夹不依赖本仓库的代码，只用 transformers 就能加载和提问。

# %%
save_llava(model, processor, FOLDER / "llava", overwrite=True)
pipe = pipeline("image-text-to-text", model=str(FOLDER / "llava"))
chat[0]["content"][0]["image"] = image
print(pipe(text=chat, max_new_tokens=30, return_full_text=False)[0]["generated_text"])

# %% [markdown] lang="en"
# It answers, but what it says has little to do with this image, and where it fits, that is chance: nobody has taught the projector to translate. That is what training is for.
#
# ## Common questions
#
# **Why is nothing resized for `<image>`?** Because the table has more rows than there are tokens. Qwen1.5-4B's has 151,936, and `<image>` becomes number 151,646. If no row were free, `build_llava` would add some.
#
# **Must both halves have the same dtype** (kind of number)**?** No. Each keeps the one that it was published in, and the projector takes that of the language model: see the table printed above.
#
# **"Image features and image tokens do not match": what does it mean?** The processor wrote more or fewer `<image>` than the tower gives vectors, mostly because of CLS ([transformers#36002](https://github.com/huggingface/transformers/issues/36002)). We make the mistake on purpose: this processor believes that there is no CLS, and writes one `<image>` too few. The first number of the message counts `<image>`; the second counts single numbers, 16 vectors of 128:

# %% [markdown] lang="zh"
# 它会回答，但说的和这张图没什么关系，碰对了也是运气：还没有人教过投影层怎样翻译。这正是训练要做的事。
#
# ## 常见问题
#
# **加了 `<image>`，为什么不用扩大词向量表？** 因为表的行数比词元多。Qwen1.5-4B 的表有 151,936 行，`<image>` 的编号是 151,646。要是没有空行，`build_llava` 会自动加。
#
# **两个模型的 dtype（数的类型）必须一样吗？** 不必。各自保持发布时的精度，投影层跟语言模型一致，见上面打印的表。
#
# **“Image features and image tokens do not match” 是什么意思？** 处理器写的 `<image>` 个数和视觉塔给的向量个数对不上，多半是 CLS 造成的（[transformers#36002](https://github.com/huggingface/transformers/issues/36002)）。下面故意犯一次：这个处理器以为没有 CLS，少写了一个 `<image>`。报错里的第一个数是 `<image>` 的个数；第二个数是按单个数值计的，也就是 16 个 128 维的向量：

# %%
wrong = LlavaProcessor(image_processor, tokenizer, num_additional_image_tokens=0, **settings, chat_template=template)
mismatched = wrong(image, wrong.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt")
print(other_halves.refusal(by_hand, **mismatched))

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** The projector is two matrices with a bias each, from 1,024 to 2,560 and from 2,560 to 2,560. Work out its 9,180,160 parameters.
#
# 🐕 **Middle.** Build with a Llama whose head is its table of word vectors (`other_halves.llama` takes `tie_word_embeddings=True`). How many parameters does that save?
#
# 🦁 **Hard.** The first LLaVA had a single matrix as its projector. Put one into `by_hand.model.multi_modal_projector`. Does the model run? Could it be saved (`save_llava`) and read again (`load`)?
#
# ## Solutions
#
# 🐢 A matrix has inputs × outputs weights; a bias has one for each output.
#
# 🐕 As many as the head has: rows × width. Small language models often do that, since the table is a large part of them.
#
# 🦁 It runs, since no code looks at what the projector is inside. But it does not come back: the class that reads a folder builds a projector of two matrices, and transformers fills it with random weights. Its warning, which this lesson hides, is easy to overlook. The loader of this repository refuses such a folder.

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 投影层是两个带偏置的矩阵，从 1024 到 2560，再从 2560 到 2560。算出它的 9,180,160 个参数。
#
# 🐕 **中等。** 用一个输出层与词向量表共用权重的 Llama 来搭（给 `other_halves.llama` 传 `tie_word_embeddings=True`）。省下多少参数？
#
# 🦁 **困难。** 最早的 LLaVA，投影层只有一个矩阵。换到 `by_hand.model.multi_modal_projector` 里试试：模型还能跑吗？存下来（`save_llava`）还能再读（`load`）吗？
#
# ## 答案
#
# 🐢 矩阵有“输入 × 输出”个权重，偏置每个输出一个。
#
# 🐕 省下的正好是输出层：行数 × 宽度。小的语言模型常这样做，因为词向量表占了它们很大一块。
#
# 🦁 能跑，因为没有代码关心投影层里面是什么。但存下来就读不回原样了：加载文件夹的类会造出两个矩阵的投影层，transformers 给它们填上随机权重，只有一条容易看漏的警告（本课把它关掉了）。本仓库的加载则会拒绝这个文件夹。

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
save_llava(by_hand, processor, FOLDER / "single", overwrite=True)
again = LlavaForConditionalGeneration.from_pretrained(FOLDER / "single")
print("read by transformers:", again.model.multi_modal_projector)
refused = other_halves.refusal(load, FOLDER / "single")
print("read by ours:", refused[:200])
assert "missing" in refused

# %% [markdown] lang="en"
# Next lesson: [how data becomes batches](tutorial/en/05_data.ipynb).

# %% [markdown] lang="zh"
# 下一课：[数据怎样变成批次](05_data.ipynb)。
