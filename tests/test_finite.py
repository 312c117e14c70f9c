"""Losses, gradients and weights that are no numbers: counted, named, and never saved."""

import json
import re

import pytest
from trainers import trainer_of
from training import zero2
from transformers import IntervalStrategy, TrainerCallback

from train_llava.data import LlavaCollator
from train_llava.model.load import load_processor
from train_llava.training.finite import MOST_BATCHES, MOST_SKIPPED
from train_llava.training.trainer import LlavaTrainer

SILENT = {"logging_strategy": "no"}


@pytest.mark.parametrize("flags", [{"logging_steps": 1}, SILENT, {**SILENT, "max_grad_norm": 0}])
def test_without_deepspeed_it_ends_the_run(llava, data, tmp_path, flags):
    """Also when it is the last step, and nothing is logged: the weights are ruined, and not saved."""
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector", max_steps=2, **flags)

    def spoil(gradient):  # the loss stays what it is
        return gradient * float("inf") if trainer.state.global_step == 1 else gradient

    trainer.model.model.multi_modal_projector.linear_1.weight.register_hook(spoil)
    with pytest.raises(RuntimeError, match=r"gradient is (nan|inf) at step 2|hold values that are NaN or infinite"):
        trainer.train()
        trainer.save_model()
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_the_step_and_its_records_are_named(llava, data, tmp_path, value):
    """Of the loss that is no number itself, not of a neighbour's; a held-out loss like that is none of theirs."""
    flags = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 4, "eval_steps": 2}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector", **flags)
    trainer.data_collator = LlavaCollator(load_processor(llava), for_trainer=True)
    trainer.eval_dataset = [trainer.train_dataset[i] for i in range(2)]
    trainer.args.eval_strategy = IntervalStrategy.STEPS
    _, _, third, *_ = trainer.get_train_dataloader().batch_sampler
    records = ", ".join(trainer.train_dataset[i]["id"] for i in third)

    def spoil(model, args, output):
        if not model.training or trainer.state.global_step == 2:  # during the third step
            output.loss = output.loss * float(value)

    trainer.model.register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match=f"the loss is {value} at step 3, records {records}\\."):
        trainer.train()


def test_losses_are_looked_at_without_a_log(llava, data, tmp_path):
    flags = {"max_steps": MOST_BATCHES + 60, "per_device_train_batch_size": 1, **SILENT}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector", **flags)
    kept = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(len(trainer.finite.losses))
            if state.global_step == 20:
                trainer.model.model.multi_modal_projector.linear_1.weight.data.fill_(float("nan"))

    trainer.add_callback(Watch())
    with pytest.raises(RuntimeError, match="the loss is nan at step 21, records "):
        trainer.train()
    assert max(kept) <= MOST_BATCHES + 1


@pytest.mark.parametrize(
    "count, flags",
    [pytest.param(2, [], marks=pytest.mark.slow), (MOST_SKIPPED, ["--logging_strategy", "no"])],
)
def test_deepspeed_counts_the_steps_that_it_skips(llava, data, tmp_path, count, flags):
    """Under ZeRO-2 and bf16, whose overflow check passes over a step without a word; here from the third on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'train_llava.train' in ' '.join(sys.orig_argv):\n"
        "    import torch\n"
        "    plain, done = torch.Tensor.backward, [0]\n"
        "    def backward(self, *args, **kwargs):\n"
        "        done[0] += 1\n"
        f"        factor = float('inf') if 2 < done[0] <= {2 + count} else 1.0\n"
        "        return plain(self * factor, *args, **kwargs)\n"
        "    torch.Tensor.backward = backward\n"
    )
    more = ["--bf16", "true", "--max_steps", 14, *flags]
    done = zero2(llava, data, tmp_path / "run", "freeze_vision", *more, PYTHONPATH=str(tmp_path))
    assert re.search(r"^language model .* bfloat16$", done.stdout, re.M)  # DeepSpeed has masters in fp32
    if count < MOST_SKIPPED:
        assert done.returncode == 0, done.stderr[-2000:]
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        assert sum(log.get("skipped_steps", 0) for log in history) == count
        assert f"{count} steps were skipped: their gradients were not finite" in done.stdout
        assert "1 skipped  grad" in done.stdout
    else:
        assert done.returncode != 0
        assert "the gradients of steps 3 to 12 are not finite" in done.stdout + done.stderr
        assert not (tmp_path / "run" / "model.safetensors").exists()
