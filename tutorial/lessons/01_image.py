# %% [markdown] lang="en"
# # 1. How an image becomes vectors
#
# A language model reads a sequence of vectors, one for each token (a word or a piece of one). A photo is a table of pixels. This lesson follows a photo to the point where it is a sequence of vectors, too. The sizes are those of CLIP-ViT-L/336, the vision tower of LLaVA-1.5; nothing is downloaded.
#
# ## What you will know
#
# - what the image processor does to a photo, and what gets lost there;
# - why one image is 576 vectors, and what one vector more, the 577th, is;
# - that the first layer of the vision tower is one matrix product, written as a convolution;
# - which layer of the tower LLaVA reads, and what CLS is for.

# %% [markdown] lang="zh"
# # 1. 图片怎样变成向量
#
# 语言模型读的是一串向量，每个词元（一个词或词的一部分）一个；照片却是一张像素表。这一课跟着一张照片往前走，直到它也变成一串向量。所有尺寸都取自 CLIP-ViT-L/336，也就是 LLaVA-1.5 用的视觉塔；不需要下载任何东西。
#
# ## 你会学到
#
# - 图像处理器对照片做了什么，哪些内容在这一步就丢了；
# - 为什么一张图片是 576 个向量，第 577 个又是什么；
# - 视觉塔的第一层写成卷积，其实就是一次矩阵乘法；
# - LLaVA 读视觉塔的哪一层，CLS 又有什么用。

# %% tags=["figure"]
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from tutorial.figures import canvas, patches

photo = load_sample_images().images[0]  # scikit-learn brings two photos along
square = np.asarray(Image.fromarray(photo[:, 106:533]).resize((336, 336)))

patches.photo_in_patches(photo, square)

# %% [markdown] lang="en"
# ## From a photo to a square
#
# The tower has one input size: 336 × 336 pixels. CLIP's **image processor** gets there in three steps. It resizes the photo until its short side has 336 pixels. It crops: it keeps the square in the middle. And it normalises the colours: it brings them to numbers from 0 to 1, subtracts from each channel (red, green, blue) the mean of CLIP's training images, and divides by their standard deviation.

# %% [markdown] lang="zh"
# ## 从照片到正方形
#
# 视觉塔只有一种输入尺寸：336 × 336 像素。CLIP 的**图像处理器**（image processor）分三步做到：先缩放，让短边等于 336 像素；再裁剪，只留正中间的正方形；最后做归一化：把颜色换成 0 到 1 的数，红、绿、蓝每个通道减去 CLIP 训练图片的均值，再除以标准差。

# %% tags=["figure"]
from transformers.models.auto.image_processing_auto import AutoImageProcessor

CLIP = "benchmarks/full_size/configs/clip"  # of CLIP-ViT-L/336; configs alone
processor = AutoImageProcessor.from_pretrained(CLIP)

original = Image.fromarray(photo)
scale = 336 / min(original.size)
size = [int(side * scale) for side in original.size]
resized = original.resize(size, Image.Resampling.BICUBIC)
left = (resized.width - 336) // 2
cropped = resized.crop((left, 0, left + 336, 336))
normalised = np.asarray(cropped) / 255  # from 0 to 1
normalised = (normalised - processor.image_mean) / processor.image_std

steps = {"original": original, "resized": resized, "cropped": cropped}
patches.to_a_square(steps, left, normalised)

# %% [markdown] lang="en"
# That is all: unfold the cell above the figure to see the three steps written out by hand. The next cell asks the processor itself, and gets the same numbers.

# %% [markdown] lang="zh"
# 步骤就这么多：展开图上方的代码，能看到手写的三步。下面再让图像处理器自己来算，得到的数一样。

# %%
import torch

pixels = processor(original, return_tensors="pt").pixel_values
by_hand = torch.tensor(normalised, dtype=torch.float32)
by_hand = by_hand.permute(2, 0, 1)[None]  # batch, channel, row, column
assert torch.allclose(pixels, by_hand, atol=1e-5)
print("shape:", tuple(pixels.shape))
print(f"from {pixels.min():.2f} to {pixels.max():.2f}")
print(f"cut away: {1 - 336 / resized.width:.0%} of the resized photo")

# %% [markdown] lang="en"
# ## From a square to 576 patches
#
# The tower reads patches of 14 × 14 pixels. 336 / 14 is 24, so there are 24 × 24 = 576 of them. One patch has 14 × 14 × 3 = 588 numbers. The **patch embedding**, the tower's first layer, multiplies them with a matrix and gets 1,024 numbers: the vector of this patch. Each of the 1,024 is the sum of the 588, weighted by one **filter**, which is 588 weights. The filters here are random; CLIP's are learned, and have the same shape.

# %% [markdown] lang="zh"
# ## 从正方形到 576 个图块
#
# 视觉塔按 14 × 14 像素的图块（patch）来读图。336 / 14 = 24，所以一共 24 × 24 = 576 块，每块有 14 × 14 × 3 = 588 个数。视觉塔的第一层是**图块嵌入**（patch embedding）：用一个矩阵乘这 588 个数，得到 1024 个数，这就是该图块的向量。1024 个数里的每一个，都是那 588 个数按某个**滤波器**（filter）加权求和的结果，一个滤波器就是 588 个权重。这里的滤波器是随机的；CLIP 的滤波器是学出来的，形状一样。

# %% tags=["figure"]
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

torch.manual_seed(0)
config = CLIPVisionConfig.from_pretrained(CLIP)
embeddings = CLIPVisionEmbeddings(config)  # this layer alone; random weights
embeddings.requires_grad_(False)

ROW, COLUMN, FILTER = 6, 11, 0  # of the patch and the filter that are shown
top, left = ROW * 14, COLUMN * 14
numbers = pixels[0, :, top : top + 14, left : left + 14]
weights = embeddings.patch_embedding.weight
vector = torch.einsum("fcyx,cyx->f", weights, numbers)

tables = {"588 numbers": numbers, "x filter 0": weights[FILTER]}
patches.embedding(cropped, left, top, tables, vector)

# %% [markdown] lang="en"
# In code this layer is a convolution: it moves its filters over the image. The step from one place to the next, the stride, is 14 pixels, as wide as a filter, so a filter never looks at two patches at once. Here is the same as a matrix product: one row for each patch, one column for each filter.

# %% [markdown] lang="zh"
# 代码里这一层是卷积：滤波器在图片上一步步移动。每步移动 14 个像素（步长，stride），正好等于滤波器的宽度，所以滤波器从不跨两个图块。下面把它写成矩阵乘法，一行一个图块，一列一个滤波器，结果相同。

# %%
convolution = embeddings.patch_embedding
print(convolution)

# batch, patch, width
by_convolution = convolution(pixels).flatten(2).transpose(1, 2)
rows = torch.nn.functional.unfold(pixels, kernel_size=14, stride=14).transpose(1, 2)
matrix = convolution.weight.flatten(1).T
by_product = rows @ matrix

assert torch.allclose(by_convolution, by_product, atol=1e-4)
assert torch.allclose(by_convolution[0, ROW * 24 + COLUMN], vector, atol=1e-4)
print(*(tuple(each.shape) for each in (rows, matrix, by_product)))

# %% [markdown] lang="en"
# A sequence has no rows and columns, and a patch's vector does not say where the patch was. So the tower has one more vector for each position, also learned, and adds it to the patch's vector there. In front of all patches it puts one more vector, **CLS**, which belongs to no patch: the layers above gather there what the whole image shows. That makes 577 positions. LLaVA drops CLS in the end and hands 576 vectors on. (Try it: [patches](../interactive/patches.html).)

# %% [markdown] lang="zh"
# 序列里没有行和列，图块的向量也不说明图块原来在哪儿。所以视觉塔为每个位置另学一个位置向量，加到那里的图块向量上。所有图块的最前面还放了一个向量 **CLS**，它不属于任何图块：后面的层用它汇总整张图片的内容。于是一共有 577 个位置。LLaVA 最后丢掉 CLS，只把 576 个向量往后传。（动手试试：[图块](../interactive/patches.html)。）

# %%
sequence = embeddings(pixels)
positions = embeddings.position_embedding.weight
assert torch.allclose(sequence[0, 1:], by_product[0] + positions[1:], atol=1e-4)
assert torch.equal(sequence[0, 0], embeddings.class_embedding + positions[0])

count = (config.image_size // config.patch_size) ** 2
print(f"{count} patches + CLS: {tuple(sequence.shape)}")
print(f"weights of the patch embedding: {convolution.weight.numel():,}")
print(f"weights of the positions:       {positions.numel():,}")

# %% [markdown] lang="en"
# ## Which layer to read, and what CLS is for
#
# Each later layer takes the 577 vectors and gives 577 new ones. Layer −1 is the last, layer −2 the one before it. The vectors of which layer should the language model get? Only a trained tower can tell. So we take the demo's: 4 layers, 16 patches of 28 × 28 pixels, trained as every CLIP is: to find the caption of an image among the captions of many.
#
# For that, CLIP compares one vector of the image with one of the caption. The image's is CLS of the last layer: CLS is there to sum up the whole image. Nothing in CLIP reads the patches of the last layer, so no training has ever asked what is in them. The patches of layer −2 are read: the last layer fills CLS from them. That speaks for layer −2. LLaVA takes it, as its authors suppose that it keeps more local detail.
#
# How much does the choice matter? We measure it with a **linear probe**: one matrix that reads from a vector which thing is at the top left of the image. One probe reads the kind (one of 16), another the colour (one of 8). Both are fitted to training images, and then asked about held-out ones: handwriting, and pairs of shape and colour, that neither the probes nor the tower have seen. What one matrix can read, the projector can read, too. First we collect the vectors:

# %% [markdown] lang="zh"
# ## 读哪一层，CLS 又有什么用
#
# 后面的每一层都读入 577 个向量，输出 577 个新的向量。第 −1 层是最后一层，第 −2 层是倒数第二层。该把哪一层交给语言模型？这要看训练好的视觉塔才知道。我们用演示模型的视觉塔：4 层，16 个 28 × 28 像素的图块。它和所有 CLIP 一样，学的是从许多句描述里找出配这张图片的那一句。
#
# 为此，CLIP 拿图片的一个向量和描述的一个向量作比较。图片的这个向量，就是最后一层的 CLS：CLS 的用处是概括整张图片。最后一层的图块向量，CLIP 里没有任何部分会读，所以训练从来没有要求过它们记录什么。第 −2 层的图块向量则有人读：最后一层要从中汇总出 CLS。这是取第 −2 层的一个理由。LLaVA 取的正是它，作者给的理由不同：他们推测这一层保留了更多局部细节。
#
# 选哪一层，差别有多大？我们用**线性探针**（linear probe）来量：只用一个矩阵，从一个向量里读出图片左上角是什么东西。一个探针读种类（16 选 1），另一个读颜色（8 选 1）。它们在训练图片上拟合，再用测试集的图片来考：那里的手写样本，以及形状和颜色的搭配，探针和视觉塔都没见过。一个矩阵读得出来的，投影层也读得出来。先收集向量：

# %%
from transformers import CLIPModel

from demo.scenes import COLOURS, draw, random_scene
from tutorial.figures import bars
from tutorial.tools.quiet import quiet

quiet()
clip = CLIPModel.from_pretrained("demo/clip").eval()
demo_processor = AutoImageProcessor.from_pretrained("demo/clip")


@torch.no_grad()
def look(split: str, count: int, seed: int):
    """Of images with a thing at the top left: vectors, by where they come from, and the thing's kind and colour."""
    rng = np.random.default_rng(seed)
    scenes = [scene for scene in (random_scene(rng, split) for _ in range(count)) if scene[0].place == 0]
    images = [draw(scene, rng, split) for scene in scenes]
    tower_pixels = demo_processor(images, return_tensors="pt").pixel_values
    out = clip.vision_model(tower_pixels, output_hidden_states=True)
    # what CLIP compares with captions comes from CLS of the last layer alone
    assert torch.equal(out.pooler_output, clip.vision_model.post_layernorm(out.hidden_states[-1][:, 0]))

    here = torch.arange(len(scenes)), torch.tensor([1 + scene[0].patch for scene in scenes])  # CLS comes first
    vectors = {
        "patch, layer -2": out.hidden_states[-2][here],
        "patch, layer -1": out.hidden_states[-1][here],
        "CLS, layer -1": out.hidden_states[-1][:, 0],
    }
    kinds = [scene[0].kind for scene in scenes]
    colours = [list(COLOURS).index(scene[0].colour) for scene in scenes]
    return vectors, {"kind": torch.tensor(kinds), "colour": torch.tensor(colours)}


# %% [markdown] lang="en"
# Now the probes, fitted by least squares. Each gives every possible answer a number; the largest one counts.

# %% [markdown] lang="zh"
# 再用最小二乘法拟合探针。它给每个可能的答案一个数，最大的那个就是它的回答。


# %%
def with_bias(table):
    return torch.cat([table, torch.ones(len(table), 1)], dim=1)


def probe(known, answers, asked, right) -> float:
    """Fits a matrix that shall give the right answer 1 and all others 0; returns how often it is right, in percent."""
    wanted = torch.nn.functional.one_hot(answers).float()
    fitted = torch.linalg.lstsq(with_bias(known), wanted).solution
    guessed = (with_bias(asked) @ fitted).argmax(1)
    return 100 * (guessed == right).float().mean().item()


(known, answers), (asked, right) = look("train", 2000, seed=0), look("held_out", 600, seed=1)
found = {name: {each: probe(known[name], answers[each], asked[name], right[each]) for each in right} for name in known}
for name, percents in found.items():
    print(f"{name:<16}", *(f"{each} {percent:5.1f}%" for each, percent in percents.items()))
alt = "How often a matrix reads kind and colour of a thing from its patch in layers -2 and -1, and from CLS"
bars.grouped(found, "right, percent", alt, 100)

# %% [markdown] lang="en"
# Guessing would be right once in 16 for the kind, and once in 8 for the colour. Compare the two layers of patches. Here they are nearly equal: which is ahead, and by how much, depends on the tower and its training. [LLaVA's authors](https://arxiv.org/abs/2304.08485) measured it, too: on ScienceQA layer −2 was about one percentage point ahead. The choice is a setting, `vision_feature_layer`.
#
# CLS is another matter: it is one vector for all things in the image together, and it holds what CLIP needs to find a caption. A patch has a vector to itself. The language model must answer questions about any place of the image, so LLaVA hands it all patches, and drops CLS.

# %% [markdown] lang="zh"
# 瞎猜的话，种类 16 次猜对 1 次，颜色 8 次猜对 1 次。先比较图块的两层：这里几乎一样；哪层领先、领先多少，要看视觉塔和它的训练。[LLaVA 的作者](https://arxiv.org/abs/2304.08485)也量过：在 ScienceQA 上，第 −2 层领先大约一个百分点。读哪一层是一项配置，叫 `vision_feature_layer`。
#
# CLS 是另一回事：图里所有的东西共用这一个向量，里面装的是 CLIP 配描述要用的内容。图块则各有各的向量。语言模型要回答的问题可能涉及图中任何一处，所以 LLaVA 把所有图块都交给它，丢掉 CLS。

# %% [markdown] lang="en"
# ## What we see
#
# Back to the photo and the first layer. One filter gives one number for each patch, so 24 × 24 numbers: a small image again. Here are four of the 1,024:

# %% [markdown] lang="zh"
# ## 我们看到
#
# 回到照片和第一层。一个滤波器给每个图块一个数，合起来是 24 × 24 个数，又是一张小图。1024 张里看四张：

# %% tags=["figure"]
filtered = [by_convolution[0, :, i].reshape(24, 24) for i in range(4)]
patches.filters(cropped, filtered)

# %% [markdown] lang="en"
# Even random filters tell the temple from the sky. What this lesson says, in three points:
#
# - **The image is still there, patch by patch.** Vector number 24 × row + column, counted from 0, comes from that place.
# - **Nothing smaller than a patch has a vector of its own.** All that stands inside a patch, such as a word in small print, shares its 1,024 numbers.
# - **What was cut away is gone.** The model will not see it, and nothing tells it so.

# %% [markdown] lang="zh"
# 即使是随机的滤波器，也分得出楼阁和天空。这一课告诉我们三件事：
#
# - **图片还在，一块对一块。** 从 0 数起，第 24 × 行 + 列 个向量，说的就是那个位置。
# - **比图块更小的东西，没有自己的向量。** 图块里的一切（比如一个小号字的单词）只能共用这 1024 个数。
# - **裁掉的就没有了。** 模型看不到它，也没有任何信号告诉模型少了什么。

# %% [markdown] lang="en"
# ## Common questions
#
# **Why 336, and can I choose another size?** The table of positions has exactly 577 rows, one for each position at 336 pixels. Another size needs another tower, such as CLIP-ViT-L/14 for 224 pixels, or a table with interpolated positions. This repository takes the size from the tower.
#
# **What if I normalise differently?** There is no error: the tower gets numbers that differ from those of its training, and nothing says so. This is why a saved model holds the image processor's settings, too.
#
# **My images are wide. Must the sides go?** No. `build_model --image_aspect_ratio pad` pads them to squares, as LLaVA-1.5 does. The third exercise shows what this costs.
#
# **Does a larger photo give more vectors?** No. Each image becomes 576 vectors, however large it is: it is resized first.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **为什么是 336，能换别的尺寸吗？** 位置向量表正好 577 行，对应 336 像素时的每个位置。换尺寸就要换视觉塔（例如 224 像素的 CLIP-ViT-L/14），或者对这张表做插值。本仓库直接采用视觉塔自己的尺寸。
#
# **归一化的参数用错了会怎样？** 不会报错：视觉塔拿到的数值和训练时对不上，却没有任何提示。所以保存模型时，图像处理器的参数也一起存着。
#
# **我的图片很宽，两边一定要裁掉吗？** 不一定。`build_model --image_aspect_ratio pad` 会像 LLaVA-1.5 那样先补成正方形。代价是什么，看第三个练习。
#
# **照片越大，向量越多吗？** 不是。图片总是先缩放，再大也是 576 个向量。

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** A CLIP takes images of 224 × 224 pixels, in patches of 14 × 14. How many patches are there, and how many positions with CLS? And with patches of 32 × 32?
#
# 🐕 **Middle.** Shuffle the patches of the photo. What happens to their vectors, before the positions are added? (`torch.nn.functional.fold` undoes `unfold`.)
#
# 🦁 **Hard.** Pad the photo to a square instead of cropping it: put it in the middle of a square of one colour, and resize that to 336 × 336. How many of the 576 patches show over 90% padding?

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 某个 CLIP 读 224 × 224 像素的图片，图块是 14 × 14：有多少个图块？加上 CLS 有多少个位置？图块换成 32 × 32 呢？
#
# 🐕 **中等。** 把照片的图块打乱。加上位置向量之前，各个向量会怎么变？（`torch.nn.functional.fold` 是 `unfold` 的逆操作。）
#
# 🦁 **困难。** 不裁剪，改为把照片补成正方形：放到一个纯色正方形的中间，再缩放到 336 × 336。576 个图块里，有多少个九成以上是填充？

# %% [markdown] lang="en"
# ## Solutions
#
# 🐢 256 patches and 257 positions; 49 and 50.

# %% [markdown] lang="zh"
# ## 答案
#
# 🐢 256 个图块，257 个位置；49 和 50。

# %% tags=["solution"]
for size in (14, 32):
    count = (224 // size) ** 2
    print(f"patches of {size}: {count}, with CLS {count + 1}")

# %% [markdown] lang="en"
# 🐕 They are shuffled in the same way, and are otherwise the same. Without the vectors of the positions, the tower could not tell the photo from its shuffled patches.

# %% [markdown] lang="zh"
# 🐕 向量按同样的顺序打乱，数值一个都没变。没有位置向量，视觉塔就分不清照片和打乱之后的图。

# %% tags=["solution"]
order = torch.randperm(576)
shuffled = rows[:, order].transpose(1, 2)
puzzle = torch.nn.functional.fold(shuffled, 336, kernel_size=14, stride=14)
again = convolution(puzzle).flatten(2).transpose(1, 2)
assert torch.allclose(again, by_convolution[:, order], atol=1e-4)
print("the same vectors in another order")

# %% [markdown] lang="en"
# 🦁 The photo is 1.5 times as wide as it is high, so a third of the square is padding: 8 of 24 rows, or 192 patches. Each costs as much to compute as any other.

# %% [markdown] lang="zh"
# 🦁 照片的宽是高的 1.5 倍，所以正方形的三分之一是填充：24 行里占 8 行，共 192 块。它们的计算量和别的一样。

# %% tags=["solution"]
from train_llava.processing.padding import pad_and_resize

pink = (255, 0, 255)
padded = pad_and_resize(original, (336, 336), Image.Resampling.BICUBIC, pink)
padded = np.asarray(padded)
is_pink = (padded == pink).all(-1)
empty = is_pink.reshape(24, 14, 24, 14).mean((1, 3)) > 0.9  # the border is blurred
print(f"{empty.sum()} of 576 patches, {empty.mean():.0%}")
both = {"cropped": np.asarray(cropped), "padded": padded}
canvas.photos(both, "The photo cropped, and padded")

# %% [markdown] lang="en"
# Next lesson: [how text becomes vectors, and where the image goes](02_text.ipynb).

# %% [markdown] lang="zh"
# 下一课：[文字怎样变成向量，图片放在哪里](02_text.ipynb)。
