"""The chat models that fit into a LLaVA, each as a tiny one with its own config; and those that do not, and why."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from publishers import published

TINY = {"vocab_size": 448, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
TINY |= {"bos_token_id": 418, "eos_token_id": 420, "pad_token_id": 418}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass
class Family:
    """A kind of model by what it is called, transformers' config class, and settings that matter here."""

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    template: str = "smollm2"  # in tests/templates
    note: str = ""  # of the table, or the reason for a refusal

    def make(self) -> transformers.PreTrainedModel:
        config = getattr(transformers, f"{self.config}Config")(**{**TINY, **self.settings})
        return transformers.AutoModelForCausalLM.from_config(config)


HEADS = {"head_dim": 12}
TIED = {"tie_word_embeddings": True}
SUPPORTED = [
    Family("Qwen1.5, Qwen2, Qwen2.5", "Qwen2", {"tie_word_embeddings": False}, "qwen1.5"),
    Family("Qwen2.5-0.5B to 3B", "Qwen2", TIED, "qwen2.5", "the head is the embedding table"),
    Family("Qwen3 (dense)", "Qwen3", {"head_dim": 16}, "qwen3", "thinking is switched off"),
    Family("Qwen3-Instruct-2507", "Qwen3", {"head_dim": 16}, "qwen3-2507"),
    Family("Llama 2 and 3, TinyLlama", "Llama", {}, "smollm2"),
    Family("SmolLM2", "Llama", TIED, "smollm2", "the head is the embedding table"),
    Family("SmolLM3", "SmolLM3", {}, "smollm3", "thinking is switched off, the date is that of the build"),
    Family("Mistral 7B", "Mistral", {}, "smollm2"),
    Family("Gemma 1", "Gemma", HEADS),
    Family("Gemma 3 (text)", "Gemma3Text", HEADS),
    Family("Phi-3, Phi-3.5", "Phi3", {}, "smollm2", "adapters in qkv_proj and o_proj"),
    Family("OLMo 2", "Olmo2", {}, "olmo2"),
    Family("OLMo 3", "Olmo3"),
    Family("Granite 3", "Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}, "granite3.3",
           "the head holds logits_scaling; the date is that of the build"),
    Family("Command R, Aya", "Cohere", {"logit_scale": 0.0625}, "smollm2", "the head holds logit_scale"),
    Family("Command R7B", "Cohere2", {"logit_scale": 0.25}, "smollm2", "the head holds logit_scale"),
    Family("GLM-4", "Glm4", HEADS),
    Family("EXAONE 4", "Exaone4"),
    Family("ERNIE 4.5 (dense)", "Ernie4_5", HEADS),
    Family("Hunyuan (dense)", "HunYuanDenseV1", HEADS),
    Family("Seed-OSS", "SeedOss", {**HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    Family("Helium", "Helium", HEADS),
    Family("Nemotron", "Nemotron"),
]  # fmt: skip
REFUSED = [
    Family("Gemma 2", "Gemma2", HEADS, note="caps its logits"),
    Family("Phi-2", "Phi", note="lm_head has a bias"),
    Family("Qwen2-MoE", "Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 32}, note="mixture of experts"),
    Family("Qwen3-MoE", "Qwen3Moe", {**EXPERTS, **HEADS}, note="mixture of experts"),
    Family("Mixtral", "Mixtral", EXPERTS, note="mixture of experts"),
    Family("GraniteMoE", "GraniteMoe", EXPERTS, note="lacks self_attn.o_proj or mlp"),
    Family("gpt-oss", "GptOss", {**EXPERTS, **HEADS}, note="mixture of experts"),
    Family("LFM2", "Lfm2", note="lacks self_attn.o_proj or mlp"),
    Family("Falcon-H1", "FalconH1", note="no lm_head behind model.layers|lacks self_attn.o_proj or mlp"),
    Family("OPT", "OPT", note="no lm_head behind model.layers"),
    Family("GPT-2", "GPT2", note="no lm_head behind model.layers"),
]
TOWERS = [
    ("CLIP", "CLIPVisionModel", "all patches of the last layer but one, CLS dropped"),
    ("SigLIP, SigLIP 2 of fixed size", "SiglipVisionModel", "all patches of the last layer but one"),
]


def chat_folder(family, folder):
    """As a publisher would save it, with the tokenizer and template of the family."""
    torch.manual_seed(0)
    model = family.make()
    tokenizer, _, _ = published(family.template)
    assert len(tokenizer) <= model.config.vocab_size
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table() -> str:
    """What docs/models.md shows."""
    lines = ["| vision tower | class in transformers | what the language model sees |", "|---|---|---|"]
    lines += [f"| {name} | `{kind}` | {what} |" for name, kind, what in TOWERS]
    lines += ["", "| chat model | class in transformers | remarks |", "|---|---|---|"]
    lines += [
        f"| {each.name} | `{each.config}ForCausalLM` | {each.note} |".replace("|  |", "| |") for each in SUPPORTED
    ]
    lines += ["", "| refused | class in transformers | because |", "|---|---|---|"]
    lines += [f"| {each.name} | `{each.config}ForCausalLM` | {each.note.split('|')[0]} |" for each in REFUSED]
    return "\n".join(lines)
