"""The fused LoRA against PEFT's own layers."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from train_llava.model.fused_lora import AdaptedProduct, fuse_lora

RANK, SCALE = 3, 1.5


def adapted(dropout=0.0, bias=True, dtype=torch.float64):
    """Two layers in a row, the first of which has an adapter: PEFT's, and the same with ours."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(6, 5, bias=bias), "second": nn.Linear(5, 4)})
    model.forward = lambda x: model["second"](model["first"](x))
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, lora_dropout=dropout, target_modules=["first"])
    plain = get_peft_model(model, config).to(dtype).train()
    nn.init.normal_(plain.base_model.model["first"].lora_B["default"].weight)
    ours = deepcopy(plain)
    fuse_lora(ours)
    return [each.base_model.model["first"] for each in (plain, ours)]


def passed(layer, x):
    """Output, and the gradients of input and adapter."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.arange(y.numel()).view_as(y)).sum().backward()
    return y, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(2, 7, 6), (7, 6)])
def test_output_and_gradients_equal_peft(shape, dropout, bias):
    plain, ours = adapted(dropout, bias)
    x = torch.randn(shape, dtype=torch.float64)
    for own, theirs in zip(passed(ours, x), passed(plain, x), strict=True):
        torch.testing.assert_close(own, theirs)
    assert plain.base_layer.weight.grad is None and ours.base_layer.weight.grad is None


@pytest.mark.parametrize("dropped", [False, True])
def test_gradcheck(dropped):
    sizes = [(7, 6), (7, 6), (5, 6), (5,), (RANK, 6), (5, RANK)]
    torch.manual_seed(0)
    x, d, weight, bias, a, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    weight, bias = weight.detach(), bias.detach()
    given = (x, d if dropped else None, weight, bias, a, b, SCALE)
    assert torch.autograd.gradcheck(AdaptedProduct.apply, given)
    assert torch.autograd.gradcheck(AdaptedProduct.apply, (x.detach(), *given[1:]))


def test_what_is_not_one_plain_adapter_is_left_to_peft():
    plain, ours = adapted()
    x = torch.randn(2, 6, dtype=torch.float64)
    used = []
    ours.base_layer.register_forward_hook(lambda *_: used.append(True))
    ours(x)
    assert not used
    for layer in (plain, ours):
        layer.enable_adapters(False)
    torch.testing.assert_close(ours(x), plain(x))
    for layer in (plain, ours):
        layer.enable_adapters(True)
        layer.merge()
    torch.testing.assert_close(ours(x), plain(x))
    assert len(used) == 2
    plain, ours = adapted(dtype=torch.float32)
    ours.base_layer.register_forward_hook(lambda *_: used.append(True))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x.float()), plain(x.float()))
    ours.lora_A.double(), plain.lora_A.double(), ours.lora_B.double(), plain.lora_B.double()
    torch.testing.assert_close(ours(x.float()), plain(x.float()))
    assert len(used) == 4


class Count(TorchDispatchMode):
    """Operations that are kernels on a GPU."""

    VIEWS = ("view", "t", "detach", "_unsafe_view", "transpose", "expand", "empty_like", "new_empty_strided", "select")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_a_pass_is_eight_operations():
    """Three matrix products forward and five backward, where PEFT has other operations in between."""
    x, found = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True), []
    for layer in adapted():
        with Count() as forward:
            y = layer(x)
        ones = torch.ones_like(y)
        with Count() as backward:
            torch.autograd.grad(y, [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight], ones)
        found.append((forward.names, backward.names))
    (plain, plain_back), (ours, ours_back) = found
    assert {*ours} | {*ours_back} == {"mm", "addmm", "addmm_"} and (len(ours), len(ours_back)) == (3, 5)
    assert len(plain) > 3 and len(plain_back) > 5, (plain, plain_back)
