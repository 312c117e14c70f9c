"""The loss and every gradient against the plain Hugging Face model, for every train_type."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, Trainer

from train_llava.arguments import LlavaTrainingArguments, ModelArguments
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.load import load
from train_llava.train_type import apply_train_type
from train_llava.trainer import LlavaTrainer

TRAIN_TYPES = ["use_lora", "freeze_vision", "none", "projector"]


def trainer_of(cls, llava, data, tmp_path, train_type, **flags):
    torch.manual_seed(0)
    model, processor = load(llava, dtype=torch.float32)
    args = ModelArguments(model_name_or_path=str(llava), train_type=train_type, lora_dropout=0.0)
    model = apply_train_type(model, args)
    flags = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "save_strategy": "no", **flags}
    flags = LlavaTrainingArguments(disable_tqdm=True, **flags)
    return cls(model, flags, data_collator=LlavaCollator(processor), train_dataset=LlavaDataset(data))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, plain):
    assert ours.keys() == plain.keys() and len(ours) > 0
    scale = max(value.abs().max() for value in plain.values())
    for name, value in ours.items():
        # relative to the tensor's own size, down to where fp32 sums are noise
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=float(1e-6 * scale), msg=name)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_loss_and_gradients_equal_the_plain_model(llava, data, tmp_path, train_type):
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, train_type)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    model = trainer.model.train()
    if train_type == "use_lora":  # B starts at zero, which hides A's gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)

    plain = model(**batch).loss  # all logits, transformers' own loss
    plain.backward()
    expected = gradients(model)
    model.zero_grad()
    ours = trainer.compute_loss(model, batch)
    ours.backward()
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    assert_close(gradients(model), expected)


def test_only_supervised_rows_reach_the_head(llava, data, tmp_path):
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "freeze_vision")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape[0] == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_accumulation_with_uneven_labels_equals_one_batch(llava, data, tmp_path, train_type):
    """8 micro-batches of 1 against the plain model on the batch of 8: a mean over all tokens, not of means."""
    trainer = trainer_of(
        *(LlavaTrainer, llava, data, tmp_path, train_type),
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 1, "max_grad_norm": 0},
    )
    seen = {}
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients(trainer.model)))
    torch.manual_seed(0)
    expected_batch = []
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: expected_batch.extend(examples) or collate(examples)
    trainer.train()
    del expected_batch[8:]  # the loader reads ahead
    counts = [int((collate([example])["labels"] != -100).sum()) for example in expected_batch]
    assert len(set(counts)) > 1

    reference = trainer_of(Trainer, llava, data, tmp_path, train_type).model
    reference(**collate(expected_batch)).loss.backward()
    assert_close(seen, gradients(reference))


def test_training_equals_the_plain_trainer(llava, data, tmp_path):
    """Ten optimizer steps of everything in the same order, ours and transformers' own Trainer side by side."""
    flags = {"max_steps": 10, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
    flags |= {"learning_rate": 1e-3, "seed": 5, "train_sampling_strategy": "sequential"}
    runs = [trainer_of(cls, llava, data, tmp_path, "freeze_vision", **flags) for cls in (Trainer, LlavaTrainer)]
    for run in runs:
        run.train()
    plain, ours = ([log["loss"] for log in run.state.log_history if "loss" in log] for run in runs)
    assert ours == pytest.approx(plain, rel=1e-4) and len(ours) == 10
    weights = [run.model.state_dict() for run in runs]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_held_out_loss_equals_the_plain_model(llava, data, tmp_path):
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector", per_device_eval_batch_size=64)
    dataset = LlavaDataset(data)
    batch = next(iter(DataLoader(dataset, batch_size=64, collate_fn=trainer.data_collator)))
    with torch.no_grad():
        expected = LlavaForConditionalGeneration.from_pretrained(llava)(**batch).loss.item()
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5)
