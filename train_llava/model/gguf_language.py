"""The language model of a LLaVA with its tokenizer -> a GGUF file for llama.cpp."""

from pathlib import Path

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, GGUFType, GGUFWriter, get_tensor_name_map
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedConfig

from train_llava.model.gguf_file import add_weight, gguf_file, gguf_name
from train_llava.model.gguf_vocabulary import add_vocabulary
from train_llava.model.structure import HEAD, LANGUAGE, component_of

ARCHITECTURES = {"qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3, "llama": MODEL_ARCH.LLAMA}
ROPE_TYPES = {"qwen2": ("default",), "qwen3": ("default",), "llama": ("default", "llama3")}


def unsupported_language_model(config: PreTrainedConfig) -> str | None:
    """The reason why a language model is not exported; None if it is."""
    kind, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    if kind not in ARCHITECTURES:
        return f"its language model is of kind {kind}, and only {', '.join(ARCHITECTURES)} are exported"
    if config.hidden_act != "silu":
        return f"its language model computes {config.hidden_act}, and llama.cpp SiLU"
    if any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or []):
        return "its attention has a sliding window, which llama.cpp does not compute for this kind"
    if rope.get("rope_type") not in ROPE_TYPES[kind] or rope.get("partial_rotary_factor", 1) != 1:
        return f"its rotary embeddings are of kind {rope.get('rope_type')} or partial"
    return None


def write_language_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, path: Path) -> None:
    """Writes the language model, its head and its tokenizer.

    Keys and tensors are those of llama.cpp's convert_hf_to_gguf.py. A head that is the embedding table is left out:
    llama.cpp then reads the table.
    """
    config = model.config.text_config
    architecture = ARCHITECTURES[config.model_type]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    with gguf_file(path, MODEL_ARCH_NAMES[architecture], GGUFType.MODEL, model.lm_head.weight.dtype) as writer:
        add_sizes(writer, config)
        add_vocabulary(writer, model, processor)
        if config.rope_parameters["rope_type"] == "llama3":
            add_weight(writer, f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight", rotary_factors(model))
        for name, weight in model.named_parameters():  # a tied head is not in it a second time
            if component_of(name) not in (LANGUAGE, HEAD):
                continue
            if config.model_type == "llama" and ".q_proj." in name:
                weight = in_pairs(weight, config.num_attention_heads)
            elif config.model_type == "llama" and ".k_proj." in name:
                weight = in_pairs(weight, config.num_key_value_heads)
            add_weight(writer, gguf_name(names, name.replace("language_model.", "")), weight)


def add_sizes(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Adds the keys that say how large the model is, and how it computes."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head (heads x head size, ...) in llama.cpp's order for Llama.

    transformers rotates row i of a head together with row i + half, llama.cpp rotates neighbours
    (LlamaModel.permute in its conversion/llama.py). Scores of attention are sums over both, so they stay the same.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rotary_factors(model: LlavaForConditionalGeneration) -> torch.Tensor:
    """What llama.cpp divides its rotary frequencies by (half a head), so that they are those of transformers."""
    own = model.model.language_model.rotary_emb.inv_freq.float().cpu()
    theta = model.config.text_config.rope_parameters["rope_theta"]
    return theta ** -(torch.arange(len(own)) / len(own)) / own
