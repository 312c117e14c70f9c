# %% [markdown] lang="en"
# # 2. How text becomes vectors, and where `<image>` goes
#
# The last lesson made vectors of an image. A language model reads one vector for each token. This lesson follows a chat until it is a row of vectors, and finds the place in it that the image takes. In the end it breaks the **processor**, which prepares image and text for the model, on purpose. We use the demo's trained model; the steps are those of Qwen1.5.
#
# ## What you will know
#
# - how a chat becomes one text, the text becomes ids, and the ids become vectors;
# - why `<image>` needs no new row in the table of vectors, and why it does not matter what its row holds;
# - why one `<image>` becomes 16 tokens (576 in a real model);
# - where answers with spaces between all letters come from.

# %% [markdown] lang="zh"
# # 2. 文字怎样变成向量，`<image>` 放在哪里
#
# 上一课把图片变成了向量。语言模型读的是词元，每个词元一个向量。这一课跟着一段对话往前走，看它怎样变成一串向量，图片又插在哪里；最后故意弄坏**处理器**（processor，它负责替模型准备图片和文字），看看会出什么事。用的是训练好的演示模型，步骤和 Qwen1.5 完全一样。
#
# ## 你会学到
#
# - 对话怎样变成一段文字，文字怎样变成编号，编号怎样变成向量；
# - 为什么加了 `<image>` 不用扩大向量表，它那一行里是什么又为什么无关紧要；
# - 为什么一个 `<image>` 会变成 16 个（真实模型是 576 个）词元；
# - 回答里每个字母之间都有空格，是怎么来的。

# %% tags=["figure"]
import numpy as np

from demo.scenes import Item, draw
from tutorial.figures import tokens
from tutorial.tools.trained import trained_llava

llava, processor = trained_llava()
tokenizer = processor.tokenizer

scene = (Item(10, "red", 1, large=True), Item(13, "yellow", 2, large=True, cell=1))
image = draw(scene, np.random.default_rng(0), "train")
chat = [
    {"role": "user", "content": "<image>\nWhich colour does the star have?"},
    {"role": "assistant", "content": "Yellow."},
]

from train_llava.processing.chat import ChatEncoder

encoder = ChatEncoder(tokenizer, llava.config.image_seq_length, processor.chat_template)
ids, labels = encoder.encode(chat)
tokens.chat(tokenizer, ids, labels)

# %% [markdown] lang="en"
# Each box is a token, with its id below it. ␣ is a space, and ↵ the end of a line. Green is what the model learns to write (lesson 5). Let us go there step by step.
#
# ## From a chat to one text
#
# A chat is a list of messages. The model reads no lists, so the **chat template** writes them into one text, with a mark at the beginning and one at the end of each message:

# %% [markdown] lang="zh"
# 每个方框是一个词元，下面是它的编号；␣ 表示空格，↵ 表示换行；绿色的是模型要学着写的（第 5 课）。我们一步一步走过去。
#
# ## 从对话到一段文字
#
# 对话是一个消息列表，模型读不了列表。**对话模板**（chat template）把它们写成一段文字，每条消息的开头和结尾都有标记：

# %%
text = processor.apply_chat_template(chat, tokenize=False)
print(text)
asking = processor.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
assert text.startswith(asking) and asking.endswith("<|im_start|>assistant\n")

# %% [markdown] lang="en"
# The system message was not in our chat: Qwen1.5's template adds it. In training the model reads all of the text. When we ask, the text stops after `assistant` and the line break (`add_generation_prompt=True`), and the model goes on from there. The `assert` checks what matters: up to there, both texts are the same.
#
# ## From text to ids
#
# The **tokenizer** cuts the text into pieces of its vocabulary, and replaces each by its number:

# %% [markdown] lang="zh"
# 我们的对话里没有 system 消息，是 Qwen1.5 的模板自动加上的。训练时模型读整段文字；提问时文字到 `assistant` 和换行为止（`add_generation_prompt=True`），由模型接着往下写。`assert` 检查的正是关键：到这里为止，两种情况下的文字一模一样。
#
# ## 从文字到编号
#
# **分词器**（tokenizer）把文字切成词表里有的小段，再换成编号：

# %%
from demo import chinese

for words in ("a red seven", "an elephant", chinese.NAMES["triangle"] + chinese.HUES["red"]):
    pieces = tokenizer(words).input_ids
    print([tokenizer.decode([piece]) for piece in pieces], pieces)

# %% [markdown] lang="en"
# A space belongs to the word after it. A frequent word is one token; a rare one is cut into pieces, if need be into bytes, so no word is unknown. Each id is also the number of a row in a table: that row is the vector of the token. Where does `<image>` get its id from? From the rows that no token uses:

# %% [markdown] lang="zh"
# 空格算在后面那个词里。常见的词是一个词元；少见的词拆成几段，必要时拆到字节，所以没有“不认识的词”。每个编号也是向量表里的行号，那一行就是这个词元的向量。那么 `<image>` 的编号从哪里来？来自还没有词元用的空行：

# %%
from transformers import AutoConfig, AutoTokenizer

plain = AutoTokenizer.from_pretrained("demo/qwen")  # the chat model's own, before we add <image>
qwen = AutoConfig.from_pretrained("benchmarks/full_size/configs/qwen")
strips = {  # how many pieces of text, special tokens, rows; Qwen's special ones go from bos to eos
    "the demo": (plain.vocab_size, len(plain) - plain.vocab_size, llava.config.text_config.vocab_size),
    "Qwen1.5-4B": (qwen.bos_token_id, qwen.eos_token_id - qwen.bos_token_id + 1, qwen.vocab_size),
}
tokens.vocabularies(strips)

# %% [markdown] lang="en"
# The table of vectors has more rows than the tokenizer has tokens, because GPUs are faster with round sizes, such as multiples of 64. So `<image>` takes the first free row, and nothing is resized:

# %% [markdown] lang="zh"
# 向量表的行数比词元多，因为行数是 64 等数的倍数时，GPU 算得更快。于是 `<image>` 直接用第一个空行，什么都不用扩：

# %%
image_id = tokenizer.convert_tokens_to_ids("<image>")
table = llava.get_input_embeddings().weight
assert image_id == len(plain) == llava.config.image_token_id
assert len(table) == AutoConfig.from_pretrained("demo/qwen").vocab_size  # as the chat model came
print(f"<image> is {image_id}; the table still has {len(table)} rows of {table.shape[1]} numbers")

# %% [markdown] lang="en"
# ## From ids to vectors
#
# An id picks a row of the table. Left: the rows that the ids of our question pick; those of the 16 `<image>`, in the frame, are all the same row. Right: what the language model gets, with the vectors of the image in the frame.

# %% [markdown] lang="zh"
# ## 从编号到向量
#
# 编号就是行号，从表里取出对应的一行。左图是按提问的编号取出的各行，框里 16 个 `<image>` 取到的是同一行；右图是语言模型真正收到的，框里换成了图像向量。

# %%
batch = processor(images=image, text=asking, return_tensors="pt")  # writes 16 <image> for the one
rows = table[batch.input_ids]
vectors = llava.get_image_features(batch.pixel_values).pooler_output[0]
here = batch.input_ids == image_id
merged = rows.masked_scatter(here[..., None], vectors)

tokens.sequences(rows[0], merged[0], here[0])

# %%
import torch

assert torch.equal(merged[here], vectors) and torch.equal(merged[~here], rows[~here])
by_hand = llava(inputs_embeds=merged, attention_mask=batch.attention_mask).logits
by_model = llava(**batch).logits
assert torch.equal(by_hand, by_model)
print(f"{int(here.sum())} image vectors in a row of {rows.shape[1]}; the same logits as the model's own")

# %% [markdown] lang="en"
# `masked_scatter` is the whole trick: it takes the image vectors one after another, and puts them where the mask is true. The last lines check it: with this sequence the language model gives the same **logits** as the whole model does. Logits are scores: at each position one for every token that could come next.
#
# So the counts must be equal: one `<image>` for each image vector. Our text has one `<image>`, and the processor makes 16 of it. If one is missing, transformers refuses:

# %% [markdown] lang="zh"
# 诀窍就是 `masked_scatter`：按顺序取出图像向量，依次放到掩码为真的位置。最后几行做了核对：语言模型读我们拼好的这个序列，得到的 **logits** 和整个模型给出的一样。logits 是得分：在每个位置上，每个词元作为下一个词元各得多少分。
#
# 所以数量必须对上：有几个图像向量，就要有几个 `<image>`。我们的文字里只写了一个，处理器把它变成 16 个。少一个，transformers 就会拒绝：

# %%
first = int(here[0].nonzero()[0])
without = torch.cat([batch.input_ids[:, :first], batch.input_ids[:, first + 1 :]], dim=1)
try:
    llava(input_ids=without, pixel_values=batch.pixel_values)
except ValueError as error:
    print(error)

# %% [markdown] lang="en"
# The message counts in two units: 15 tokens, but 2,048 numbers, which are 16 vectors of 128. Divide by the width of a vector before you compare.
#
# ## What we see
#
# The row of `<image>` is always replaced before the model reads it. So it should not matter what the row holds. Fill it with nonsense:

# %% [markdown] lang="zh"
# 这条报错用了两种单位：词元 15 个，另一边却是 2048 个数，也就是 16 个 128 维的向量。先除以向量的维度，再比较。
#
# ## 我们看到
#
# `<image>` 那一行在模型读到之前总会被替换掉，那么里面是什么应该都无所谓。随便填个离谱的数试试：

# %%
kept = table[image_id].clone()
table[image_id] = 1e3
assert torch.equal(llava(**batch).logits, by_model)
table[image_id] = kept
print("the same logits, bit for bit")

# %% [markdown] lang="en"
# And what do the image vectors say? For each of the 16 we look for the English words and pieces of words whose vectors point most nearly in its direction. The box on the right shows how long the vectors are. The two circles above it are the patches with a thing: they are longest, and say most.

# %% [markdown] lang="zh"
# 那么图像向量说了些什么？为这 16 个向量逐个找出方向最接近的英文词和词的片段。右边的箱线图画的是向量的长度：箱子上方的两个圆圈是有东西的两个图块，向量最长，说的也最多。

# %%
known = table[: plain.vocab_size]
directions = [torch.nn.functional.normalize(each, dim=-1) for each in (vectors, known)]
nearest = (directions[0] @ directions[1].T).topk(40)

words = [[tokenizer.decode([each]).strip() for each in row] for row in nearest.indices.tolist()]
words = [[word for word in row if word.isascii() and word.isalpha()][:5] for row in words]
things = sorted(item.patch for item in scene)
assert sorted(vectors.norm(dim=-1).topk(len(things)).indices.tolist()) == things
lengths = {"words": known.norm(dim=-1), "image vectors": vectors.norm(dim=-1)}
tokens.nearest_words(image, words, lengths, patch=28)

# %% [markdown] lang="en"
# A patch with a thing in it names its colour, its kind, its size and part of its place, all at once (of the star it says *left*, but also *top*). No word does that: an image vector is no word, it is near to several. Our small language model has practised reading sums of several words (`demo/language_half.py`). A large one manages without: in stage 1 of LLaVA it learns nothing, only the projector does.
#
# ## A wrong processor
#
# A processor is two things in one: an image processor (CLIP's), and a tokenizer with its chat template (the chat model's). CLIP has a tokenizer, too. Decode Qwen's ids with the class of CLIP's tokenizer, and answers look like this:

# %% [markdown] lang="zh"
# 有东西的图块，一个向量就同时说出了颜色、种类、大小，以及位置的一部分（星星那块说对了 left，却也说了 top）。没有哪个词做得到：图像向量不是词，而是同时靠近好几个词。我们的小语言模型专门练过读这种“几个词的和”（`demo/language_half.py`）；大模型不用专门练：LLaVA 的第一阶段里它什么也没学，学的只有投影层。
#
# ## 弄错处理器
#
# 处理器是两样东西合在一起：图像处理器（CLIP 的），以及分词器和对话模板（对话模型的）。CLIP 自己也有分词器。要是用它的类来还原 Qwen 的编号，回答就会变成这样：


# %%
def decode_like_clip(ids: list[int]) -> str:
    """What CLIP's tokenizer did in transformers 4: the mark at the end of each word becomes a space."""
    mark = tokenizer.backend_tokenizer.model.end_of_word_suffix  # CLIP's is "</w>"; Qwen's is empty
    return tokenizer.decode(ids).replace(mark, " ").strip()


reply = tokenizer("A red seven.<|im_end|>").input_ids
print("right:", tokenizer.decode(reply))
print("wrong:", decode_like_clip(reply))
assert tokenizer.backend_tokenizer.model.end_of_word_suffix == ""

# %% [markdown] lang="en"
# The ids are right and the training was right; only the way back to text is wrong. CLIP's vocabulary marks where a word ends, and its tokenizer replaces the mark by a space. Qwen's mark is the empty text, and Python finds an empty text between any two letters: `"red".replace("", " ")` gives `" r e d "`.

# %% [markdown] lang="zh"
# 编号没错，训练也没错，只是还原成文字的时候错了。CLIP 的词表用标记表示一个词的结尾，分词器把标记换成空格。Qwen 的标记是空串，而在 Python 看来，任意两个字母之间都有一个空串：`"red".replace("", " ")` 得到 `" r e d "`。

# %% [markdown] lang="en"
# ## Common questions
#
# **Must I call `resize_token_embeddings` for `<image>`?** Not with Qwen1.5: see the strip above. `build_llava` does it if a chat model has no free row.
#
# **Is the vector of `<image>` trained?** No, it gets no gradient: the third exercise shows it. `<image>` only holds a place.
#
# **I wrote one `<image>`. Why are there 16, or 576?** The processor repeats it, once for each patch, since each patch brings a vector. It works the number out from `patch_size` and `num_additional_image_tokens` in its config; wrong values lead to the error above.
#
# **Where may `<image>` stand?** Anywhere in a user's message, before the question or after it. Several are possible; the first image takes the first place.
#
# **Which folder do I load the processor from?** From the LLaVA's own ([#189](https://github.com/yuanzhoulvpi2017/zero_nlp/issues/189)). `build_model` saves model and processor together. If your answers have spaces between all letters ([#185](https://github.com/yuanzhoulvpi2017/zero_nlp/issues/185)), look at `processor_class` in its `processor_config.json`: it must be `LlavaProcessor`. If the ids are right, as here, you need not train again.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **加了 `<image>`，要不要调用 `resize_token_embeddings`？** Qwen1.5 不用，看上面的词表图就明白了。如果某个对话模型没有空行，`build_llava` 会自动扩。
#
# **`<image>` 的向量会被训练吗？** 不会，它没有梯度，第三个练习里能看到。它只是占位。
#
# **我只写了一个 `<image>`，为什么变成 16 个（576 个）？** 每个图块有一个向量，所以处理器按图块数重复它。个数由配置里的 `patch_size` 和 `num_additional_image_tokens` 算出；配错了就是上面那条报错。
#
# **`<image>` 可以放在哪里？** 用户消息里的任何位置，问题前面后面都行。也可以有好几个，第一张图对应第一个位置。
#
# **处理器从哪个文件夹加载？** 从 LLaVA 自己的文件夹（[#189](https://github.com/yuanzhoulvpi2017/zero_nlp/issues/189)）。`build_model` 会把模型和处理器存在一起。如果回答里每个字母之间都有空格（[#185](https://github.com/yuanzhoulvpi2017/zero_nlp/issues/185)），看看文件夹里 `processor_config.json` 的 `processor_class`，必须是 `LlavaProcessor`。只要编号像这里一样没错，就不用重新训练。

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Ask about two images in one question, each `<image>` on a line of its own. How many tokens does the second add?
#
# 🐕 **Middle.** Put `<image>` after the question instead of before it. Which logits change, and which cannot? (A language model reads from left to right: a position sees itself and what stands before it.)
#
# 🦁 **Hard.** Which rows of the table get a gradient from our chat? Is the row of `<image>` among them? (The cell of the first figure made `labels`, which mark the answer. `llava(..., labels=...)` gives a loss; `table` must ask for a gradient.)

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 在一个问题里放两张图片，每个 `<image>` 独占一行。第二张图多了多少个词元？
#
# 🐕 **中等。** 把 `<image>` 从问题前面移到后面。哪些 logits 会变，哪些不可能变？（语言模型从左往右读：每个位置只看得到自己和前面的内容。）
#
# 🦁 **困难。** 我们这段对话会让表里的哪些行得到梯度？`<image>` 那一行在不在里面？（画第一张图的代码里，`labels` 标出了回答；`llava(..., labels=...)` 会算出损失；`table` 要先设成需要梯度。）

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 16 for its patches, and one for the line break.

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 图块 16 个，再加一个换行。


# %% tags=["solution"]
def ask(content: str, images: list):
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(images=images, text=text, return_tensors="pt")


one = ask("<image>\nWhat do you see?", [image])
two = ask("<image>\n<image>\nWhat do you see?", [image, image])
print(two.input_ids.shape[1] - one.input_ids.shape[1])
assert two.input_ids.shape[1] - one.input_ids.shape[1] == 17

# %% [markdown] lang="en"
# 🐕 Up to the user's message both texts are equal, so the logits there are equal, too (up to rounding). All after it may change.

# %% [markdown] lang="zh"
# 🐕 到用户消息为止，两段文字相同，那里的 logits 也相同（只差舍入误差）；后面的都可能变。

# %% tags=["solution"]
before = ask("<image>\nWhat do you see?", [image])
behind = ask("What do you see?\n<image>", [image])
change = (llava(**before).logits - llava(**behind).logits).abs().amax(-1)[0]
same = int((before.input_ids == behind.input_ids)[0].long().cumprod(0).sum())  # tokens before the first difference
print(f"the first {same} positions: {change[:same].max():.1e}; the last: {change[-1]:.1e}")
assert change[:same].max() < 1e-4 < change[-1]

# %% [markdown] lang="en"
# 🦁 The rows of the tokens in the text get one, since the answer depends on them. The row of `<image>` gets none: it is replaced before anything reads it.

# %% [markdown] lang="zh"
# 🦁 文字里出现的词元，对应的行有梯度，因为回答依赖它们。`<image>` 那一行没有：还没被读到，它就被替换掉了。

# %% tags=["solution"]
whole = processor(images=image, text=text, return_tensors="pt")
table.requires_grad_(True).grad = None
llava(**whole, labels=torch.tensor([labels])).loss.backward()
touched = table.grad.abs().sum(-1).nonzero()[:, 0].tolist()
print([tokenizer.decode([row]) for row in touched])
assert image_id not in touched and set(touched) <= set(whole.input_ids[0].tolist())

# %% [markdown] lang="en"
# Next lesson: [a LLaVA in 60 lines](03_tiny.ipynb).

# %% [markdown] lang="zh"
# 下一课：[60 行写一个 LLaVA](03_tiny.ipynb)。
