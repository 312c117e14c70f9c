# %% [markdown] lang="en"
# # 1. How an image becomes vectors
#
# A language model reads a sequence of vectors, one for each token. A photo is a table of pixels. This lesson follows a photo to the point where it is a sequence of vectors, too. The sizes are those of CLIP-ViT-L/336, the vision tower of LLaVA-1.5; nothing is downloaded.
#
# ## What you will know
#
# - what the image processor does to a photo, and what gets lost there;
# - why one image is 576 vectors, and what the 577th is;
# - that the first layer of the vision tower is one matrix product, written as a convolution.

# %% [markdown] lang="zh"
# # 1. 图片怎样变成向量
#
# 语言模型读的是一串向量，每个词元一个；照片却是一张像素表。这一课跟着一张照片往前走，直到它也变成一串向量。所有尺寸都取自 CLIP-ViT-L/336，也就是 LLaVA-1.5 用的视觉塔；不需要下载任何东西。
#
# ## 你会学到
#
# - 图像处理器对照片做了什么，哪些内容在这一步就丢了；
# - 为什么一张图片是 576 个向量，第 577 个又是什么；
# - 视觉塔的第一层写成卷积，其实就是一次矩阵乘法。

# %% tags=["figure"]
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from tutorial import figures

photo = load_sample_images().images[0]  # scikit-learn brings two photos along
square = np.asarray(Image.fromarray(photo[:, 106:533]).resize((336, 336)))

shape = {"rows": 2, "height_ratios": [10, 1], "width_ratios": [1.5, 1]}
figure, axes = figures.panels(2, 5.2, **shape)
figures.draw(axes[0], photo, "a photo")
middle = figures.apart(square, 14, 4)
figures.draw(axes[1], middle, "its middle, cut into 24 x 24 patches")
for below in axes[2:]:
    below.remove()
strip = figure.add_subplot(axes[2].get_gridspec()[1, :])
one_row = figures.apart(square[126:140], 14, 4)
figures.draw(strip, one_row, "one row of them: 24 of the 576, read like words")
alt = "A photo, its middle as 24 x 24 patches, and one row of these patches"
figures.shown(figure, alt, "jpeg")

# %% [markdown] lang="en"
# ## From a photo to a square
#
# The tower has one input size: 336 × 336 pixels. CLIP's image processor gets there in three steps. It resizes the photo until its short side has 336 pixels, cuts the middle out, and normalises the colours: from each channel it takes the mean of CLIP's training images away, and divides by their standard deviation.

# %% [markdown] lang="zh"
# ## 从照片到正方形
#
# 视觉塔只有一种输入尺寸：336 × 336 像素。CLIP 的图像处理器分三步做到：先缩放，让短边等于 336；再裁出正中间的一块；最后做归一化，每个颜色通道减去 CLIP 训练图片的均值，再除以标准差。

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

figure, axes = figures.panels(4, 2.1, width_ratios=[1.5, 1.5, 1, 1])
steps = {"original": original, "resized": resized, "cropped": cropped}
for each, (name, image) in zip(axes, steps.items()):
    figures.draw(each, np.asarray(image), f"{name}: {image.width} x {image.height}")
figures.draw_frame(axes[1], left, 0, 336, 335)
figures.draw_numbers(axes[3], normalised[..., 0], "normalised: red channel", 2.5)
figure.colorbar(axes[3].images[0], ax=axes, fraction=0.012, pad=0.01)
alt = "The photo as it is, resized, cropped, and its red channel normalised"
figures.shown(figure, alt, "jpeg")

# %% [markdown] lang="en"
# There is no more to it: the cell of the figure writes the three steps out by hand, and gets the numbers of the processor.

# %% [markdown] lang="zh"
# 步骤就这么多：画上图的代码把三步手写了一遍，结果和图像处理器给出的数对得上。

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
# The tower reads patches of 14 × 14 pixels. 336 / 14 is 24, so there are 24 × 24 = 576 of them. One patch has 14 × 14 × 3 = 588 numbers. The patch embedding multiplies them with a matrix and gets 1,024 numbers: the vector of this patch. Each of the 1,024 is the sum of the 588, weighted by one filter. The filters here are random; CLIP's are learned, and have the same shape.

# %% [markdown] lang="zh"
# ## 从正方形到 576 个图块
#
# 视觉塔按 14 × 14 像素的图块（patch）来读图。336 / 14 = 24，所以一共 24 × 24 = 576 块，每块有 14 × 14 × 3 = 588 个数。图块嵌入（patch embedding）用一个矩阵乘这 588 个数，得到 1024 个数，这就是该图块的向量。1024 个数里的每一个，都是那 588 个数按某个滤波器（filter）加权求和的结果。这里的滤波器是随机的；CLIP 的滤波器是学出来的，形状一样。

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

figure, axes = figures.panels(4, 3.4, width_ratios=[2.4, 0.8, 0.8, 2.4])
figures.draw(axes[0], np.asarray(cropped), "24 x 24 patches")
figures.draw_grid(axes[0], 336, 14)
figures.draw_frame(axes[0], left, top, 14, 14)
tables = {"588 numbers": numbers, "x filter 0": weights[FILTER]}
for each, (title, table) in zip(axes[1:3], tables.items()):
    figures.draw_numbers(each, torch.cat(list(table)), title)
    for border in (13.5, 27.5):
        each.axhline(border, color=figures.INK, linewidth=1)
    each.set_ylabel("blue            green            red")
figures.draw_numbers(axes[3], vector.reshape(32, 32), "= 1 of 1,024 numbers")
figures.draw_frame(axes[3], 0, 0, 1, 1)
alt = "The grid, the 588 numbers of one patch, a filter, the patch's 1,024 numbers"
figures.shown(figure, alt, "jpeg")

# %% [markdown] lang="en"
# In code this layer is a convolution whose stride is as large as its filter: it never looks at two patches at once. Here is the same as a matrix product.

# %% [markdown] lang="zh"
# 代码里这一层是卷积，步长（stride）和滤波器一样大，所以从不跨两个图块。下面把它写成矩阵乘法，结果相同。

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
# A sequence has no rows and columns, and a patch does not know where it was. So the tower adds a vector of its own to each position, which is learned as well. In front of all patches it puts one more vector, CLS, which belongs to no patch: the layers above gather there what the whole image shows. That makes 577 positions. LLaVA drops CLS and hands 576 vectors on.

# %% [markdown] lang="zh"
# 序列里没有行和列，图块不知道自己原来在哪儿。所以视觉塔给每个位置加上一个位置向量，它也是学出来的。所有图块的最前面还放了一个向量 CLS，它不属于任何图块：后面的层用它汇总整张图片的内容。于是一共有 577 个位置。LLaVA 丢掉 CLS，只把 576 个向量往后传。

# %%
sequence = embeddings(pixels)
positions = embeddings.position_embedding.weight
assert torch.allclose(sequence[0, 1:], by_product[0] + positions[1:], atol=1e-4)
assert torch.equal(sequence[0, 0], embeddings.class_embedding + positions[0])

patches = (config.image_size // config.patch_size) ** 2
print(f"{patches} patches + CLS: {tuple(sequence.shape)}")
print(f"weights of the patch embedding: {convolution.weight.numel():,}")
print(f"weights of the positions:       {positions.numel():,}")

# %% [markdown] lang="en"
# ## What we see
#
# One filter gives one number for each patch, so 24 × 24 numbers: a small image again. Four of the 1,024:

# %% [markdown] lang="zh"
# ## 我们看到
#
# 一个滤波器给每个图块一个数，合起来是 24 × 24 个数，又是一张小图。1024 张里看四张：

# %% tags=["figure"]
figure, axes = figures.panels(5, 2.3)
figures.draw(axes[0], np.asarray(cropped), "336 x 336 pixels")
for i, each in enumerate(axes[1:]):
    filtered = by_convolution[0, :, i].reshape(24, 24)
    figures.draw_numbers(each, filtered, f"filter {i}: 24 x 24")
figures.shown(figure, "The photo, and what four filters make of it", "jpeg")

# %% [markdown] lang="en"
# Even random filters tell the temple from the sky. Three things follow:
#
# - **The image is still there, patch by patch.** Vector number 24 × row + column speaks of that place.
# - **Nothing smaller than a patch has a vector of its own.** All that stands inside a patch, such as a word in small print, shares its 1,024 numbers.
# - **What was cut away is gone.** The model will not see it, and nothing tells it so.

# %% [markdown] lang="zh"
# 即使是随机的滤波器，也分得出楼阁和天空。由此可以知道三件事：
#
# - **图片还在，一块对一块。** 第 24 × 行 + 列 个向量，说的就是那个位置。
# - **比图块更小的东西，没有自己的向量。** 图块里的一切（比如一个小号字的单词）只能共用这 1024 个数。
# - **裁掉的就没有了。** 模型看不到它，也没有任何信号告诉模型少了什么。

# %% [markdown] lang="en"
# ## Common questions
#
# **Why 336, and can I choose another size?** The table of positions has exactly 577 rows, one for each position at 336 pixels. Another size needs another tower, such as CLIP-ViT-L/14 at 224, or a table that is interpolated. This repository takes the size from the tower.
#
# **What if I normalise differently?** There is no error: the tower gets numbers that differ from those of its training, and nothing says so. This is why a checkpoint holds the image processor's settings, too.
#
# **My images are wide. Must the sides go?** No. `build_model --image_aspect_ratio pad` pads the photo to a square, as LLaVA-1.5 does. The third exercise shows what this costs.
#
# **Does a larger photo give more vectors?** No. Each image becomes 576 vectors, however large it is: it is resized first.

# %% [markdown] lang="zh"
# ## 常见问题
#
# **为什么是 336，能换别的尺寸吗？** 位置向量表正好 577 行，对应 336 像素时的每个位置。换尺寸就要换视觉塔（例如 224 像素的 CLIP-ViT-L/14），或者对这张表做插值。本仓库直接采用视觉塔自己的尺寸。
#
# **归一化的参数用错了会怎样？** 不会报错：视觉塔拿到的数值和训练时对不上，却没有任何提示。所以检查点里也存着图像处理器的参数。
#
# **我的图片很宽，两边一定要裁掉吗？** 不一定。`build_model --image_aspect_ratio pad` 会像 LLaVA-1.5 那样先补成正方形。代价是什么，看第三个练习。
#
# **照片越大，向量越多吗？** 不是。图片总是先缩放，再大也是 576 个向量。

# %% [markdown] lang="en"
# ## Exercises
#
# 🐢 **Easy.** How many patches, and how many positions with CLS, has a CLIP with images of 224 pixels and patches of 14? And one with patches of 32?
#
# 🐕 **Middle.** Shuffle the patches of the photo. What happens to the vectors before the positions are added?
#
# 🦁 **Hard.** Pad the photo to a square instead of cropping it. How many of the 576 patches show hardly anything but padding?

# %% [markdown] lang="zh"
# ## 练习
#
# 🐢 **简单。** 一个 CLIP 的图片是 224 像素，图块是 14 像素：有多少个图块？加上 CLS 有多少个位置？图块换成 32 像素呢？
#
# 🐕 **中等。** 把照片的图块打乱。加上位置向量之前，各个向量会怎么变？
#
# 🦁 **困难。** 不裁剪，改为把照片补成正方形。576 个图块里，有多少个几乎只有填充？

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
# 🐕 They are shuffled in the same way, and are otherwise the same. Without the vectors of positions, the tower could not tell the photo from a puzzle.

# %% [markdown] lang="zh"
# 🐕 向量按同样的顺序打乱，数值一个都没变。没有位置向量，视觉塔分不清照片和拼图。

# %% tags=["solution"]
order = torch.randperm(576)
shuffled = rows[:, order].transpose(1, 2)
puzzle = torch.nn.functional.fold(shuffled, 336, kernel_size=14, stride=14)
again = convolution(puzzle).flatten(2).transpose(1, 2)
assert torch.allclose(again, by_convolution[:, order], atol=1e-4)
print("the same vectors in another order")

# %% [markdown] lang="en"
# 🦁 The photo is 1.5 times as wide as it is high, so a third of the square is padding: 8 of 24 rows. Those vectors cost as much to compute as all others.

# %% [markdown] lang="zh"
# 🦁 照片的宽是高的 1.5 倍，所以正方形的三分之一是填充：24 行里占 8 行。这些向量的计算量和别的向量一样。

# %% tags=["solution"]
from train_llava.processing.padding import pad_and_resize

pink = (255, 0, 255)
padded = pad_and_resize(original, (336, 336), Image.Resampling.BICUBIC, pink)
padded = np.asarray(padded)
is_pink = (padded == pink).all(-1)
empty = is_pink.reshape(24, 14, 24, 14).mean((1, 3)) > 0.9  # the border is blurred
print(f"{empty.sum()} of 576 patches, {empty.mean():.0%}")
both = {"cropped": np.asarray(cropped), "padded": padded}
figures.photos(both, "The photo cropped, and padded")

# %% [markdown] lang="en"
# Next lesson: [how text becomes vectors, and where the image goes](02_text.ipynb).

# %% [markdown] lang="zh"
# 下一课：[文字怎样变成向量，图片放在哪里](02_text.ipynb)。
