"""How much memory a step takes, from short answers to very long ones: plain transformers, TRL and ours.

    pip install trl==1.16.*
    python -m benchmarks.memory.loss_memory [--json benchmarks/results/loss_memory.json]

One conversation with 4 image tokens and an answer of 16 to 8,192 tokens, in fp32; a language model of one layer (hidden
256), so that the loss over Qwen's vocabulary of 151,936 is nearly all there is. The head is frozen, as with LoRA. A
process for each figure: its most memory in forward and backward pass, less what it had before. The losses must agree.
Needs 20 GB of free memory, which the plain way takes.
"""

import argparse
import json
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from benchmarks.result import head, parser, write
from benchmarks.script import last_line
from train_llava.model.loss import patch_forward
from train_llava.processing.chat import IGNORE_INDEX
from train_llava.training.callbacks import peak_memory_gb

CONTENDERS, ANSWERS, VOCABULARY = ("plain", "TRL", "ours"), (16, 128, 512, 2048, 8192), 151_936


def run(way: str, answer: int) -> dict[str, float]:
    """One step in this process."""
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**size, image_size=28, patch_size=14)
    text = Qwen2Config(**size, num_key_value_heads=4, vocab_size=VOCABULARY, tie_word_embeddings=False)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1, vision_feature_layer=-1
    )
    model = LlavaForConditionalGeneration(config).train()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    asked: dict[str, Any] = {}
    if way == "ours":
        patch_forward(model)
    elif way == "TRL":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
        asked["fused_lm_head"] = True
    ids = torch.randint(0, 1000, (1, 8 + answer))
    ids[0, 2:6] = VOCABULARY - 1
    labels = ids.clone()
    labels[0, :8] = IGNORE_INDEX
    before = peak_memory_gb()
    loss = model(input_ids=ids, labels=labels, pixel_values=torch.randn(1, 3, 28, 28), **asked).loss
    loss.backward()
    return {"loss": loss.item(), "gb": peak_memory_gb() - before}


def main() -> None:
    flags = parser(__doc__, "--json")
    flags.add_argument("--run", nargs=2, metavar=("WAY", "ANSWER"), help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.run:
        print(json.dumps(run(args.run[0], int(args.run[1]))))
        return
    result = head(__doc__)
    print(f"{'GB, answer of':<16}{''.join(f'{answer:>10,}' for answer in ANSWERS)}")
    losses: dict[int, float] = {}
    for way in CONTENDERS:
        row = result[way] = {}
        for answer in ANSWERS:
            found = last_line("benchmarks.memory.loss_memory", "--run", way, answer)
            row[str(answer)] = round(found["gb"], 3)
            if abs(found["loss"] - losses.setdefault(answer, found["loss"])) > 1e-4 * found["loss"]:
                raise RuntimeError(f"{way}, {answer} tokens: another loss, {found['loss']}")
        print(f"{way:<16}{''.join(f'{gb:>10.2f}' for gb in row.values())}", flush=True)
    write(args.json, result)


if __name__ == "__main__":
    main()
