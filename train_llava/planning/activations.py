"""The activations that each layer saves for its backward pass: a formula for each kind of layer.

After the method of Korthikanti et al. (arXiv:2205.05198, section 4), with the layers of Llama, Qwen2, CLIP and SigLIP
under SDPA attention (transformers 5.23, models/*/modeling_*.py) in place of GPT's, and told apart by what is frozen: a
product keeps its input only for the gradient of its weight.

Why formulas, where `benchmarks` can simulate a step of any architecture: a simulation takes 2 to 4 seconds, a formula
a millisecond, and an estimate looks at hundreds of settings. Tests compare the formulas with the simulation.

Sizes are in bytes; `s` is that of an element, 2 in bf16 and 4 in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from train_llava.model.loss import CHUNK
from train_llava.model.structure import count_trained, patches_per_image, positions_per_image, used_vision_layers


@dataclass
class Batch:
    """The sizes of a batch, padded to one length as the collator pads it."""

    samples: float
    length: int  # tokens of the longest, image tokens included
    images: float  # in all
    answers: float  # supervised tokens, in all

    def times(self, factor: float) -> "Batch":
        """A batch of `factor` times as many samples of the same kind."""
        return Batch(self.samples * factor, self.length, self.images * factor, self.answers * factor)

    def units(self, unit: str) -> float:
        """The number of units of a kind that the batch has."""
        rows = min(self.answers, CHUNK)  # of logits at a time
        tokens = self.samples * self.length
        return {"image": self.images, "token": tokens, "answer": self.answers, "logits": rows}[unit]


@dataclass
class Stage:
    """A piece of the model in the order of the forward pass. All but `trained` is per unit."""

    unit: str  # image, token, supervised token, or row of logits
    saved: float  # what it saves for its backward pass
    workspace: float = 0.0  # what its backward pass needs beside that
    checkpoint: float = 0.0  # what is left of `saved` under gradient checkpointing
    trained: int = 0  # weights with a gradient
    can_checkpoint: bool = False


def saved_activations(stage: Stage, batch: Batch, checkpointing: bool) -> float:
    """Bytes that a stage saves from its forward to its backward pass; logits in chunks are not saved (see loss.py)."""
    if stage.unit == "logits" and batch.answers > CHUNK:
        return 0
    each = stage.checkpoint if checkpointing and stage.can_checkpoint else stage.saved
    return batch.units(stage.unit) * each


def stages(llava: nn.Module, s: int, mask: int) -> Iterator[Stage]:
    """The stages of a LLaVA; `mask` is the size of an element of a dropout's mask, a byte on a GPU."""
    inner, text, vision = llava.model, llava.config.text_config, llava.config.vision_config
    tower, language = inner.vision_tower, inner.language_model
    patches, positions = patches_per_image(vision), positions_per_image(vision)
    below = is_trained(tower)
    yield Stage("image", 0, trained=count_trained(tower) - count_trained(tower.encoder.layers))
    for layer in used_vision_layers(llava):
        bytes_each = vision_layer(layer, vision, s, mask)
        options = {
            "checkpoint": positions * s * vision.hidden_size,
            "trained": count_trained(layer),
            "can_checkpoint": below,
        }
        workspace = positions * 2 * s * vision.intermediate_size
        yield Stage("image", positions * bytes_each if below else 0, workspace, **options)
    yield projector_stage(inner.multi_modal_projector, vision.hidden_size, text.hidden_size, patches, s)
    yield Stage("token", s * text.hidden_size, trained=count_trained(language.embed_tokens))
    for layer in language.layers[:-1]:
        yield decoder_stage([attention_bytes(layer, text, s, mask), mlp_bytes(layer, text, s, mask)], layer, text, s)
    last = language.layers[-1]  # whose MLP runs at answers alone
    yield decoder_stage([attention_bytes(last, text, s, mask)], last, text, s)
    yield Stage("answer", mlp_bytes(last, text, s, mask), can_checkpoint=True)
    norm = norm_bytes(language.norm, [], text.hidden_size, s)
    yield Stage("token", norm, 3 * 4 * text.hidden_size, trained=count_trained(language.norm))
    yield head_stage(llava, text, s)


def decoder_stage(parts: list[float], layer: nn.Module, config: Any, s: int) -> Stage:
    """A Llama or Qwen2 layer of width H and MLP width I, per token.

    Rotary embeddings multiply by constants and keep nothing, neither do residual sums. The backward pass works on three
    gradients of the MLP's width and two of the layer's at a time.
    """
    workspace = 3 * s * config.intermediate_size + 2 * s * config.hidden_size
    options = {"checkpoint": s * config.hidden_size, "trained": count_trained(layer), "can_checkpoint": True}
    return Stage("token", sum(parts), workspace, **options)


def attention_bytes(layer: nn.Module, config: Any, s: int, mask: int) -> float:
    """Per token, of a layer's first half: its RMSNorm (see `norm_bytes`); queries and output, as wide as all heads,
    keys and values, as wide as theirs (s per element); the softmax's logarithmic sums (4 per head); adapters."""
    heads, attention = config.num_attention_heads, layer.self_attn
    each = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = 2 * s * each * (heads + config.num_key_value_heads) + 4 * heads
    *products, _ = products_of(attention)  # the last is the output's
    return size + norms_bytes(norms_of(layer)[0], products, config.hidden_size, s) + adapter_bytes(attention, s, mask)


def mlp_bytes(layer: nn.Module, config: Any, s: int, mask: int) -> float:
    """Per token, of a layer's second half: its RMSNorm, and of SwiGLU gate, its SiLU and up (3 s I), and their product
    where the down projection needs it (s I); adapters."""
    mlp, inside = layer.mlp, config.intermediate_size
    *products, down = products_of(mlp)
    size = 3 * s * inside + s * inside * needs_input(down) + adapter_bytes(mlp, s, mask)
    return size + norms_bytes(norms_of(layer)[1], products, config.hidden_size, s)


def products_of(part: nn.Module) -> list[nn.Module]:
    """The matrices of an attention or MLP in order: gate, up and down, or gate_up and down as in Phi-3."""
    return [module for module in part.children() if hasattr(module, "in_features")]


def norms_of(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Around the attention and around the MLP: one and one, two and two (Gemma 3), one in all (Cohere)."""
    norms = [module for name, module in layer.named_children() if "norm" in name]
    half = (len(norms) + 1) // 2
    return norms[:half], norms[half:]


def norms_bytes(norms: list[nn.Module], products: list[nn.Module], width: int, s: int) -> float:
    """Bytes per token of some norms, the first of which stands before the products."""
    return sum(norm_bytes(norm, [] if i else products, width, s) for i, norm in enumerate(norms))


def norm_bytes(norm: nn.Module, products: list[nn.Module], width: int, s: int) -> float:
    """Per token, of an RMSNorm: its input in fp32 (4 H), where its weight is trained the normalised input (s H), and
    its output where a product behind it needs it (s H)."""
    return 4 * width + s * width * is_trained(norm) + s * width * any(map(needs_input, products))


def vision_layer(layer: nn.Module, config: Any, s: int, mask: int) -> float:
    """Bytes per position of a CLIP or SigLIP layer of width H and MLP width I.

    - two LayerNorms: each its input (s H) and, where a product behind it needs it, its output (s H)
    - attention: queries, keys, values and output (4 s H), the softmax's logarithmic sums (4 per head)
    - MLP: the activation's input (s I), QuickGELU's sigmoid (s I), the output where fc2 needs it (s I)
    """
    width, inside, attention, mlp = config.hidden_size, config.intermediate_size, layer.self_attn, layer.mlp
    reads = [(attention.q_proj, attention.k_proj, attention.v_proj), (mlp.fc1,)]
    size = sum(s * width + s * width * any(map(needs_input, products)) for products in reads)
    size += 4 * s * width + 4 * config.num_attention_heads
    size += s * inside * (1 + (config.hidden_act == "quick_gelu") + needs_input(mlp.fc2))
    return size + adapter_bytes(layer, s, mask)


def projector_stage(projector: nn.Module, vision_width: int, width: int, patches: int, s: int) -> Stage:
    """Per image: the tower's features, and input and output of the GELU, where trained."""
    size = s * (vision_width + 2 * width) if is_trained(projector) else 0
    return Stage("image", patches * size, patches * 2 * s * width, trained=count_trained(projector))


def head_stage(llava: nn.Module, config: Any, s: int) -> Stage:
    """Per row of logits, with a vocabulary of V: what the head reads (s H), and the log-softmax in fp32 (4 V).

    Of long answers a chunk of rows is there at a time (see loss.py). The loss's backward pass needs its own gradient
    and that of the logits, both in fp32 (8 V).
    """
    saved = 4 * config.vocab_size + s * config.hidden_size * needs_input(llava.lm_head)
    trained = 0 if llava.config.tie_word_embeddings else count_trained(llava.lm_head)  # or the embedding table has it
    return Stage("logits", saved, 8 * config.vocab_size, trained=trained)


def adapter_bytes(layer: nn.Module, s: int, mask: int) -> float:
    """Per position, of all LoRA adapters of a layer: what dropout leaves of the input and its mask, and the input of
    the second matrix, as wide as the rank (PEFT, tuners/lora/layer.py, Linear.forward); with DoRA also the outputs of
    base and adapter, which its lengths multiply (tuners/lora/dora.py)."""
    size = 0.0
    for module in layer.modules():
        if hasattr(module, "lora_A"):
            dropped = any(isinstance(dropout, nn.Dropout) for dropout in module.lora_dropout.values())
            size += module.in_features * (s + mask) * dropped + s * sum(module.r.values())
            size += 2 * s * module.out_features * len(module.lora_magnitude_vector)
    return size


def needs_input(product: nn.Module) -> bool:
    """Whether a matrix saves the input that it shares with others: for the gradient of its weight, or of an adapter
    without dropout."""
    if not hasattr(product, "lora_A"):
        return is_trained(product)
    return not any(isinstance(dropout, nn.Dropout) for dropout in product.lora_dropout.values())


def is_trained(module: nn.Module) -> bool:
    """Whether any weight of a module has a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())
