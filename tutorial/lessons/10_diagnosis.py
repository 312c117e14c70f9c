# %% [markdown] lang="en"
# # 10. When something is wrong
#
# A training that fails with an error is the good case. In the bad case it ends, the loss looks fine, and the answers are nonsense. This lesson shows ten faults: the **symptom**, the **cause** in a few lines of code, the **fix**.
#
# ## What you will know
#
# - how to find out in three numbers whether a model looks at its image;
# - what the loss tells: 0, NaN, a shelf, a jump;
# - why answers repeat without end, or come out garbled;
# - what to do when shapes do not match, a training hangs, or memory runs out.

# %% [markdown] lang="zh"
# # 10. 出了问题怎么查
#
# 训练直接报错，其实是好事。麻烦的是训练顺利结束，损失看着正常，回答却是胡话。这一课讲十种毛病：每一种都先看**症状**，再用几行代码造出**原因**，最后说**怎么修**。
#
# ## 你会学到
#
# - 怎样用三个数判断模型到底看没看图；
# - 损失在说什么：为 0、为 NaN、停在平台上、突然跳起来；
# - 回答为什么停不下来，为什么是乱码；
# - 遇到形状不匹配、训练卡住、显存不足该怎么办。

# %% tags=["figure"]
from tutorial.tools.quiet import quiet

quiet()

import copy
from pathlib import Path

import torch

from demo.make_data import write_records
from train_llava.build_model import build_llava
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model import image_use
from tutorial.figures import symptoms

torch.manual_seed(0)

from peft import PeftModel

FOLDER = Path("output/tutorial/10_diagnosis")
write_records(FOLDER / "held_out", "held_out", "held_out", 70, seed=0)
held_out = LlavaDataset(FOLDER / "held_out")
with_image = image_use.sample(held_out)  # which records have an image
built, processor = build_llava("demo/clip", "demo/qwen", dtype=torch.float32)
trained = PeftModel.from_pretrained(copy.deepcopy(built), "demo/trained").eval()


def look(model: torch.nn.Module) -> dict[str, float]:
    """The loss of the answers with their own image, another record's, a grey one."""
    losses = image_use.losses_by_image(model, processor, held_out, with_image, 16)
    return image_use.figures([*losses])


looks = {"built, not trained": look(built), "trained": look(trained)}

triple = next(image_use.examples_by_image(held_out, with_image, [0]))
images = [record["images"][0] for record in triple]
symptoms.losses_by_image(images, looks)

# %% [markdown] lang="en"
# ## Does it look at the image?
#
# We compute the loss of the same answers three times: with the record's own image, with another record's, and with a grey one. If a model looks, its loss jumps with another image. If it ignores images, another serves as well. Right answers prove little: many questions can be guessed.
#
# Below, a third model is made blind: a hook, which PyTorch calls behind the projector, replaces its output by zeros.

# %% [markdown] lang="zh"
# ## 模型看图了吗？
#
# 同样的问题和答案算三次损失：配这条数据自己的图（own）、另一条数据的图（other）、一张灰图（grey）。看图的模型离不开自己的那张图，换一张损失就跳上去；不看图的模型，换成别人的图也差不多。答对几道题说明不了什么，很多题靠猜也能对。
#
# 下面在图中两个模型之外再加一个：把训练好的模型弄瞎。办法是挂一个钩子（hook），不管投影层输出什么，都换成零。


# %%
def blind(module, inputs, vectors):
    return torch.zeros_like(vectors)  # as if no image vector ever arrived


def told(numbers: dict[str, float]) -> str:
    losses = {which: numbers[f"loss_{which}_image"] for which in symptoms.WHICH}
    return "  ".join(f"{which} {loss:.2f}" for which, loss in losses.items())


blinded = copy.deepcopy(trained)
blinded.get_base_model().model.multi_modal_projector.register_forward_hook(blind)
looks["trained, then blinded"] = look(blinded)
for name, numbers in looks.items():
    print(f"{name:<22} {told(numbers)}\n   {image_use.verdict(numbers)}")
assert "ignores" in image_use.verdict(looks["trained, then blinded"])
assert "looks" in image_use.verdict(looks["trained"])

# %% [markdown] lang="en"
# **Fix:** check that the projector is trained and loaded; take data whose answers cannot be guessed. `train_llava.evaluate` prints this verdict for any model; `--eval_generate true` logs it during training.
#
# ## What is learned: look at the labels
#
# Labels say which tokens count in the loss; -100 means: skip this one. The figure shows one record's labels in three versions. Each box is a token; green is learned; the number counts these:

# %% [markdown] lang="zh"
# **怎么修：** 确认投影层训练过、也加载了；换用不看图就答不出来的数据。`train_llava.evaluate` 对任何模型都会打印这句结论，训练时加 `--eval_generate true`，每次评估都会记录。
#
# ## 到底学了什么：看标签
#
# 标签（labels）决定哪些词元计入损失，-100 表示跳过。图中是同一条数据的三种标签：每格一个词元，绿色是要学的，左边的数是绿格的个数。

# %% tags=["figure"]
collator = LlavaCollator(processor)
tokenizer, encoder = processor.tokenizer, collator.encoder
END = encoder.end_of_turn_id
example = triple[0]
ids, healthy = map(torch.tensor, encoder.encode(example["messages"]))
labels = {
    "healthy": healthy,
    "no end of turn": healthy.masked_fill(healthy == END, -100),
    "nothing": torch.full_like(healthy, -100),
}

symptoms.labels(labels)

# %% [markdown] lang="en"
# The last row arises when a program searches the text for another template's mark in front of answers, and finds none. The loss is 0 (a sum of nothing) or NaN (its mean, 0 / 0):

# %% [markdown] lang="zh"
# 第三行是这样来的：程序在文本里搜索“回答从这里开始”的标记，用的却是别的模板的标记。搜不到，就什么都不学，损失于是成了 0（什么都没加）或 NaN（零个数的平均，0 / 0）：

# %%
text = tokenizer.decode(ids)
for mark in ("ASSISTANT:", "<|im_start|>assistant"):
    print(f"{mark!r:<26} found at {text.find(mark)}")

logits, nothing = torch.randn(len(ids), 100), labels["nothing"]
total = torch.nn.functional.cross_entropy(logits, nothing, reduction="sum")
average = torch.nn.functional.cross_entropy(logits, nothing)
print(f"all labels -100: the sum of losses is {total:.0f}, their mean {average}")
assert total == 0 and average.isnan()

# %% [markdown] lang="en"
# **Fix:** `python -m train_llava.show_batch` shows your labels in colours. This repository does not search: the template tells where answers are (lesson 5).
#
# ## It never stops
#
# Two causes: the labels have no end, as in the second row; or generation waits for another end than was taught, say `<|endoftext|>`, with which pretraining ends texts:

# %% [markdown] lang="zh"
# **怎么修：** 用 `python -m train_llava.show_batch` 把自己数据的标签画出来看。本仓库不靠搜索，回答在哪里由模板直接给出（第 5 课）。
#
# ## 回答停不下来
#
# 原因有两种。一是标签里没有结束符，就像上图第二行；二是生成时等的结束符和训练教的不一样，比如等的是预训练时用的 `<|endoftext|>`：

# %%
from train_llava.model.generate import ask, generate

question = ask("What is in this image?", example["images"])
for end in ("<|im_end|>", "<|endoftext|>"):
    end_id = tokenizer.convert_tokens_to_ids(end)
    options = {"max_new_tokens": 60, "eos_token_id": end_id}
    (answer,) = generate(trained, processor, [question], **options)
    print(f"waits for {end}: {answer!r}\n")

# %% [markdown] lang="en"
# **Fix:** the last green box of every answer must be the end, and `generation_config.json` must name it. `build_model` sees to the latter.
#
# ## Garbled answers
#
# Prompt and tokenizer must be exactly those of the training. Here is the loss of right answers behind four prompts, and a right answer decoded with a wrong vocabulary:

# %% [markdown] lang="zh"
# **怎么修：** 每个回答的最后一个绿格必须是结束符，`generation_config.json` 里写的也要是它。`build_model` 会把模板和对话模型认识的结束符都写进去。
#
# ## 回答是乱码
#
# 提示词必须和训练时一模一样，分词器也是。不一样会怎样？下面用四种提示词各算一次正确答案的损失（Vicuna 是另一个对话模型，模板不同），再用错误的词表解码一条正确的回答。

# %%
image = "<image>" * len(encoder.image_ids)
asked = [record for record in held_out if len(record["images"]) == 1][:12]


def templated(text: str) -> str:
    user = {"role": "user", "content": text}
    return encoder.render([user], add_generation_prompt=True)


def ids_of(text: str) -> torch.Tensor:
    return tokenizer(text.replace("<image>", image), return_tensors="pt").input_ids


def loss_of_answer(record: dict, prompt: str) -> float:
    """The loss of a record's answer behind a prompt."""
    answer = ids_of(record["messages"][1]["content"] + "<|im_end|>")
    batch = collator([record])  # for its image
    batch["input_ids"] = torch.cat([ids_of(prompt), answer], dim=1)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : -answer.shape[1]] = -100
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    with torch.no_grad():
        return trained(**batch).loss.item()


# %%
ways = {
    "as in training": templated,
    "no template": str,
    "Vicuna's": "USER: {} ASSISTANT:".format,
    "twice": lambda text: templated(templated(text)),
}
losses = {}
for name, way in ways.items():
    prompts = [way(record["messages"][0]["content"]) for record in asked]
    losses[name] = sum(map(loss_of_answer, asked, prompts)) / len(asked)
    marks = prompts[0].count("<|im_start|>")
    print(f"{name:<15} {marks} x <|im_start|>, loss {losses[name]:.2f}")

shifted = ids_of(asked[0]["messages"][1]["content"])[0] + 1
print("read with a vocabulary shifted by one:", repr(tokenizer.decode(shifted)))
assert 3 * losses["as in training"] < min(loss for name, loss in losses.items() if name != "as in training")

# %% [markdown] lang="en"
# Every other form makes right answers less likely, even the right template twice. **Fix:** hand over messages, never text that has been through a template; load the processor from the model's own folder. CLIP's tokenizer puts blanks between all letters (lesson 2).
#
# ## The loss stays on a shelf, or jumps
#
# On a **shelf** grammar is known, and the image hardly read (lesson 6); the loss falls slowly there. Three trainings on captions differ in the learning rate alone:

# %% [markdown] lang="zh"
# 换成别的形式，正确的回答都会变得更不可能，就连同一个模板套两遍也不行。**怎么修：** 传给程序的应该是消息，而不是已经套过模板的文本；处理器要从模型自己的文件夹加载。如果错用了 CLIP 的分词器，字母之间会全是空格（第 2 课）。
#
# ## 损失停在平台上，或者跳起来
#
# **平台**是语法已经学会、图还没怎么看懂的一段（第 6 课），那里损失降得很慢。下面用图片描述训练三次，只有学习率不同：

# %%
from train_llava.model.freeze import apply_train_type

write_records(FOLDER / "captions", "captions", "train", 96, seed=0)
captions = [*LlavaDataset(FOLDER / "captions")]


def new_model() -> torch.nn.Module:
    return apply_train_type(copy.deepcopy(built), "freeze_vision")


def new_optimizer(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=rate)


def run(model, optimizer, steps: range) -> list[float]:
    """The losses of some steps of 8 captions."""
    losses = []
    for step in steps:
        first = step * 8 % len(captions)
        loss = model(**collator(captions[first : first + 8])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


curves = {}
for rate in (2e-6, 2e-3, 1e-1):
    model = new_model()
    curves[rate] = run(model, new_optimizer(model, rate), range(24))

# %% tags=["figure"]
symptoms.rates(curves)

# %%
for rate, losses in curves.items():
    print(f"{rate:.0e}: from {losses[0]:.2f} to {losses[-1]:.2f}, at most {max(losses):.2f}")
assert curves[2e-3][-1] < curves[2e-6][-1] and max(curves[1e-1]) > 3 * curves[1e-1][0]

# %% [markdown] lang="en"
# Grey hardly moves: the rate is too low, or what should learn is frozen. Blue falls fast, then slowly: the shelf. Be patient. Orange has jumped: the rate is far too high. **Fix:** `--learning_rate`, `--warmup_steps`; see which parts are trained.
#
# ## NaN
#
# NaN means "not a number". fp16, a number of 16 bits, ends at 65,504. What is larger becomes infinite, and infinity minus infinity is NaN. bf16 has 16 bits, too, is coarser, and reaches as far as fp32:

# %% [markdown] lang="zh"
# 灰线几乎不动：学习率太低；该学的部件被冻结时，曲线也是这样。蓝线先陡降，然后慢下来，到了平台：这时要有耐心。橙线跳上去了：学习率高得离谱。**怎么修：** 调 `--learning_rate`、`--warmup_steps`；看每次训练开头打印的那张表，确认哪些部件在训练。
#
# ## NaN
#
# NaN 的意思是“不是数”。fp16（16 位浮点数）最大只能表示 65504，再大就成了无穷，无穷减无穷就是 NaN。bf16 也是 16 位，精度更低，但范围和 fp32 一样大：

# %%
for dtype in (torch.float16, torch.bfloat16):
    most, square = torch.finfo(dtype).max, torch.tensor(300, dtype=dtype) ** 2
    print(f"{dtype}: at most {most:.3g}, 300² {square}, 300² - 300² {square - square}")

# %% [markdown] lang="en"
# **Fix:** `--bf16 true`, a lower rate. A training here stops at the first NaN, and names the step and the records.
#
# ## Image tokens and features do not match
#
# Each image needs exactly as many `<image>` ids as it has vectors. Programs that count CLS write 577 for 576; old model folders do not say the patch size. Here one id is missing:

# %% [markdown] lang="zh"
# **怎么修：** 用 `--bf16 true`，或者降低学习率。本仓库的训练一遇到 NaN 就停下，并说明是第几步、哪几条数据。
#
# ## 图片词元和图片特征数量不一致
#
# 一张图片有多少个向量，就要有多少个 `<image>` 词元。忘了去掉 CLS，576 个向量就会写成 577 个词元；旧的模型文件夹里没写图块大小，也会数错。下面故意少放一个：

# %%
batch = collator([example])
first = (batch["input_ids"][0] == encoder.image_ids[0]).nonzero()[0].item()
others = [i for i in range(batch["input_ids"].shape[1]) if i != first]
for name in ("input_ids", "attention_mask", "labels"):
    batch[name] = batch[name][:, others]
try:
    built(**batch)
    raise AssertionError("not noticed")
except ValueError as error:
    print(error)

# %% [markdown] lang="en"
# The message counts tokens on one side and single numbers on the other: 16 vectors of 128 numbers are 2,048. **Fix:** load the processor with `train_llava.model.load`, which fills in what old folders leave out; do not cut conversations inside an image (`--model_max_length` here never does).
#
# ## It hangs
#
# With several GPUs, each step waits for all of them. If the batch of one GPU has no image, its projector gets no gradient, and the others wait for it for ever. **Fix:** here a batch without images gets a grey one, masked and without labels. The loss stays the same, and the gradient is there, all zeros:

# %% [markdown] lang="zh"
# 报错信息里，tokens 数的是词元，features 数的却是一个个数：16 个向量，每个 128 维，共 2048 个。**怎么修：** 用 `train_llava.model.load` 加载处理器，旧文件夹缺的信息它会补上；截断对话时不要截在图片中间（这里的 `--model_max_length` 不会）。
#
# ## 训练卡住不动
#
# 多卡训练时，每一步都要等所有卡。某张卡的批次里没有图片，它的投影层就没有梯度，别的卡却一直在等。**怎么修：** 本仓库会给没有图片的批次补一张灰图，用注意力掩码遮住，也不带标签。损失不变，梯度也有了，只是全为零：

# %%
turns = [{"role": role, "content": "Hello!"} for role in ("user", "assistant")]
without = collator([{"messages": turns, "images": []}])
added = without["input_ids"] == encoder.image_ids[0]
print("images:", len(without["pixel_values"]), "tokens:", added.sum().item())
assert (without["labels"][added] == -100).all()
assert not without["attention_mask"][added].any()
bare = {name: without[name][~added][None] for name in ("input_ids", "labels", "attention_mask")}
losses = []
for name, batch in {"no image": bare, "a grey one": without}.items():
    built.zero_grad()
    losses.append(built(**batch).loss)
    losses[-1].backward()
    gradient = built.model.multi_modal_projector.linear_1.weight.grad
    print(f"{name}: loss {losses[-1]:.4f}, gradient of the projector", gradient if gradient is None else "all zeros")
torch.testing.assert_close(*losses)
assert not gradient.any()

# %% [markdown] lang="en"
# ## An adapter without its projector
#
# `use_lora` trains the projector, too. If a program saves LoRA's matrices A and B alone, the adapter still loads, without a warning, and the projector is a random one:

# %% [markdown] lang="zh"
# ## 适配器里少了投影层
#
# `use_lora` 也训练投影层。如果程序只保存 LoRA 的 A、B 两种矩阵，适配器照样能加载，只是训练好的投影层换成了随机的，没有任何提示：

# %%
import json
import shutil

from safetensors.torch import load_file, save_file

HALF = FOLDER / "half_adapter"
shutil.copytree("demo/trained", HALF, dirs_exist_ok=True)
settings = json.loads((HALF / "adapter_config.json").read_text())
print("modules_to_save:", settings.pop("modules_to_save"))
(HALF / "adapter_config.json").write_text(json.dumps(settings))
tensors = load_file(HALF / "adapter_model.safetensors")
kept = {name: tensors[name] for name in tensors if "projector" not in name}
save_file(kept, HALF / "adapter_model.safetensors", metadata={"format": "pt"})

half = look(PeftModel.from_pretrained(copy.deepcopy(built), HALF).eval())
print(f"whole: {told(looks['trained'])}\nhalf:  {told(half)}")
assert half["loss_own_image"] > looks["trained"]["loss_own_image"]

# %% [markdown] lang="en"
# **Fix:** `modules_to_save` must name the projector. The base must be that of the training, too: `adapter_base.json` records it, and `train_llava.model.load` refuses another.
#
# ## Out of memory
#
# Estimated need of CLIP-L/336 with Qwen1.5-4B on one GPU at its peak: lesson 8's count, activations, and at the step fp32 gradients. Dotted: what a card has room for. Dashed: with gradient checkpointing, which computes activations twice instead of keeping them.

# %% [markdown] lang="zh"
# **怎么修：** `modules_to_save` 里要有投影层（本仓库默认就有）。基座也必须是训练时的那个：`adapter_base.json` 记着它，用 `train_llava.model.load` 加载时，基座不对会被拒绝。
#
# ## 显存不足
#
# 租卡之前先估算。图中是 CLIP-L/336 加 Qwen1.5-4B 在一张卡上的显存峰值的估计：第 8 课算的那些，加上激活值，更新时梯度还要再存一份 fp32；横轴是一个批次里的图片数。水平的点线是一张卡能放下的上限；虚线表示打开梯度检查点（gradient checkpointing）：不保存激活值，用到时再算一遍。

# %% tags=["figure"]
from train_llava.estimate import (
    EstimateModel,
    config_of,
    memory_budget,
    zero_config,
)
from train_llava.planning.memory import MemoryModel
from train_llava.planning.meta_model import meta_model
from train_llava.planning.workload import DEFAULT_TOKENS, Workload

CONFIGS = Path("benchmarks/full_size/configs")
names = ("vision_model_name_or_path", "language_model_name_or_path")
paths = dict(zip(names, (CONFIGS / "clip", CONFIGS / "qwen")))
config = config_of(EstimateModel(**paths))
sizes = [1, 2, 4, 8, 16, 32]
tokens = (DEFAULT_TOKENS, config.image_seq_length)
batches = [Workload.assumed(size, *tokens).batch for size in sizes]
needed = {}
for name in ("use_lora", "freeze_vision"):
    memory = MemoryModel.of(meta_model(config, torch.bfloat16, name))
    zero = zero_config("ZeRO-2", 1, config.text_config.hidden_size, name)
    ways = {"": False, ", gradient checkpointing": True}
    needed[name] = {way: [memory.peak(batch, zero, again) / 2**30 for batch in batches] for way, again in ways.items()}
cards = ("rtx4090-24g", "a100-80g")
room = {card: memory_budget(card) / 2**30 for card in cards}
symptoms.memory_over_batch(sizes, needed, room)

# %% [markdown] lang="en"
# **Fix,** in this order: a smaller `--per_device_train_batch_size` (`--global_batch_size` keeps the samples of a step), `--gradient_checkpointing true`, `use_lora`, `--load_in_4bit true`, more GPUs (lesson 8).
#
# ## What we see
#
# In the order of the sections above:
#
# | symptom | cause | look at | mend |
# |---|---|---|---|
# | same answer for all images | projector untrained; guessable data | `train_llava.evaluate` | `TRAIN_TYPE`, data |
# | loss 0 or NaN at once | all labels -100 | `train_llava.show_batch` | template, data |
# | does not stop | no end in the labels, another awaited | labels | `generation_config.json` |
# | garbled words, blanks | wrong tokenizer or template | the prompt as text | the model's own processor |
# | loss does not fall | frozen, low rate, shelf | the printed table of parts | `--learning_rate` |
# | NaN later | fp16, rate | the step it names | `--bf16 true` |
# | features do not match | patch size, CLS, a cut image | the message | `train_llava.model.load` |
# | hangs | a batch without images | `train_llava.check_data` | our collator |
# | bad when loaded | adapter without projector, other base | `modules_to_save` | `train_llava.model.load` |
# | out of memory | batch, activations | `train_llava.estimate` | the list above |
#
# ## Common questions
#
# **Bad answers, no error: where do I begin?** With the three losses. If the model does not look, check data, labels and projector; if it looks, prompt and end.
#
# **The loss is low, and answers are bad?** Ask a training record. If it fails, too, asking differs from training: prompt, template, adapter.

# %% [markdown] lang="zh"
# **怎么修，** 按这个顺序试：减小 `--per_device_train_batch_size`（用 `--global_batch_size` 保持每步的样本数不变）、`--gradient_checkpointing true`、改用 `use_lora`、`--load_in_4bit true`、加卡（第 8 课）。
#
# ## 我们看到
#
# 按上面各节的顺序：
#
# | 症状 | 原因 | 看哪里 | 怎么修 |
# |---|---|---|---|
# | 不管什么图，回答都一样 | 投影层没训练；数据靠猜就能答 | 三个损失：`train_llava.evaluate` | `TRAIN_TYPE`、数据 |
# | 第一步起损失就是 0 或 NaN | 标签全是 -100 | `train_llava.show_batch` | 模板、数据 |
# | 停不下来，不停重复 | 标签里没有结束符，或等的是别的结束符 | 标签 | `generation_config.json` |
# | 乱码、字母之间有空格 | 分词器不对，模板漏了或套了两遍 | 完整的提示词文本 | 用模型自己的处理器 |
# | 损失不降 | 被冻结、学习率太低；或还在平台上 | 训练开头打印的部件表 | `--learning_rate` |
# | 训练中途 NaN | fp16、学习率 | 报错里说的那一步 | `--bf16 true` |
# | 特征数量不一致 | 图块大小、CLS、图片被截断 | 报错信息 | `train_llava.model.load` |
# | 多卡训练卡住 | 某张卡的批次里没有图片 | `train_llava.check_data` 会数出这样的数据 | 本仓库的 `LlavaCollator` |
# | 训练时正常，加载后变差 | 适配器少了投影层，基座不对 | `modules_to_save` | `train_llava.model.load` |
# | 显存不足 | 批次、激活值 | `train_llava.estimate` | 上面那几个办法 |
#
# ## 常见问题
#
# **没有报错，回答就是不好，从哪里查起？** 先算三个损失。没看图，就查数据、标签和投影层；看了图，就查提示词和结束符。
#
# **损失很低，回答却不好？** 拿一条训练数据去问。连它也答不好，就是提问和训练时不一样：查提示词、模板、适配器。

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** Does the built, untrained model guess from the image or from the question? Compare its three losses.
#
# 🐕 **Middle.** Train with a rate that falls nearly to zero. Then go on: once with the old optimizer and its last rate, once with a new optimizer and the first rate. What does the loss do?
#
# 🦁 **Hard.** Shuffle the trained model's 16 image vectors before they reach the language model, with a hook like `blind`. Which of the three losses does this resemble? Where, then, does the model keep the place of a thing?

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 搭好但没训练的模型，靠的是图片还是问题在猜？比较它的三个损失。
#
# 🐕 **中等。** 让学习率逐步降到接近零，训练一段，然后续训两次：一次沿用原来的优化器和最后的学习率；一次换成新的优化器，学习率回到开头。损失有什么不同？
#
# 🦁 **困难。** 仿照 `blind` 写一个钩子，把训练好的模型的 16 个图片向量打乱顺序，再交给语言模型。损失更像三个损失中的哪一个？这说明模型把“东西在哪儿”记在了哪里？

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 From the question. Its own image serves no better than another's. A random projector makes noise of any image.

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 靠问题。用自己的图片并不比用别人的强：随机的投影层把什么图片都变成噪声。

# %% tags=["solution"]
print(told(looks["built, not trained"]))

# %% [markdown] lang="en"
# 🐕 With the weights alone it jumps: the rate is large again, and the new optimizer does not know how large gradients were. `--resume_from_checkpoint true` restores all.

# %% [markdown] lang="zh"
# 🐕 只留下权重，损失会跳上去：学习率又变大了，新的优化器也不知道以前的梯度有多大。`--resume_from_checkpoint true` 会全部恢复。

# %% tags=["solution"]
model = new_model()
optimizer = new_optimizer(model, 2e-3)
for step in range(24):
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 24)
    run(model, optimizer, range(step, step + 1))

remembered = copy.deepcopy(optimizer.state_dict())  # moments and rate
for name, state in {"all restored": remembered, "weights alone": None}.items():
    resumed = copy.deepcopy(model)
    optimizer = new_optimizer(resumed, 2e-3)
    if state:
        optimizer.load_state_dict(state)
    losses = run(resumed, optimizer, range(24, 32))
    print(f"{name:<14}", *(f"{loss:.2f}" for loss in losses))

# %% [markdown] lang="en"
# 🦁 The one with the own image, nearly. The tower adds its place to each patch (lesson 1), and the projector passes it on. The order helps, too.

# %% [markdown] lang="zh"
# 🦁 更像用自己图片的那个，但差了一点。位置主要记在每个向量里：视觉塔给每个图块加过位置向量（第 1 课），投影层把它传了下去。排列顺序也有用。

# %% tags=["solution"]
order = torch.randperm(16)


def shuffle(module, inputs, vectors):
    return vectors[..., order, :]


shuffled = copy.deepcopy(trained)
shuffled.get_base_model().model.multi_modal_projector.register_forward_hook(shuffle)
shuffled_look = look(shuffled)
print(f"in order: {told(looks['trained'])}\nshuffled: {told(shuffled_look)}")
assert shuffled_look["loss_own_image"] < shuffled_look["loss_grey_image"] / 3

# %% [markdown] lang="en"
# Next lesson: [scores and serving](11_scores.ipynb): how good is a model that has nothing wrong with it?

# %% [markdown] lang="zh"
# 下一课：[评估与部署](11_scores.ipynb)：模型没毛病了，那它到底有多好？
