"""The floating point operations that a training step needs, and those that a GPU could do: FLOPs utilisation (MFU)."""

from dataclasses import dataclass
from itertools import accumulate
from operator import or_

import torch
from torch import nn

from train_llava.model.load import gpu
from train_llava.model.loss import after_last_attention
from train_llava.model.structure import (
    HEAD,
    LANGUAGE,
    PROJECTOR,
    VISION,
    component_of,
    llava_in,
    patches_per_image,
    positions_per_image,
    unused_vision_layers,
    used_vision_layers,
)

# Dense bf16 operations per second (NVIDIA's data sheets, without sparsity); the first whose words are in a GPU's name
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
         "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "A6000": 155e12, "RTX 4090": 165e12}  # fmt: skip


def peak_flops() -> float | None:
    """Operations per second of this rank's GPU in bf16; None for a GPU that is not in PEAKS, and on a CPU."""
    name = torch.cuda.get_device_name() if gpu() == "cuda" else ""
    return next((peak for word, peak in PEAKS.items() if word in name), None)


@dataclass
class StepFlops:
    """The FLOPs that a training step cannot do without, given what is trained.

    A matrix of m x n costs 2mn per position forward, as much again for the gradient of its input where something below
    it is trained, and as much again for its own gradient where it is trained itself (Kaplan et al., arXiv:2001.08361,
    section 2.1, told apart by what is frozen). Attention costs 4 x length x width per position and layer forward,
    and twice that backward (Chowdhery et al., arXiv:2204.02311, appendix B); the head, and what the last layer does
    behind its attention, run at answers alone. Layers of the tower that LLaVA does not read, norms and activations are
    not counted, nor is recomputation.
    """

    per_image: float  # of tower and projector
    per_token: float  # of the language model's matrices
    per_token_pair: float  # of its attention
    per_answer_token: float  # of the last layer behind its attention, and of the head

    def of(self, images: int, tokens: int, token_pairs: int, answer_tokens: int) -> float:
        """FLOPs of a batch; `token_pairs` is the sum of the squares of the conversations' lengths."""
        language = tokens * self.per_token + token_pairs * self.per_token_pair
        return images * self.per_image + language + answer_tokens * self.per_answer_token

    @classmethod
    def count(cls, model: nn.Module) -> "StepFlops":
        """Of a model whose parts are frozen as they will be in training, adapters included."""
        llava = llava_in(model)
        skipped = {id(module) for layer in unused_vision_layers(llava) for module in layer.modules()}
        late = {id(each) for part in after_last_attention(llava) for each in (*part.modules(), *part.parameters())}

        def place(name: str, of: nn.Module | nn.Parameter) -> str:
            return LATE if id(of) in late else component_of(name)

        forward, own = dict.fromkeys(PLACES, 0.0), dict.fromkeys(PLACES, 0.0)
        trained = dict.fromkeys(PLACES, False)
        for name, parameter in model.named_parameters():
            trained[place(name, parameter)] |= parameter.requires_grad
        for name, module in model.named_modules():
            if id(module) in skipped or "original_module" in name or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            # of the layer's shape: ZeRO-3 leaves no weight in place, and one of 4 bits is packed
            size = module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
            forward[place(name, module)] += 2 * size
            own[place(name, module)] += 2 * size * any(p.requires_grad for p in module.parameters(recurse=False))

        vision, text = llava.config.vision_config, llava.config.text_config
        patches, layers = patches_per_image(vision), len(used_vision_layers(llava))
        attention = 4 * positions_per_image(vision) ** 2 * vision.hidden_size * layers
        below = dict(zip(PLACES, accumulate(trained.values(), or_), strict=True))  # whether a gradient goes through
        cost = {place: forward[place] * (1 + below[place]) + own[place] for place in PLACES}
        width = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        return cls(
            per_image=cost[VISION] * patches + attention * (1 + 2 * trained[VISION]) + cost[PROJECTOR] * patches,
            per_token=cost[LANGUAGE],
            per_token_pair=4 * width * text.num_hidden_layers * (1 + 2 * below[LANGUAGE]),
            per_answer_token=cost[LATE] + cost[HEAD],
        )


LATE = "last layer behind its attention"
PLACES = (VISION, PROJECTOR, LANGUAGE, LATE, HEAD)  # in the order in which an image passes them
