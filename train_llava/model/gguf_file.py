"""A GGUF file, which holds a model as llama.cpp reads it: keys, then tensors in the types that it computes with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, TensorNameMap

KINDS = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


@contextmanager
def gguf_file(path: Path, architecture: str, kind: str, dtype: torch.dtype) -> Iterator[GGUFWriter]:
    """Gives a writer of keys and tensors, and writes them when the block ends.

    Args:
        path: of the new file.
        architecture: as llama.cpp calls it.
        kind: one of gguf.GGUFType.
        dtype: of most matrices.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_file_type(KINDS[dtype][1])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_weight(writer: GGUFWriter, name: str, weight: torch.Tensor) -> None:
    """Adds a weight: matrices in the type they are stored in, vectors (norms, biases) in fp32.

    llama.cpp's operations on vectors take fp32 alone (conversion/base.py, prepare_tensors); nothing is rounded.
    """
    value = weight.detach().cpu()
    value = (value if value.ndim > 1 else value.float()).contiguous()
    # as bytes, since NumPy has no bfloat16
    writer.add_tensor(name, value.view(torch.uint8).numpy(), raw_dtype=KINDS[value.dtype][0])


def gguf_name(names: TensorNameMap, name: str) -> str:
    """What llama.cpp calls a tensor of transformers.

    Raises:
        RuntimeError: it has no name for it.
    """
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise RuntimeError(f"llama.cpp has no name for {name}")
    return found
