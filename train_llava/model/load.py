"""A folder, or an id of the Hugging Face hub -> the model and the processor in it. No code from there is ever run."""

import hashlib
import json
import os
import pickle
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import (
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available

from train_llava.cli import InputError
from train_llava.model.adapters import add_adapter, check_base
from train_llava.model.folder import CARD, LEAVING, REPLACED
from train_llava.model.structure import CLIP, SIGLIP, processor_config
from train_llava.model.weights import IGNORED, fingerprint, finite, stored_tensors, weight_files
from train_llava.processing.chat_template import CONTENT_PARTS, ChatTemplate

Model = LlavaForConditionalGeneration | PeftModel
Name = str | Path  # a folder or a hub id
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# what the libraries make of damaged files, and of configs that do not belong to them
BROKEN = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError)


def accelerator() -> str | None:
    """torch's name for what computes here beside the CPU: cuda (AMD's GPUs, too), xpu, npu, mps; or None."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else None


def gpu() -> str | None:
    """The same for one with memory of its own, which a Mac's has not."""
    kind = accelerator()
    return None if kind == "mps" else kind


def take_memory_in_blocks_that_grow() -> None:
    """Sets PYTORCH_ALLOC_CONF, which CUDA reads when it takes memory for the first time, unless the user has.

    Batches differ in length: blocks of fixed sizes would leave gaps that the next batch does not fit into. It is set
    here and not by the script, since DeepSpeed's launcher takes only variables with other names to other machines.
    """
    if gpu() == "cuda" and not torch.version.hip and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def load(
    model_name_or_path: Name,
    adapter_name_or_path: Name | None = None,
    dtype: torch.dtype | str = "auto",
    in_4bit: bool = False,
    attn_implementation: str | None = None,
) -> tuple[Model, LlavaProcessor]:
    """Loads a model (in eval mode, on this process's GPU if there is one) and its processor.

    Args:
        model_name_or_path: a whole model, an adapter (which knows its base), or a checkpoint of a training.
        adapter_name_or_path: an adapter to put on top of the model.
        dtype: "auto" keeps the one that was saved.
        in_4bit: hold the language model's linear layers as 4-bit NormalFloat with doubly quantised scales, as QLoRA
            does (arXiv:2305.14314, section 3); vision tower, projector and head keep their precision.
        attn_implementation: of the vision tower and the language model; None is transformers' choice, SDPA where a
            model has it.

    Raises:
        InputError: no LLaVA there, or not a whole one; the adapter's base is not where the adapter says, or is another
            model by now; bitsandbytes is not installed.
    """
    model_name_or_path, adapter = base_and_adapter(model_name_or_path, adapter_name_or_path)
    folder = fetch(model_name_or_path)
    if adapter is not None:
        read_json(adapter, "adapter_config.json")
        if not list(adapter.glob("adapter_model.*")):
            raise InputError(missing_file_message(adapter, "adapter_model.safetensors"))
    config = read_json(folder, "config.json")
    if (kind := config.get("model_type")) != "llava":
        raise InputError(f"{folder}: a {kind!r} model, not a LLaVA. Build one with python -m train_llava.build_model.")
    if not {"text_config", "vision_config"} <= config.keys():
        hint = "Take the same model in transformers' form (as those of llava-hf), or convert it"
        raise InputError(f"{folder}: a LLaVA in the form of the repository haotian-liu/LLaVA. {hint}.")
    if in_4bit and not is_bitsandbytes_available():
        raise InputError("--load_in_4bit needs bitsandbytes: pip install bitsandbytes (the extra train_llava[quant])")
    processor = processor_of(folder, adapter)
    try:
        model = load_weights(folder, dtype, in_4bit, attn_implementation)
        # an adapter trained on this model records its name, and must find its base from anywhere
        model.name_or_path = str(folder.resolve() if Path(model_name_or_path).is_dir() else model_name_or_path)
    except BROKEN as error:
        raise InputError(f"{folder}: cannot be loaded ({error}).") from error
    if adapter is not None:
        check_base(adapter, model)
        try:
            model = add_adapter(model, adapter)
        except BROKEN as error:
            raise InputError(f"{adapter}: cannot be put on {model.name_or_path} ({error}).") from error
    if (kind := accelerator()) and not in_4bit:  # what is in 4 bits is there already
        model.to(torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))))
    return model.eval(), processor


def load_weights(
    folder: Path, dtype: torch.dtype | str, in_4bit: bool, attn_implementation: str | None
) -> LlavaForConditionalGeneration:
    """Loads the model in a folder, every weight from there. transformers 5 knows the weight names of version 4."""
    options: dict[str, Any] = {"dtype": dtype, "weights_only": True, "output_loading_info": True}
    options["attn_implementation"] = attn_implementation
    options["quantization_config"] = four_bit(dtype) if in_4bit else None
    whole, gathered = folder, None
    if not weight_files(folder) and (folder / "latest").is_file():
        gathered, whole = gather_shards(folder), None
        options |= {"config": LlavaConfig.from_pretrained(folder), "state_dict": gathered}
    print_of_it = fingerprint(finite(gathered.items() if gathered else stored_tensors(folder)))
    model, info = LlavaForConditionalGeneration.from_pretrained(whole, **options)
    model.fingerprint = print_of_it
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{len(lacking)} weights are missing, such as {lacking[0]}")
    if left := sorted(name for name in info["unexpected_keys"] if not IGNORED.search(name)):
        raise ValueError(f"{len(left)} weights fit nowhere, such as {left[0]}")
    if is_deepspeed_zero3_enabled():
        # transformers forgets here which names it changed in loading, and in saving would change them twice. A private
        # name, which its core_model_loading.py reads in save_pretrained (5.23); see tests/test_hooks.py.
        model._weight_conversions = []
    for module in model.modules() if in_4bit else []:
        # on some CPUs bitsandbytes would repack its weights at the first evaluation, and training could not go on; its
        # Linear4bit reads this attribute (0.50), see tests/test_hooks.py
        module.support_avx512bf16_for_cpu = False
    return model


def gather_shards(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights in the ranks' optimizer states, which may be all that ZeRO-3 saves."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    def stage(kind: Any, name: str) -> ZeroStageEnum:
        if kind is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"getattr of {kind}")
        return ZeroStageEnum[name]

    # some versions of Python, such as 3.11.2, pickle a member of an enum as a call of getattr
    harmless = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, (stage, "builtins.getattr")]
    before = os.environ.get(FORCE, "0")
    os.environ[FORCE] = "1"  # DeepSpeed would let its pickles run any code
    try:
        with torch.serialization.safe_globals(harmless), redirect_stdout(sys.stderr):
            return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    finally:
        os.environ[FORCE] = before


def four_bit(dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """QLoRA's settings; products are computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        llm_int8_skip_modules=[".*vision_tower", ".*multi_modal_projector", "lm_head"],  # in 4 bits, too
    )


def processor_of(folder: Path, adapter: Path | None) -> LlavaProcessor:
    """The processor beside an adapter, or that of the model in `folder`."""
    return load_processor(adapter if adapter and (adapter / "processor_config.json").is_file() else folder, folder)


def load_processor(model_name_or_path: Name, model_folder: Path | None = None) -> LlavaProcessor:
    """Loads the processor alone, without any weights.

    What older versions of transformers left out of it is filled in from the config of the model, which `model_folder`
    holds if the processor lies beside an adapter.

    Raises:
        InputError: no processor there, none with a chat template, or one of another kind of vision tower.
    """
    folder = fetch(model_name_or_path)
    if not list(folder.glob("*processor_config.json")):
        raise InputError(missing_file_message(folder, "processor_config.json"))
    try:
        # whatever class the folder names: with that of CLIP, answers would get blanks in other programs (zero_nlp 185)
        processor = LlavaProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its processor cannot be loaded ({error}).") from error
    if ((model_folder or folder) / "config.json").is_file():
        config = LlavaConfig.from_pretrained(model_folder or folder)
        if config.vision_config.model_type not in (CLIP, SIGLIP):  # such as Pixtral's, which writes other image tokens
            raise InputError(f"{folder}: a vision tower of kind {config.vision_config.model_type}, not CLIP or SigLIP.")
        for name, value in processor_config(config).items():
            setattr(processor, name, value)
    pad_left(processor.tokenizer)
    template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise InputError(f"{folder}: no chat template, so how it was asked in training is unknown.")
    try:
        text = processor.chat_template or CONTENT_PARTS.read_text() + template
        processor.chat_template = ChatTemplate(processor.tokenizer, text).text
    except InputError as error:
        raise InputError(f"{folder}: its chat template cannot be used, {error}.") from error
    return processor


def pad_left(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets prompts be padded on the left, where generation does not continue; also in plain transformers, once the
    tokenizer is saved. The collator pads training batches on the right by itself."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # what is saved are those of init_kwargs


def base_and_adapter(model_name_or_path: Name, adapter_name_or_path: Name | None) -> tuple[Name, Path | None]:
    """A whole model and the folder of its adapter, if any: an adapter alone knows its base (`fetch`, `base_of`)."""
    folder, adapter = fetch(model_name_or_path), adapter_name_or_path and fetch(adapter_name_or_path)
    if adapter is None and (folder / "adapter_config.json").is_file():
        return base_of(folder), folder
    return model_name_or_path, adapter


def base_of(adapter: Path) -> str:
    """The name of the model that an adapter was trained on.

    Raises:
        InputError: the adapter does not say, or its base cannot be had.
    """
    base = read_json(adapter, "adapter_config.json").get("base_model_name_or_path")
    hint = f"say where its base is: --model_name_or_path BASE --adapter_name_or_path {adapter}"
    if not base:
        raise InputError(f"{adapter}: an adapter that names no base; {hint}.")
    try:
        fetch(base)
    except InputError as error:
        raise InputError(f"{adapter}: an adapter; {hint}. {error}") from error
    return base


def fetch(name: Name) -> Path:
    """The local folder of a model: the folder itself, or the hub's snapshot of an id (never any code).

    Raises:
        InputError: neither.
    """
    if Path(name).is_dir():
        return Path(name)
    files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", CARD]
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=files))
        if not list(folder.glob("*.safetensors")):  # as openai/clip-vit-large-patch14-336
            snapshot_download(str(name), allow_patterns="*.bin")
        return folder
    except (ValueError, OSError) as error:  # what huggingface_hub's errors derive from
        raise InputError(f"{name}: no such folder, nor to be had from the Hugging Face hub. Check it.") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads a JSON file that a folder must have.

    Raises:
        InputError: it is not there, or holds no JSON object.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(missing_file_message(folder, name)) from error
    except ValueError as error:
        raise InputError(f"{folder / name}: not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{folder / name}: not a JSON object. Fetch it again.")
    return content


def missing_file_message(folder: Path, name: str) -> str:
    """The message where a model's file is missing: why, and what to give instead."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]  # written last
    if whole:
        newest = max(whole, key=lambda path: int(path.name.split("-")[1]))
        return f"{folder}: the training has not ended. Give its newest whole checkpoint, {newest}."
    if cut_off := [*folder.glob(f"{LEAVING}*"), *folder.glob(f"{REPLACED}*")]:
        return f"{folder}: replacing the model here was cut off. It is whole in {cut_off[0]}: move its files back."
    return f"{folder}: no {name} here. Give the folder of a LLaVA or of an adapter."


def weights_digest(model: Model) -> str:
    """A short digest of a model's weights and its adapter's; another model of the same name has another one."""
    adapter = fingerprint(get_peft_model_state_dict(model).items()) if isinstance(model, PeftModel) else ""
    return hashlib.sha256(f"{model.fingerprint}{adapter}".encode()).hexdigest()[:16]
