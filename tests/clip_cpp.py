"""What llama.cpp's tools/mtmd does with a mmproj file, in torch: a reference made of the file's keys and tensors alone.

Read from clip.cpp (load_hparams, load_tensors), models/llava.cpp and mtmd-image.cpp, build 11434; the class token is in
front, as the mend of its issue 25814 has it.
"""

import torch
from gguf import GGUFReader, dequantize
from torch.nn import functional as F


class Mmproj:
    """Keys and tensors of a file; every tensor must be read."""

    def __init__(self, path):
        reader = GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {
            each.name: torch.tensor(dequantize(each.data, each.tensor_type)) for each in reader.tensors
        }  # an F32 tensor comes in its shape, row-major
        self.read = set()

    def __call__(self, name):
        self.read.add(name)
        return self.tensors[name]

    def linear(self, x, name):
        return F.linear(x, self(f"{name}.weight"), self(f"{name}.bias"))

    def norm(self, x, name):
        eps = self.keys["clip.vision.attention.layer_norm_epsilon"]
        return F.layer_norm(x, x.shape[-1:], self(f"{name}.weight"), self(f"{name}.bias"), eps)

    def activation(self, x):
        if self.keys["clip.use_gelu"]:
            return F.gelu(x, approximate="tanh")
        return x * torch.sigmoid(1.702 * x)

    def pixels(self, image):
        """An RGB Pillow image of the tower's size as (3, height, width)."""
        size = self.keys["clip.vision.image_size"]
        assert image.size == (size, size)
        values = torch.tensor(list(image.getdata())).T.reshape(3, size, size) / 255
        mean, std = (torch.tensor(self.keys[f"clip.vision.image_{name}"])[:, None, None] for name in ("mean", "std"))
        return (values - mean) / std

    def features(self, pixels):
        """(3, height, width) -> (patches, width of the language model)."""
        assert self.keys["clip.projector_type"] == "mlp"
        patch = self.keys["clip.vision.patch_size"]
        bias = self("v.patch_embd.bias") if "v.patch_embd.bias" in self.tensors else None
        x = F.conv2d(pixels[None], self("v.patch_embd.weight"), bias, stride=patch).flatten(2)[0].T
        cls = "v.class_embd" in self.tensors
        x = torch.cat([self("v.class_embd")[None], x]) if cls else x
        x = x + self("v.position_embd.weight")[: len(x)]
        x = self.norm(x, "v.pre_ln") if "v.pre_ln.weight" in self.tensors else x
        [deepest] = self.keys["clip.vision.feature_layer"]
        assert deepest <= self.keys["clip.vision.block_count"]
        for i in range(deepest):
            x = x + self.attention(self.norm(x, f"v.blk.{i}.ln1"), f"v.blk.{i}.attn")
            up = self.activation(self.linear(self.norm(x, f"v.blk.{i}.ln2"), f"v.blk.{i}.ffn_up"))
            x = x + self.linear(up, f"v.blk.{i}.ffn_down")
        assert not [name for name in self.tensors if "post_ln" in name]  # it would be applied
        x = F.gelu(self.linear(x[int(cls) :], "mm.0"), approximate="tanh")
        x = self.linear(x, "mm.2")
        assert x.shape[1] == self.keys["clip.vision.projection_dim"] and self.read == self.tensors.keys()
        return x

    def attention(self, x, name):
        heads = self.keys["clip.vision.attention.head_count"]
        q, k, v = (self.linear(x, f"{name}_{part}").unflatten(1, (heads, -1)).transpose(0, 1) for part in "qkv")
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.linear((scores @ v).transpose(0, 1).flatten(1), f"{name}_out")
