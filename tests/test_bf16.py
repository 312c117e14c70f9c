"""In bf16: which weights are held in it, and the loss, whose sums are in fp32."""

import torch
from conftest import call
from torch import nn
from training import weights

from train_llava import train
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.load import load
from train_llava.model.loss import patch_forward


def test_without_deepspeed_the_weights_stay_in_fp32(llava, data, tmp_path):
    """They are the optimizer's masters, in which small updates would vanish; under DeepSpeed see test_finite.py."""
    flags = ["--model_name_or_path", llava, "--data_path", data, "--output_dir", tmp_path / "run", "--use_cpu", "true"]
    flags += ["--bf16", "true", "--train_type", "projector", "--max_steps", 1, "--report_to", "none"]
    done = call(train.main, *flags, "--per_device_train_batch_size", 2)
    assert done.returncode == 0, done.stderr
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}
    assert "float32" in done.stdout and "bfloat16" not in done.stdout


def test_the_loss_of_a_model_in_bf16_is_in_fp32(llava, data):
    """Equal to cross entropy of the plain model's logits, cast first."""
    plain, processor = load(llava, dtype=torch.bfloat16)
    batch = LlavaCollator(processor)([LlavaDataset(data)[i] for i in range(6)])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = plain(**batch).logits[:, :-1].float()
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        ours = load(llava, dtype=torch.bfloat16)[0]
        patch_forward(ours)
        loss = ours.train()(**batch, labels=labels).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
