"""What of other libraries is relied on without a public promise. Each fails by its name where a version lacks it.

| name | what for | file |
|---|---|---|
| LlavaForConditionalGeneration.forward | replaced: the loss at answers alone | model/loss.py |
| CLIPVisionModel.forward, SiglipVisionModel.forward | wrapped in no_grad, where frozen | model/freeze.py |
| CLIPEncoderLayer.forward, SiglipEncoderLayer.forward | replaced within a pass: unused layers | model/loss.py |
| keywords reach a layer's attention | which rows are answers | model/loss.py |
| masking_utils.find_packed_sequence_indices | replaced within a pass: what is packed is known | model/loss.py |
| Accelerator.clip_grad_norm_ | wrapped on one object: the gradient's norm | training/finite.py |
| Accelerator.optimizer_step_was_skipped | read: steps that DeepSpeed skipped | training/finite.py |
| PreTrainedModel._weight_conversions | emptied under ZeRO-3 | model/load.py |
| PreTrainedModel._init_weights | called: the new projector | build_model.py |
| bitsandbytes Linear4bit.support_avx512bf16_for_cpu | switched off | model/load.py |
| deepspeed.ops.__compatible_ops__ | emptied: no op is compiled that no training calls | training/compiled_ops.py |
| DeepSpeedEngine._flush_coalesced_reduction_zero12 | taken away when a step has failed | training/step.py |
| peft check_target_module_exists, get_pattern_key | called: what names in a config mean | model/adapters.py |
| Trainer.label_smoother, .get_batch_samples, .floating_point_ops | set and overridden | training/trainer.py |
| TRAINING_ARGS_NAME | the name of a file in checkpoints | training/trainer.py |
| torch TorchDispatchMode, tree_leaves | sees every operation, as no public hook does | planning/kernels.py |
| torch flop_registry | read: FLOPs of an operation | planning/kernels.py |
| apply_rotary_pos_emb of a family | replaced while a step is counted, as Liger does | planning/stand_ins.py |
"""

import dataclasses
import inspect
import sys
from importlib import import_module

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, run
from transformers import Trainer
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from train_llava.model.freeze import apply_train_type
from train_llava.model.load import load
from train_llava.planning.arguments import DataArguments, LlavaTrainingArguments, ModelArguments

NAMES = [
    "accelerate.Accelerator.clip_grad_norm_",
    "accelerate.Accelerator.optimizer_step_was_skipped",
    "deepspeed.ops.__compatible_ops__",
    "deepspeed.runtime.engine.DeepSpeedEngine._flush_coalesced_reduction_zero12",
    "peft.tuners.tuners_utils.check_target_module_exists",
    "peft.utils.other.get_pattern_key",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
    "torch.utils.flop_counter.flop_registry",
    "transformers.PreTrainedModel._init_weights",
    "transformers.Trainer.get_batch_samples",
    "transformers.Trainer.floating_point_ops",
    "transformers.Trainer.create_optimizer",
    "transformers.Trainer.prediction_step",
    "transformers.trainer.TRAINING_ARGS_NAME",
    "transformers.integrations.deepspeed.unset_hf_deepspeed_config",
    "transformers.masking_utils.find_packed_sequence_indices",
    "transformers.modeling_layers.GradientCheckpointingLayer",
    "transformers.models.llava.modeling_llava.LlavaMultiModalProjector",
    "transformers.models.qwen2.modeling_qwen2.apply_rotary_pos_emb",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_there(name):
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            assert hasattr(found, part), f"{name} is gone"
            found = getattr(found, part)
        return
    pytest.fail(f"{name} is gone")


def test_trainer_clips_through_the_accelerator():
    """Its norm is the one that FiniteCallback reads."""
    assert "self.accelerator.clip_grad_norm_(" in inspect.getsource(Trainer._get_grad_norm)
    assert "max_norm" in inspect.signature(Accelerator.clip_grad_norm_).parameters


@pytest.mark.parametrize("encoder", [CLIPEncoder, SiglipEncoder])
def test_towers_call_their_layers_one_by_one(encoder):
    """So a layer whose `forward` is replaced within a pass is skipped."""
    assert "in self.layers" in inspect.getsource(encoder.forward)


def test_a_loaded_model_remembers_its_weight_conversions(loaded):
    """The list that is emptied under ZeRO-3, or weights would be renamed twice when they are saved."""
    assert hasattr(loaded[0], "_weight_conversions")


def test_4_bit_layers_may_be_repacked_on_a_cpu():
    """Unless this attribute is false: then training could not go on after an evaluation."""
    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(bitsandbytes.nn.Linear4bit)


def test_keywords_reach_the_attention_of_every_layer(loaded):
    seen = []
    layers = loaded[0].model.language_model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs.get("ours")), with_kwargs=True
        )
        for layer in layers
    ]
    with torch.no_grad():
        loaded[0].model(input_ids=torch.tensor([[1, 2, 3]]), ours="a keyword")
    for hook in hooks:
        hook.remove()
    assert seen == ["a keyword"] * len(layers)


def test_pillow_keeps_freed_blocks():
    """Its documented variables are set before it is first imported."""
    code = (
        "import train_llava.data; from PIL import Image as I; print(I.core.get_block_size(), I.core.get_blocks_max())"
    )
    assert run(sys.executable, "-c", code).stdout.split() == [str(1 << 20), "64"]


def test_an_interrupted_pass_of_a_frozen_tower_leaves_gradients_on(llava):
    """A notebook's Ctrl-C: torch calls no hook after it."""
    model = apply_train_type(load(llava)[0], "freeze_vision")

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.model.vision_tower.encoder.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.model.vision_tower(torch.zeros(1, 3, 28, 28))
    hook.remove()
    assert torch.is_grad_enabled()
    model.gradient_checkpointing_enable()  # turns gradients on at the patches, too: no pass of the tower may follow
    model.enable_input_require_grads()
    assert not model.model.vision_tower(torch.zeros(1, 3, 28, 28)).last_hidden_state.requires_grad


def test_a_training_flags_names_are_in_the_source_of_transformers():
    """scripts/check_flags.py reads them there, since an import takes seconds."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from check_flags import known_flags
    finally:
        sys.path.pop(0)
    kinds = (ModelArguments, DataArguments, LlavaTrainingArguments)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert fields <= known_flags()
