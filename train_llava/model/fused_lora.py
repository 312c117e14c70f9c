"""LoRA with its matrix products alone, forward and backward. The adapters are PEFT's, and so are their files.

An adapted matrix gives y = x W' + b + s (x A') B' (Hu et al., arXiv:2106.09685, section 4.1; ' transposes). PEFT
computes the two halves apart, scales and adds them, and autograd does as much on the way back; each of these operations
reads and writes a whole activation. Here the second half is added by the product that makes it, scale included.

`forward` of peft.tuners.lora.Linear is replaced on each object (tests/test_hooks.py names what of it is read).
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear


class AdaptedProduct(torch.autograd.Function):
    """x (rows, in) -> x W' + b + scale (d A') B' (rows, out), where d (rows, in) is what a dropout leaves of x, or None
    for x itself; W (out, in) and b (out,) are frozen, A (rank, in) and B (out, rank) are trained.

    Kept for the backward pass: x or d, and d A' (rows, rank).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        read = x if dropped is None else dropped
        low = linear(read, a)
        ctx.save_for_backward(read, low, weight, a, b)
        ctx.scale, ctx.apart = scale, dropped is not None
        return linear(x, weight, bias).addmm_(low, b.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        read, low, weight, a, b = ctx.saved_tensors
        to_x, to_dropped, *_ = ctx.needs_input_grad
        scaled = {"beta": 0, "alpha": ctx.scale}  # beta 0: the first argument is not read
        at_low = torch.addmm(low, gradient, b, **scaled)
        of_b = torch.addmm(b, gradient.t(), low, **scaled)
        of_a = at_low.t() @ read
        of_x = gradient @ weight if to_x else None
        if ctx.apart:
            return of_x, at_low @ a if to_dropped else None, None, None, of_a, of_b, None
        return of_x if of_x is None else of_x.addmm_(at_low, a), None, None, None, of_a, of_b, None


def fuse_lora(model: nn.Module) -> None:
    """Changes a PEFT model in place: its adapted layers compute the same with fewer operations.

    Only layers of torch's own kind are changed, whose weights are all there: not those of 4 bits.
    """
    for layer in model.modules():
        if isinstance(layer, Linear) and type(layer.get_base_layer()) is nn.Linear:
            layer.forward = fused_forward(layer)


def fused_forward(layer: Linear) -> Any:
    """What takes the place of a layer's `forward`. It leaves to PEFT what is not one plain adapter in one dtype."""
    plain, base = layer.forward, layer.get_base_layer()

    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        names = layer.active_adapters
        if args or kwargs or layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
            return plain(x, *args, **kwargs)
        a, b = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
        mixed = torch.is_autocast_enabled(x.device.type) or len({x.dtype, base.weight.dtype, a.dtype, b.dtype}) > 1
        if mixed or layer.lora_variant or layer.lora_bias[names[0]]:
            return plain(x)
        rows, dropout = x.flatten(0, -2), layer.lora_dropout[names[0]]
        dropped = dropout(rows) if isinstance(dropout, nn.Dropout) and dropout.training else None
        product = AdaptedProduct.apply(rows, dropped, base.weight, base.bias, a, b, layer.scaling[names[0]])
        return product.unflatten(0, x.shape[:-1])

    return forward
