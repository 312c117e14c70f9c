"""The vision tower and the projector of a LLaVA -> the second GGUF file for llama.cpp, which it calls mmproj."""

from pathlib import Path

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, GGUFType, GGUFWriter, get_tensor_name_map
from PIL.Image import Resampling
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from train_llava.model.gguf_file import add_weight, gguf_file, gguf_name
from train_llava.model.structure import (
    PROJECTOR,
    VISION,
    component_of,
    image_config,
    unused_vision_modules,
    used_vision_depth,
)

# Activations by what clip.use_gelu says of them. llama.cpp's gelu is the approximation by tanh (arXiv:1606.08415), off
# by up to 0.0005 from the exact one
USE_GELU = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
# These two are in llama.cpp's tools/mtmd/clip-impl.h, and not in the package gguf
MLP = "mlp"
FEATURE_LAYER = "clip.vision.feature_layer"
# Since May 2025 (pull request 13321, until at least build 11739 of October 2026) models/llava.cpp there puts the class
# token behind the patches, and clip.cpp reads the rows as if it stood in front. No file can make up for that.
CLASS_TOKEN = (
    "llama.cpp mixes the patches of a CLIP tower up (its issue 25814, in all builds from May 2025 to October 2026 at "
    "least): answers are wrong unless its own code is mended, a line that docs/serving.md shows"
)
PLACES = {"linear_1": 0, "linear_2": 2}  # in LLaVA's own code the projector is a Sequential, with the activation at 1


def unsupported_vision(config: LlavaConfig, processor: LlavaProcessor) -> str | None:
    """The reason why a tower, a projector or an image processor is not exported; None if they are."""
    vision, images = config.vision_config, processor.image_processor
    if vision.hidden_act not in USE_GELU or not USE_GELU.get(config.projector_hidden_act):
        return f"llama.cpp cannot compute {vision.hidden_act} in a tower and {config.projector_hidden_act} behind it"
    if not config.multimodal_projector_bias:
        return "its projector has no bias"
    if not isinstance(config.vision_feature_layer, int):
        return "its projector reads several layers of the tower"
    if config.vision_feature_select_strategy != image_config(vision)["vision_feature_select_strategy"]:
        return "its projector reads the class token, which llama.cpp leaves out"
    if not (images.do_normalize and images.do_rescale and round(images.rescale_factor * 255, 6) == 1):
        return "its image processor does not normalise colours as llama.cpp does"
    if images.resample != Resampling.BICUBIC:
        return f"its image processor resizes by {Resampling(images.resample).name}, and llama.cpp by BICUBIC"
    return None


def write_vision(model: LlavaForConditionalGeneration, processor: LlavaProcessor, path: Path) -> None:
    """Writes the tower up to the layer that the projector reads, and the projector.

    Keys and tensors are those that llama.cpp's tools/mtmd/clip.cpp reads for the projector "mlp", LLaVA-1.5's. It drops
    the class token where there is one.
    """
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, model.config.vision_config.num_hidden_layers)
    unused = {id(weight) for module in unused_vision_modules(model) for weight in module.parameters()}
    dtype = model.model.multi_modal_projector.linear_1.weight.dtype
    with gguf_file(path, MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ], GGUFType.MMPROJ, dtype) as writer:
        add_sizes(writer, model.config, processor)
        for name, weight in model.named_parameters():
            _, _, own = name.partition("vision_tower.")
            if component_of(name) == PROJECTOR:
                *_, layer, part = name.split(".")
                place = TENSOR_NAMES[MODEL_TENSOR.V_MMPROJ].format(bid=PLACES[layer])
                add_weight(writer, f"{place}.{part}", weight)
            elif component_of(name) == VISION and id(weight) not in unused:
                own = own.removeprefix("vision_model.")
                # llama.cpp adds the embeddings of patches and positions up, which its CPU code does in fp32
                weight = weight.float() if own.startswith("embeddings.") else weight
                add_weight(writer, gguf_name(names, f"vision_tower.vision_model.{own}"), weight)


def add_sizes(writer: GGUFWriter, config: LlavaConfig, processor: LlavaProcessor) -> None:
    """Adds the keys that say how large the tower is, how it computes, and what it makes of colours."""
    vision, depth = config.vision_config, used_vision_depth(config)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(MLP)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_block_count(depth)
    writer.add_array(FEATURE_LAYER, [depth])
    writer.add_vision_use_gelu(USE_GELU[vision.hidden_act])
    writer.add_vision_image_mean(list(processor.image_processor.image_mean))
    writer.add_vision_image_std(list(processor.image_processor.image_std))
