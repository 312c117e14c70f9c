"""llama.cpp, given what train_llava.export writes, beside train_llava.infer: ids, image features, logits and answers.

    python -m benchmarks.export.llama_cpp --model_name_or_path models/mine --data_path output/demo/data/held_out \\
        [--json benchmarks/results/llama_cpp.json]

It needs `pip install llama-cpp-py-sync==0.11739`, a wheel with llama.cpp's build b11739 and its libmtmd for CPUs, and a
C compiler. llama.cpp runs with its default settings (the cache of keys and values in fp16) and greedily. It opens the
image file itself, and gets the prompt that the chat template in the GGUF file makes of a message in its form: a marker
for the image and the question, with nothing between. Of the data, the records of the category "caption" are asked. All
is done twice, as llama.cpp was released and with CLIP's class token where it belongs (class_token.c). Where two answers
differ, the first token that does is shown with its margin: how far the two likeliest logits there are from each other
here. At last a tower of SigLIP's kind, which has no class token, and the real tokenizer of Qwen1.5, both in a tiny
model with random weights.

The wheel wants glibc 2.38, as Debian 13 has it. On the older system of the kept result, a preloaded library supplied
the functions that are new there, strtol and the like for C23.
"""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from llama_cpp_py_sync import Llama
from llama_cpp_py_sync.multimodal import MultimodalContext
from PIL import Image
from transformers import LlavaProcessor, PreTrainedTokenizerBase, SiglipVisionConfig

from benchmarks.inputs import SIDE, middle_size
from benchmarks.result import ROOT, head, parser, write
from benchmarks.script import last_line
from tests.qwen_tokenizer import qwen_tokenizer
from train_llava.build_model import build_llava
from train_llava.data import LlavaDataset
from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.model.folder import save_llava
from train_llava.model.generate import Example, ask, collator_of, first_question, generate
from train_llava.model.load import Model, load

PAGES = ("README.md", "README_zh.md", "docs/data_zh.md", "train_llava/cli.py")  # text in several scripts, and code
TOKENS = 64
MODULE = "benchmarks.export.llama_cpp"


class LlamaCpp:
    """The two files of an export, in llama.cpp.

    Names with an underscore are the package's own; it has no others for logits and for a fresh cache. Its version is
    pinned above.
    """

    def __init__(self, folder: Path) -> None:
        self.template = GGUFReader(folder / "model.gguf").fields["tokenizer.chat_template"].contents()
        self.llama = Llama(str(folder / "model.gguf"), n_ctx=2048, n_batch=2048, n_threads=1)
        self.images = MultimodalContext(self.llama, folder / "mmproj.gguf", use_gpu=False, n_threads=1)

    def ask(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> dict[str, Any]:
        """The ids of the prompt (those of the image as None), the image's features, the ids of the answer and the
        logits (tokens, vocabulary) that each of them is the likeliest of."""
        marker = self.images.marker
        messages = [{**m, "content": re.sub(f"\n?{IMAGE_TOKEN}\n?", marker, m["content"])} for m in example["messages"]]
        options = {"chat_template": self.template, "add_generation_prompt": True, "tokenize": False}
        text = tokenizer.apply_chat_template(messages, **options)
        with self.images.tokenize_prompt(text, [*map(file_of, example["images"])]) as prompt:
            ids, features = [], []
            for chunk in prompt:
                ids += [None] * chunk.n_tokens if chunk.type == "image" else chunk.text_tokens
                features += chunk.embeddings if chunk.type == "image" else ()
            self.llama._clear_context_state()
            place = self.images.evaluate_prompt(prompt)
        answer, logits = [], []
        while len(answer) < TOKENS:
            logits.append(self.logits())
            answer.append(int(logits[-1].argmax()))
            if self.llama._lib.llama_vocab_is_eog(self.llama._vocab, answer[-1]):
                break
            place = self.llama._eval_tokens(answer[-1:], place)
        return {"ids": ids, "features": np.array(features), "answer": answer, "logits": np.stack(logits)}

    def logits(self) -> np.ndarray:
        """(vocabulary) fp32, of the next token."""
        pointer = self.llama._lib.llama_get_logits_ith(self.llama._ctx, -1)
        size = self.llama.n_vocab * 4
        return np.frombuffer(self.llama._ffi.buffer(pointer, size), dtype=np.float32).copy()


def file_of(image: Image.Image) -> tuple[str, bytes]:
    """The kind and the bytes of an image's own file, mostly a JPEG in the demo; of an image without one, a PNG's."""
    if name := getattr(image, "filename", ""):
        return Image.MIME[image.format], Path(name).read_bytes()
    file = io.BytesIO()
    image.save(file, "PNG")
    return "image/png", file.getvalue()


@torch.inference_mode()
def compared(
    model: Model, processor: LlavaProcessor, theirs: LlamaCpp, examples: list[dict[str, Any]]
) -> dict[str, Any]:
    """How many prompts and answers are the same, how far features and logits are apart, and where answers part."""
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    counts = {"same_prompt_ids": 0, "same_answers": 0, "right_here": 0, "right_in_llama_cpp": 0}
    far = {"features": 0.0, "logits": 0.0}
    parted = []
    for example in examples:
        question, row = first_question(example)
        said = theirs.ask(processor.tokenizer, question)
        answer = processor.tokenizer.decode(said["answer"], skip_special_tokens=True).strip()
        ours = generate(model, processor, [question], max_new_tokens=TOKENS)[0]
        batch = collator_of(processor).prompts([question])
        ids = batch["input_ids"][0].tolist()
        features = model.get_image_features(batch["pixel_values"]).pooler_output[0].numpy()
        # our logits behind their words, so that the same is compared after a first difference, too
        whole = torch.tensor([[*ids, *said["answer"][:-1]]])
        options = {"pixel_values": batch["pixel_values"], "attention_mask": torch.ones_like(whole)}
        logits = model(input_ids=whole, **options).logits[0, len(ids) - 1 :].numpy()
        far["features"] = max(far["features"], float(np.abs(features - said["features"]).max() / features.std()))
        far["logits"] = max(far["logits"], float(np.abs(logits - said["logits"]).max()))
        counts["same_prompt_ids"] += [image_id if i is None else i for i in said["ids"]] == ids
        counts["same_answers"] += ours == answer
        counts["right_here"] += ours == row["reference"]
        counts["right_in_llama_cpp"] += answer == row["reference"]
        if ours != answer:
            at = int((logits.argmax(-1) != said["answer"]).argmax())
            second, first = np.sort(logits[at])[-2:]
            parted.append(
                {"id": row["id"], "here": ours, "llama_cpp": answer, "margin": round(float(first - second), 4)}
            )
    furthest = {"features_over_their_deviation": round(far["features"], 5), "logits": round(far["logits"], 4)}
    return {"images": len(examples), **counts, "furthest_apart": furthest, "first_that_differ": parted[:5]}


def same_lines(tokenizer: PreTrainedTokenizerBase, theirs: LlamaCpp) -> str:
    """Of the lines of some pages, how many become the same ids."""
    lines = [line for page in PAGES for line in (ROOT / page).read_text().splitlines() if line]
    options = {"add_special_tokens": False, "split_special_tokens": True}
    same = sum(theirs.llama.tokenize(line, add_special=False) == tokenizer(line, **options).input_ids for line in lines)
    return f"{same} of {len(lines)}"


def exported(model: Path, folder: Path) -> LlamaCpp:
    """A model as llama.cpp has it."""
    where = ("--model_name_or_path", model, "--format", "gguf", "--output_dir", folder)
    subprocess.run([sys.executable, "-m", "train_llava.export", *map(str, where)], check=True, stdout=sys.stderr)
    return LlamaCpp(folder)


def tiny(folder: Path) -> Path:
    """A LLaVA of random weights: SigLIP's kind of tower, Qwen1.5's tokenizer and as many rows as its models have."""
    vision, language = middle_size(folder, layers=2)
    size = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 2}
    SiglipVisionConfig(**size, image_size=SIDE, patch_size=14).save_pretrained(vision)
    config = json.loads((language / "config.json").read_text()) | {"vocab_size": 151936}
    (language / "config.json").write_text(json.dumps(config))
    qwen_tokenizer().save_pretrained(language)
    save_llava(*build_llava(vision, language, random_weights=True), folder / "tiny")
    return folder / "tiny"


def measured(model_folder: Path, data_path: Path | None, images: int) -> dict[str, Any]:
    """Of a model on data; without data, its features of one image, and its ids."""
    model, processor = load(model_folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        theirs = exported(model_folder, Path(folder))
        if data_path:
            examples = LlavaDataset(data_path, held_out=True)
            captions = (example for example in examples if example["category"] == "caption")
            return compared(model, processor, theirs, list(islice(captions, images)))
        noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        example = {"id": "noise", **ask("What is this?", [Image.fromarray(noise)])}
        example["messages"].append({"role": "assistant", "content": "Noise."})
        found = compared(model, processor, theirs, [example])
        return {
            "tower": model.config.vision_config.model_type,
            **found["furthest_apart"],
            "lines_with_the_same_ids": same_lines(processor.tokenizer, theirs),
        }


def main() -> None:
    flags = parser(__doc__, "--json")
    flags.add_argument("--model_name_or_path", type=Path, required=True)
    flags.add_argument("--data_path", type=Path)
    flags.add_argument("--images", type=int, default=50)
    flags.add_argument("--once", action="store_true", help="print one comparison, which the others are made of")
    args = flags.parse_args()
    if args.once:
        print(json.dumps(measured(args.model_name_or_path, args.data_path, args.images)))
        return
    words = ["--once", "--model_name_or_path"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "class_token.so"
        source = Path(__file__).with_name("class_token.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        released = os.environ | {"OMP_NUM_THREADS": "1"}
        mended = released | {"LD_PRELOAD": f"{library}:{os.environ.get('LD_PRELOAD', '')}"}
        asked = [*words, args.model_name_or_path, "--data_path", args.data_path, "--images", args.images]
        result = {
            "as_released": last_line(MODULE, *asked, variables=released),
            "class_token_first": last_line(MODULE, *asked, variables=mended),
            "siglip_and_qwen": last_line(MODULE, *words, tiny(Path(folder)), variables=released),
        }
    write(args.json, {**head(__doc__), "llama_cpp": "b11739 (llama-cpp-py-sync 0.11739)", **result})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
