"""Published speeds of trainings beside what the roofline says of the same shapes.

    python -m benchmarks.full_size.published [--json benchmarks/results/published.json]

Each run in its own way: its model, batch, length, GPUs, gradient checkpointing, eager kernels where it had these (and
Liger's in place of Unsloth's and Transformer Engine's). Others' losses have logits for every token. Text-only runs
are those of the language model alone. Takes half a minute.

Comparable is what says its tokens or seconds per step, on one GPU; what says the hours of a whole job, with data
loaded from a disk we do not know, is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from benchmarks.full_size.model import CONFIGS
from benchmarks.result import head, parser, table, write
from train_llava.model.config import compose_config, read_vision_config
from train_llava.model.freeze import LoraSettings
from train_llava.planning.activations import Batch
from train_llava.planning.kernels import Way
from train_llava.planning.speed import Speed

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAVA = "github.com/haotian-liu/LLaVA, README and scripts/v1_5"
QWEN = "github.com/QwenLM/Qwen, README, Profiling of Memory and Speed"
FACTORY = "github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison"
NEMO = "github.com/NVIDIA-NeMo/Automodel, docs/performance-summary.mdx, 2026-06-12"
TINY = "github.com/TinyLLaVA/TinyLLaVA_Factory, issue 67"
XTUNER = "huggingface.co/StarCycle/llava-siglip-internlm2-1_8b-v1"
ALIGN, INSTRUCT = 558_128, 665_298  # records of LLaVA-Pretrain and of llava_v1_5_mix665k


def language(width: int, inside: int, layers: int, heads: int, vocabulary: int = 32000, kv: int = 0) -> LlamaConfig:
    """The shapes of a model of Llama's kind."""
    sizes = {"hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv or heads, "vocab_size": vocabulary}
    return LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False)


def qwen(*sizes: int, **options) -> Qwen2Config:
    """The same with biases at queries, keys and values."""
    config = language(*sizes, **options).to_dict()
    return Qwen2Config(**{name: value for name, value in config.items() if name not in ("model_type", "pad_token_id")})


def clip() -> PreTrainedConfig:
    """CLIP-ViT-L/336."""
    return read_vision_config(CONFIGS / "clip")


def siglip() -> PreTrainedConfig:
    """SigLIP-so400m/384."""
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    return SiglipVisionConfig(**sizes, image_size=384, patch_size=14)


@dataclass
class Run:
    """A published speed, and what is known of the run."""

    name: str
    source: str
    text: PreTrainedConfig
    train_type: str
    gpu: str
    samples_per_second: float  # of all GPUs
    batch: int  # per GPU
    tokens: int  # of a sample
    gpus: int = 1
    accumulation: int = 1
    checkpointing: bool = True
    liger: bool = False
    lora_r: int = 0
    vision: Callable[[], PreTrainedConfig] | None = None  # without one: text only
    learned: int = 0  # tokens of a sample; all if 0
    comparable: bool = False
    note: str = ""


def whole_job(hours: float, records: int) -> float:
    """Samples per second of a job that took so many hours."""
    return records / hours / 3600


VICUNA_7B, VICUNA_13B = language(4096, 11008, 32, 32), language(5120, 13824, 40, 40)
QWEN_7B, QWEN_14B = qwen(4096, 11008, 32, 32, 151936), qwen(5120, 13696, 40, 40, 152064)
LLAMA3_8B, QWEN25_7B = language(4096, 14336, 32, 32, 128256, 8), qwen(3584, 18944, 28, 28, 152064, 4)
LOADS = "images are loaded meanwhile, by 4 processes per GPU; their time is not known"
ZERO3 = "ZeRO-3; 790 tokens are our guess; images are loaded meanwhile"
RUNS = [
    *(
        Run(f"{name} LoRA, {tokens} tokens", QWEN, text, "use_lora", "a100-80g", 8 / seconds, 1, tokens, 1, 8,
            lora_r=64, comparable=True)
        for name, text, times in (("Qwen-7B", QWEN_7B, (1.5, 2.8, 5.2)), ("Qwen-14B", QWEN_14B, (2.4, 4.4, 8.4)))
        for tokens, seconds in zip((512, 1024, 2048), times, strict=True)
    ),
    Run("LLaMA2-7B LoRA, Hugging Face", FACTORY, VICUNA_7B, "use_lora", "a100-40g", 2954 / 1024, 4, 1024, 1, 2,
        lora_r=8, comparable=True),
    Run("LLaMA2-7B LoRA, Unsloth", FACTORY, VICUNA_7B, "use_lora", "a100-40g", 4007 / 1024, 4, 1024, 1, 2,
        lora_r=8, liger=True, comparable=True),
    Run("Llama3-8B LoRA, NeMo", NEMO, LLAMA3_8B, "use_lora", "h100-80g", 12472.87 / 4096, 2, 4096, 1, 16, False, True,
        lora_r=16, comparable=True),
    Run("Qwen2.5-7B LoRA, NeMo", NEMO, QWEN25_7B, "use_lora", "h100-80g", 14110.05 / 4096, 2, 4096, 1, 16, False, True,
        lora_r=16, comparable=True),
    Run("LLaVA-1.5-7B, projector, 3.5 h", LLAVA, VICUNA_7B, "projector", "a100-80g", whole_job(3.5, ALIGN), 32, 620, 8,
        vision=clip, note=LOADS),
    Run("LLaVA-1.5-13B, projector, 5.5 h", LLAVA, VICUNA_13B, "projector", "a100-80g", whole_job(5.5, ALIGN), 32, 620,
        8, vision=clip, note=LOADS),
    Run("LLaVA-1.5-13B, projector, 11 h", LLAVA, VICUNA_13B, "projector", "a100-40g", whole_job(11, ALIGN), 16, 620, 4,
        4, vision=clip, note=LOADS),
    Run("LLaVA-1.5-7B, fine-tuned, 10 h", LLAVA, VICUNA_7B, "freeze_vision", "a100-40g", whole_job(10, INSTRUCT), 16,
        790, 8, vision=clip, note=ZERO3),
    Run("LLaVA-1.5-13B, fine-tuned, 20 h", LLAVA, VICUNA_13B, "freeze_vision", "a100-80g", whole_job(20, INSTRUCT), 16,
        790, 8, vision=clip, note=ZERO3),
    Run("TinyLlama-1.1B + SigLIP, projector, 2.5 h", TINY, language(2048, 5632, 22, 32, 32000, 4), "projector",
        "a100-40g", whole_job(2.5, ALIGN), 32, 770, 4, 2, vision=siglip, note=LOADS),
    Run("InternLM2-1.8B + SigLIP, projector, 5.5 h", XTUNER, language(2048, 8192, 24, 16, 92544, 8), "projector",
        "rtx4090-24g", whole_job(5.5, ALIGN), 8, 770, 4, 2, vision=siglip, note="batch and loading are not known"),
    Run("ours, use_lora, 2026-11-23", "benchmarks/results/gpu_h100.json", qwen(2560, 6912, 40, 20, 151936), "use_lora",
        "h100-80g", 9.2, 4, 620, checkpointing=False, lora_r=32, vision=clip, learned=20,
        note="the old code; if the host was the reason, it started a kernel every 70 microseconds, not every 12"),
]  # fmt: skip


def row(run: Run) -> dict[str, Any]:
    """The published and the predicted speed of a run."""
    config = compose_config((run.vision or clip)(), run.text)
    images = run.batch * (run.vision is not None)
    own = run.vision is None  # a language model's own LoRA has no projector
    lora = LoraSettings(run.lora_r, lora_dropout=0.0 if run.lora_r == 8 else 0.05, train_projector=not own)
    lora.lora_target_modules = ALL if own else None
    way = Way(run.checkpointing, run.liger, fused_lora=run.liger, lora=lora)
    sizes = Batch(run.batch, run.tokens, images, run.batch * (run.learned or run.tokens))
    speed = Speed.of(config, run.train_type, sizes, run.gpus, way, run.accumulation)
    predicted = speed.samples_per_second(run.gpu)
    result = {"run": run.name, "gpus": f"{run.gpus} x {run.gpu}", "comparable": run.comparable}
    result |= {"published_samples_per_second": round(run.samples_per_second, 2)}
    result |= {"predicted_samples_per_second": round(predicted, 2)}
    result["published_over_predicted"] = round(run.samples_per_second / predicted, 3)
    return result | {"source": run.source, "note": run.note}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that docs/estimate.md shows."""
    heads = ["run", "GPUs", "published, samples/s", "predicted", "published / predicted"]
    names = ["run", "gpus", "published_samples_per_second", "predicted_samples_per_second", "published_over_predicted"]
    return table(heads, [[each[name] for name in names] for each in rows])


def main() -> None:
    args = parser(__doc__, "--json").parse_args()
    rows = [row(run) for run in RUNS]
    print(markdown(rows))
    write(args.json, head(__doc__) | {"rows": rows})


if __name__ == "__main__":
    main()
