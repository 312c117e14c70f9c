"""Stand-ins for kernels that run on a GPU alone, so that a step can be counted on torch's meta device.

Each is one operation forward and one backward, which reads and writes what its kernel does, and computes nothing:

- attention: torch's fused one, which the meta device does not know
- RMSNorm, rotary embeddings, and the product inside a gated MLP: Liger's (liger_kernel 0.8.5, ops/rms_norm.py, rope.py
  and swiglu.py; Hsu et al., arXiv:2410.10989)
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# Families of docs/models.md whose layers Liger replaces (liger_kernel 0.8.5, transformers/monkey_patch.py)
LIGER = {"exaone4", "gemma", "gemma3_text", "glm4", "granite", "hunyuan_v1_dense", "llama", "mistral", "olmo2", "olmo3",
         "phi3", "qwen2", "qwen3", "smollm3"}  # fmt: skip


@torch.library.custom_op("train_llava::kernel", mutates_args=("writes",))
def kernel(name: str, flops: int, reads: list[Tensor], writes: list[Tensor]) -> None:
    """One kernel of any kind; only its fake, which does nothing, ever runs."""
    raise NotImplementedError(f"{name}: only counted, on the meta device")


@kernel.register_fake
def do_nothing(name: str, flops: int, reads: list[Tensor], writes: list[Tensor]) -> None:
    """The kernel on the meta device."""


@register_flop_formula(torch.ops.train_llava.kernel)
def flops_of_kernel(name: str, flops: int, *args, **kwargs) -> int:
    """What the kernel was told."""
    return flops


class OneKernel(torch.autograd.Function):
    """A kernel each way, (flops, again as many for the backward pass). The outputs are like some of the inputs. The
    backward pass reads their gradients, and what it keeps of inputs and outputs, counted in this order."""

    @staticmethod
    def forward(
        ctx: Any, name: str, flops: tuple[int, int], like: Sequence[int], keeps: Sequence[int], *inputs: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        outputs = [torch.empty_like(inputs[i]) for i in like]
        kernel(name, flops[0], [*inputs], outputs)
        every = [*inputs, *outputs]
        ctx.save_for_backward(*(every[i] for i in keeps))
        ctx.name, ctx.flops, ctx.layouts = name, flops[1], [(each.shape, each.stride()) for each in inputs]
        return outputs[0] if len(outputs) == 1 else (*outputs,)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        own = [
            torch.empty_strided(*layout, dtype=gradients[0].dtype, device="meta") if need else None
            for layout, need in zip(ctx.layouts, needed, strict=True)
        ]
        writes = [each for each in own if each is not None]
        kernel(f"{ctx.name}_backward", ctx.flops, [*gradients, *ctx.saved_tensors], writes)
        return None, None, None, None, *own


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
    """In place of torch's scaled_dot_product_attention, with (batch, heads, length, width) each.

    Two products of matrices forward, five backward; with a causal mask half of each (Dao, FlashAttention-2,
    arXiv:2307.08691, sections 3.1 and 4.1).
    """
    flops = 4 * query.numel() * key.shape[2] // (2 if kwargs.get("is_causal") else 1)
    mask = [] if attn_mask is None else [attn_mask]
    output = 3 + len(mask)
    return OneKernel.apply("attention", (flops, flops * 5 // 2), [0], [*range(output + 1)], query, key, value, *mask)


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """In place of torch's dropout, which is three kernels on all devices but a GPU."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """In place of an RMSNorm's forward pass."""
    return OneKernel.apply("rms_norm", (0, 0), [0], [0, 1], x, norm.weight)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    """In place of a family's apply_rotary_pos_emb."""
    return OneKernel.apply("rotary", (0, 0), [0, 1], [2, 3], query, key, cos, sin)


def gated_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """In place of the forward pass of Llama's MLP, or of Phi-3's, whose first two matrices are one."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    return mlp.down_proj(OneKernel.apply("gated", (0, 0), [0], [0, 1], gate, up))


@contextmanager
def replaced(place: Any, **functions: Callable) -> Iterator[None]:
    """Within this block a module has other functions, also where autograd recomputes (a TorchFunctionMode would not be
    on there)."""
    plain = {name: getattr(place, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(place, name, function)
        yield
    finally:
        for name, function in plain.items():
            setattr(place, name, function)


def like_on_gpu() -> AbstractContextManager:
    """Within this block attention and dropout are one kernel each way, as on a GPU."""
    return replaced(nn.functional, scaled_dot_product_attention=attention, dropout=dropout)


@contextmanager
def with_liger(llava: nn.Module) -> Iterator[None]:
    """Puts Liger's kernels into a language model, one that nobody uses afterwards, where Liger knows its family."""
    if llava.config.text_config.model_type not in LIGER:
        yield
        return
    language = llava.model.language_model
    for module in language.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
        elif hasattr(module, "down_proj"):
            module.forward = partial(gated_mlp, module)
    # the layers look this function up in their module, and there Liger replaces it, too
    with replaced(sys.modules[type(language).__module__], apply_rotary_pos_emb=rotate):
        yield
