"""The files that hold a model's weights, read tensor by tensor: mapped, and never in memory as a whole."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from train_llava.model.structure import LANGUAGE, PROJECTOR, VISION, component_of

PREFIX = re.compile(r"^(model\.)?(vision_tower\.|language_model\.)?(vision_model\.|model\.)?")
# buffers that older versions saved, and parts of a tower behind the layer that a LLaVA reads
IGNORED = re.compile(r"(position_ids|inv_freq)$|vision_tower\.(vision_model\.)?(head|post_layernorm)\.")
SAMPLE = 256  # values from the start, the middle and the end of a tensor


def weight_files(folder: Path) -> list[Path]:
    """The files of a whole model that transformers would load, in its order of preference; none for an adapter."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return []


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor in a folder's weight files, one in memory at a time."""
    for path in weight_files(folder):
        if path.suffix == ".bin":
            yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def canonical(name: str, component: str = "") -> str:
    """One name for a tensor, whichever version of transformers has written the file.

    `component` is the one that a file is from that holds no other, such as a chat model's.
    """
    component = component or component_of(name)
    if component == PROJECTOR:
        return name.removeprefix("model.")
    return f"{VISION if component == VISION else LANGUAGE}: {PREFIX.sub('', name)}"


def take_stored_names(model: nn.Module) -> None:
    """Lets `model.load_state_dict` accept the names in a file, which transformers writes in the form of its version 4.

    Trainer calls `load_state_dict` when it resumes without DeepSpeed or loads the best checkpoint. It would ignore
    every name that is not the model's own.
    """

    def rename(module: nn.Module, state: dict[str, torch.Tensor], *args) -> None:
        own = {canonical(name): name for name in module.state_dict()}
        for name in [*state]:
            if canonical(name) in own:
                state[own[canonical(name)]] = state.pop(name)
            elif not IGNORED.search(name):
                raise RuntimeError(f"the checkpoint has a weight that fits nowhere: {name}")

    model.register_load_state_dict_pre_hook(rename)


def finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, checked on their way, at 15 GB/s on a core and with no copy in memory.

    Raises:
        ValueError: at the end, where some are NaN or infinite; says how many tensors, and names one.
    """
    bad = []
    for name, value in tensors:
        # a NaN anywhere makes both of them NaN
        if value.is_floating_point() and value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
            bad.append(name)
        yield name, value
    if bad:
        raise ValueError(f"{len(bad)} of its tensors hold NaN or infinite values, such as {bad[0]}")


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest of some values of every tensor, as fp32: it differs between models of the same shapes.

    It depends on values alone: the same model has the same digest in other shards, under the names of another version
    of transformers, or in a dtype that holds its values exactly. Rounded to a shorter dtype, it is another model.
    """
    digests = set()  # so that a tied head counts once, whether it is in the file or not
    for name, value in tensors:
        if value.is_floating_point() and not IGNORED.search(name):
            flat, middle = value.detach().reshape(-1), value.numel() // 2
            samples = [flat[:SAMPLE], flat[middle : middle + SAMPLE], flat[-SAMPLE:]]
            shape = str(tuple(value.shape)).encode()
            digests.add(hashlib.sha256(shape + torch.cat(samples).float().numpy().tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
