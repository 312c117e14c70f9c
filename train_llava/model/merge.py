"""An adapter and its base -> one plain LLaVA in a folder, checked after saving."""

from pathlib import Path

import torch

from train_llava.cli import InputError
from train_llava.model.folder import save_llava
from train_llava.model.generate import ask, collator_of, generate
from train_llava.model.load import fetch, load
from train_llava.model.structure import components_table
from train_llava.model.verify_build import GREY, QUESTION, check_answers, check_weights
from train_llava.model.verify_merge import check_merge


def merge(adapter: Path, base: str, folder: Path) -> str:
    """Merges, saves into an empty folder, reads it back and checks it. Returns a table of the model's parts.

    Raises:
        InputError: they cannot be merged, see also `check_mergeable`.
        RuntimeError: the folder is not the sum of both, or answers otherwise.
    """
    model, processor = load(base, adapter)
    before = generate(model, processor, [ask(QUESTION, [GREY])], max_new_tokens=8)[0]
    try:
        merged = model.merge_and_unload(safe_merge=True).cpu()  # beside the files it is compared with
    except (ValueError, RuntimeError) as error:  # such as a sum beyond fp16
        raise InputError(f"{adapter}: cannot be merged ({error}).") from error
    if merged.generation_config.eos_token_id is None:  # of a base saved by transformers 4: it would not stop
        merged.generation_config.eos_token_id = collator_of(processor).encoder.end_of_turn_id
    save_llava(merged, processor, folder)
    print("saved, now reading it back", flush=True)
    adapted, dtype = check_merge(merged, fetch(base), adapter), merged.lm_head.weight.dtype
    print(f"{adapted} weights equal base + lora_alpha / r x B A within {dtype}, the others are equal bit for bit")
    print(f"{check_weights(folder, merged, None)} tensors in the folder are those compared", flush=True)
    components = components_table(merged)
    del model, merged  # so that memory holds one copy at a time
    after = check_answers(folder).strip()
    if before != after and dtype == torch.float32:  # 16 bits may round one answer into another
        raise RuntimeError(f"{folder} answers {after!r} about a grey image, and {before!r} before")
    print(f"pipeline('image-text-to-text') answers about a grey image: {after!r}, and before the merge: {before!r}")
    return components
