"""The loss and every gradient against the plain Hugging Face model, for every train_type."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from trainers import TRAIN_TYPES, assert_close, gradients, mixed_examples, plain_and_ours, trainer_of
from transformers import LlavaForConditionalGeneration, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model import loss as forward
from train_llava.model.load import load, load_processor
from train_llava.training.trainer import LlavaTrainer


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
@pytest.mark.parametrize("chunk", [512, 7])
def test_loss_and_gradients_equal_the_plain_model(llava, data, tmp_path, train_type, chunk, monkeypatch):
    """What training really sends (bytes, no mask) against all logits and transformers' own loss; long answers, too,
    for which the head works in chunks."""
    monkeypatch.setattr(forward, "CHUNK", chunk)
    plain, ours = plain_and_ours(llava, data, tmp_path, train_type)
    examples = [ours.train_dataset[i] for i in range(6)]
    expected = plain.model(**plain.data_collator(examples)).loss
    expected.backward()
    batch = LlavaCollator(load_processor(llava), for_trainer=True)(examples)
    assert "attention_mask" not in batch and batch["pixel_values"].data.dtype == torch.uint8
    assert int((batch["labels"] != -100).sum()) > 2 * 7
    ours.data_collator = LlavaCollator(load_processor(llava), for_trainer=True)
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    assert_close(gradients(ours.model), gradients(plain.model))


@pytest.mark.parametrize("train_type", ["use_lora", "freeze_vision"])
@pytest.mark.parametrize("chunk", [512, 7])
def test_smoothed_labels(llava, data, tmp_path, train_type, chunk, monkeypatch):
    """Loss and gradients equal transformers' own smoother, told that this model predicts the next token: its Trainer,
    which does not know so of a LLaVA, would compare each position with its own token."""
    monkeypatch.setattr(forward, "CHUNK", chunk)
    plain, ours = plain_and_ours(llava, data, tmp_path, train_type)
    for trainer in (plain, ours):
        trainer.model.lm_head.weight.data *= 50  # a random model finds all tokens alike: no smoothing would be seen
    examples = [ours.train_dataset[i] for i in range(6)]
    batch = plain.data_collator(examples)
    expected = LabelSmoother(epsilon=0.5)(plain.model(**batch), batch["labels"], shift_labels=True)
    expected.backward()
    flags = {"label_smoothing_factor": 0.5}
    smoothed = trainer_of(LlavaTrainer, llava, data, tmp_path, train_type, **flags)
    smoothed.model.load_state_dict(ours.model.state_dict())
    smoothed.data_collator = LlavaCollator(load_processor(llava), for_trainer=True)
    loss = smoothed.compute_loss(smoothed.model.train(), smoothed.data_collator(examples))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients(smoothed.model), gradients(plain.model))
    assert abs(loss.item() - plain.model(**batch).loss.item()) > 0.005


def test_only_what_the_loss_needs_is_computed(llava, data, tmp_path):
    """Supervised rows in the head, no layer that LLaVA does not read, attention without a mask and without a cache."""
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "freeze_vision")
    trainer.data_collator = LlavaCollator(load_processor(llava), for_trainer=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    seen = {}

    def saw(module, args, kwargs, output):
        seen[module] = (args, kwargs)

    inner = trainer.model.model
    unused, attention = inner.vision_tower.encoder.layers[-1].mlp, inner.language_model.layers[0].self_attn
    for module in (trainer.model.lm_head, unused, attention):
        module.register_forward_hook(saw, with_kwargs=True)
    trainer.compute_loss(trainer.model, batch)
    assert seen[trainer.model.lm_head][0][0].shape[0] == int((batch["labels"] != -100).sum())
    assert unused not in seen
    given = seen[attention][1]  # transformers before 5.24 names its cache past_key_values
    assert given["attention_mask"] is None and given["cache" if "cache" in given else "past_key_values"] is None


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


@pytest.mark.parametrize("side", ["left", "right", "without a mask"])
def test_the_hidden_image_of_a_text_batch_changes_nothing(llava, data, side):
    """But the projector and the tower get a gradient, of zero, as DeepSpeed and DDP need on every rank."""
    model, processor = load(llava)
    processor.tokenizer.padding_side = side if side == "left" else "right"
    texts = mixed_examples(data)[1::2]
    batch = LlavaCollator(processor)(texts)
    assert batch["pixel_values"].shape[0] == 1
    plain = processor.tokenizer(
        [processor.apply_chat_template(text["messages"]) for text in texts], padding=True, return_tensors="pt"
    )
    labels = torch.full_like(plain.input_ids, -100)
    own = (batch["labels"] != -100).nonzero()
    assert len(own) > 0
    for row in range(2):  # the same labels at the same real tokens
        real = batch["attention_mask"][row].bool()
        labels[row, plain.attention_mask[row].bool()] = batch["labels"][row, real]
        assert torch.equal(batch["input_ids"][row, real], plain.input_ids[row, plain.attention_mask[row].bool()])
    if side == "without a mask":
        del batch["attention_mask"]
    loss = model(**batch).loss
    loss.backward()
    with_image = gradients(model)
    model.zero_grad()
    expected = model(**plain, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(with_image[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    projector = [value for name, value in with_image.items() if "projector" in name]
    assert len(projector) == 4 and not any(value.any() for value in projector)


def test_packed_equals_unpacked_and_nothing_leaks(llava, data):
    model, processor = load(llava)
    examples = mixed_examples(data)
    packed, padded = (LlavaCollator(processor, packing=packing)(examples) for packing in (True, False))
    assert packed["input_ids"].shape[0] == 1
    assert packed["input_ids"].shape[1] == padded["attention_mask"].sum()
    real = padded["attention_mask"].bool()
    assert torch.equal(packed["labels"][0], padded["labels"][real])
    ours, theirs = model(**packed), model(**padded)
    torch.testing.assert_close(ours.logits[0], theirs.logits[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss)

    embeds = model.get_input_embeddings()(packed["input_ids"]).detach().requires_grad_()
    positions = packed["position_ids"]
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]
    language_model = model.model.language_model
    hidden = language_model(inputs_embeds=embeds, position_ids=positions, use_cache=packed["use_cache"])
    hidden.last_hidden_state[0, starts[1] : starts[2]].sum().backward()
    reached = embeds.grad[0].abs().sum(-1) > 0
    assert reached[starts[1] : starts[2]].all()
    assert not reached[: starts[1]].any() and not reached[starts[2] :].any()


@pytest.mark.parametrize("packing", [False, True])
def test_packing_and_bytes_give_the_plain_gradients(llava, data, tmp_path, packing):
    """Batches with and without images as training really sends them: as bytes, packed or padded."""
    plain, ours = plain_and_ours(llava, data, tmp_path, "none")
    examples = mixed_examples(data)
    ours.data_collator = LlavaCollator(load_processor(llava), for_trainer=True, packing=packing)
    ours.compute_loss(ours.model, ours.data_collator(examples)).backward()
    plain.model(**plain.data_collator(examples)).loss.backward()
    assert_close(gradients(ours.model), gradients(plain.model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_passes_before_one_backward(llava, data, tmp_path, reentrant):
    """Under checkpointing, which runs each pass once more: with the answers of its own batch, not of the last one."""
    plain, ours = plain_and_ours(llava, data, tmp_path, "none")
    batches = [ours.data_collator([ours.train_dataset[i] for i in rows]) for rows in ((0, 1, 2), (10, 11))]
    for trainer in (plain, ours):
        kwargs = {"use_reentrant": reentrant}
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        sum(trainer.model(**batch).loss for batch in batches).backward()
    assert_close(gradients(ours.model), gradients(plain.model))


def test_hidden_states_after_a_labelled_pass(llava, data, tmp_path):
    """Of the whole model and of its parts alone: nothing of the pass with labels is left."""
    plain, ours = plain_and_ours(llava, data, tmp_path, "none")
    batch = ours.data_collator([ours.train_dataset[i] for i in range(3)])
    ours.model(**batch)
    images, words = {"pixel_values": batch["pixel_values"]}, {"input_ids": batch["input_ids"]}
    asked = {"": images | words, "model": images | words, "model.language_model": words, "model.vision_tower": images}
    for part, inputs in asked.items():
        with torch.no_grad():
            theirs, own = (
                trainer.model.get_submodule(part)(**inputs, output_hidden_states=True).hidden_states
                for trainer in (plain, ours)
            )
        assert len(own) == len(theirs) > 1 and all(map(torch.equal, own, theirs)), part


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_a_batch_without_examples_changes_nothing(llava, data, tmp_path, train_type):
    """As a rank may get at the end of an epoch: every trained weight has a gradient, and it is zero."""
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, train_type)
    trainer.data_collator = LlavaCollator(load_processor(llava), for_trainer=True)
    trainer.model.train()
    batch = trainer.data_collator([])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    expected = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    found = gradients(trainer.model)
    assert found.keys() == expected and not any(value.any() for value in found.values())


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for a GPU, to learn a value or how many there are."""

    NAMES = ("nonzero", "_local_scalar_dense", "masked_select", "equal", "unique2", "_unique2", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.NAMES:
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_a_micro_step_waits_for_nothing(llava, data, tmp_path, train_type, packing, monkeypatch):
    """Neither forward nor backward, chunks included. Without what the collator tells it does wait, and losses and
    gradients are the same to the last bit."""
    monkeypatch.setattr(forward, "CHUNK", 7)
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, train_type)
    trainer.data_collator = LlavaCollator(load_processor(llava), for_trainer=True, packing=packing)
    trainer.model.train()
    batch = trainer.data_collator(mixed_examples(data))
    told = {"answer_rows", "targets", "image_rows", *(["sequence_ids"] if packing else [])}
    found = []
    for inputs in (batch, {name: value for name, value in batch.items() if name not in told}):
        trainer.model.zero_grad()
        with Waits() as waits:
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(20))
            loss.backward()
        found.append((waits.found, loss, gradients(trainer.model)))
    (none, loss, ours), (some, other, plain) = found
    assert none == [] and {"aten::nonzero", "aten::_local_scalar_dense"} <= {*some}
    assert torch.equal(loss, other) and all(torch.equal(ours[name], plain[name]) for name in plain)
