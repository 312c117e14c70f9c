"""The HF Trainer with our forward pass (model/loss.py), order of records (sampler.py), checkpoints and log."""

from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINING_ARGS_NAME

from train_llava.cli import UNFINISHED, InputError
from train_llava.data import LlavaDataset
from train_llava.model.adapters import check_resumable_adapter, record_base
from train_llava.model.folder import CARD, make_readable, put_in_place, upload
from train_llava.model.fused_lora import fuse_lora
from train_llava.model.loss import patch_forward
from train_llava.model.structure import LORA_B, PROJECTOR, VISION, learning_rate_group, llava_in
from train_llava.model.weights import take_stored_names
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.processing.images import PixelBytes
from train_llava.training.callbacks import ThroughputCallback
from train_llava.training.fault_tolerance import delay_forks_for_gloo, ignore_signals_in_worker
from train_llava.training.finite import FiniteCallback
from train_llava.training.first_step import FirstStepCallback
from train_llava.training.flag_checks import check_one_gpu
from train_llava.training.held_out import held_out_score, mean_loss
from train_llava.training.resume import write_run
from train_llava.training.sampler import LlavaSampler, PackBatches, PackSampler, RankBatches, SetEpochCallback
from train_llava.training.step import ReduceOnceCallback, walk_once


class LlavaTrainer(Trainer):
    """What differs from transformers' Trainer:

    - loss and gradients equal the plain ones, but logits are computed where a token is to be predicted alone
    - the held-out loss is the mean over all supervised tokens, not a mean of batches' means
    - records come in the order of sampler.py; each is in one step of one rank, none is repeated
    - components may have learning rates of their own
    - a loss, gradient or weight that is not finite ends the run before anything of it is saved
    - the log has samples and tokens per second, memory, and the share of the time spent waiting for data
    - a rank copies to the host only what it saves, and the model at the end replaces an older one when it is whole
    - an adapter is saved with what tells its base, a checkpoint with what tells its run

    `run` holds what resume.py wants to find in a checkpoint.
    """

    run: dict[str, Any] | None = None
    batches: RankBatches | None = None  # those of the training's loader

    def __init__(self, *args, **kwargs) -> None:
        self.throughput = ThroughputCallback()
        check_one_gpu(kwargs["args"] if "args" in kwargs else args[1])
        super().__init__(*args, compute_metrics=mean_loss, **kwargs)
        self.finite = FiniteCallback(self.accelerator)
        self.first_step = FirstStepCallback()
        self.reduction = ReduceOnceCallback(self.accelerator)
        for callback in (self.throughput, self.finite, self.first_step, SetEpochCallback(), self.reduction):
            self.add_callback(callback)
        self.label_smoother = None  # transformers' own would compare each position with its own token, not the next
        patch_forward(llava_in(self.model), self.args.label_smoothing_factor)
        walk_once(self.model)
        if not isinstance(self.model, PeftModel):
            take_stored_names(self.model)
        elif not (is_deepspeed_zero3_enabled() or self.is_fsdp_enabled):  # there a layer's own call makes weights whole
            fuse_lora(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        """Tells accelerate how often DeepSpeed accumulates; it would take over the same number, with a warning."""
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps

    def checkpoint_state_dict(self) -> dict[str, torch.Tensor]:
        """Copies in the host's memory of what a checkpoint holds: all weights, or with adapters the trained ones."""
        adapters = isinstance(self.model, PeftModel)
        state = self.model.state_dict(keep_vars=True)
        chosen = {name: value for name, value in state.items() if value.requires_grad or not adapters}
        copies: dict[int, torch.Tensor] = {}  # one of a head that is the embedding table
        for value in chosen.values():
            if id(value) not in copies:
                copies[id(value)] = value.detach().to("cpu", copy=True)
        return {name: copies[id(value)] for name, value in chosen.items()}

    def load_universal_checkpoint(self) -> None:
        """Lets DeepSpeed resume from the checkpoint that `resume.convert_ranks` has made."""
        self.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> Any:
        """Trains, from a checkpoint only if its adapter is whole and belongs to this base.

        Raises:
            InputError: see `check_resumable_adapter`.
        """
        if resume_from_checkpoint and isinstance(self.model, PeftModel):
            check_resumable_adapter(Path(resume_from_checkpoint), self.model)
        with self.first_step.halving(self.args):
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except BaseException:
                self.reduction.abandon()
                raise

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args, **kwargs) -> Any:
        """The loss over the supervised tokens of the whole global batch; remembers what the log reports."""
        inputs = {**inputs}
        ids, counts = inputs.pop("ids", None), inputs.pop("counts", {})
        if isinstance(inputs["pixel_values"], PixelBytes):
            inputs["pixel_values"] = inputs["pixel_values"].normalise()
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = result[0] if isinstance(result, tuple) else result
            self.finite.add_loss(self.state.global_step + 1, ids or [], loss)
            self.throughput.add(len(inputs["input_ids"] if ids is None else ids), counts)
        return result

    def prediction_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args, **kwargs) -> tuple:
        """What `mean_loss` needs of a held-out batch. Trainer's own result is a mean of batches' means, those that fill
        up the last round of the ranks included, and so depends on how records are shared out."""
        _, table, _ = super().prediction_step(model, inputs, False)
        return None, table, table

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every record once and in a row of its own, whatever --dataloader_drop_last and --packing ask of training."""
        collator, args = copy(self.data_collator), self.args
        collator.packing = False
        loader = DataLoader(
            eval_dataset or self.eval_dataset,
            args.eval_batch_size,
            collate_fn=collator,
            **self._worker_options(),
        )
        return self.accelerator.prepare(loader)

    def evaluation_loop(self, dataloader: DataLoader, *args, metric_key_prefix: str = "eval", **kwargs) -> Any:
        """With --eval_generate adds the score of the model's answers to what Trainer logs and chooses the best by."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.eval_generate:
            alive = partial(self.callback_handler.on_prediction_step, self.args, self.state, self.control)
            scores = held_out_score(self.model, self.processing_class, dataloader.dataset, self.args, alive)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def _worker_options(self) -> dict[str, Any]:
        """How a loader starts its workers."""
        args = self.args
        workers, context = args.dataloader_num_workers, args.dataloader_multiprocessing_context
        return {
            "num_workers": workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": delay_forks_for_gloo(context) if workers else context,
            "worker_init_fn": ignore_signals_in_worker,
        }

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluates; the time that this takes does not count as training."""
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Any]:
        """The batches of the next step; the time that they take counts as waiting for data."""
        with self.throughput.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Operations of a batch, for the sum in trainer_state.json (see flops.py). Trainer's own count walks through
        all parameters at every batch, and takes the frozen ones for trained."""
        return self.throughput.flops.of(**inputs["counts"]) if "counts" in inputs else 0.0

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds speed, memory and skipped steps to the log, and checks every loss since the last log: on a GPU this is
        free only now, when all has waited anyway.

        Raises:
            RuntimeError: see `FiniteCallback.check`.
        """
        self.finite.check()
        if "loss" in logs:
            logs |= self.throughput.read(self.args, self.state)
            if self.finite.skipped:
                logs["skipped_steps"], self.finite.skipped = self.finite.skipped, 0
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a checkpoint, or without `output_dir` the model at the end, which takes its place when it is whole.

        Raises:
            RuntimeError: see `FiniteCallback`.
        """
        self.finite.check()
        self.finite.check_weights(self.model)
        folder = Path(output_dir or Path(self.args.output_dir) / f"{UNFINISHED}model")
        if self.is_deepspeed_enabled and not is_deepspeed_zero3_enabled():
            if self.args.should_save:  # Trainer's own would have every rank copy the whole model
                self.model.save_pretrained(folder, state_dict=self.checkpoint_state_dict())
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
                torch.save(self.args, folder / TRAINING_ARGS_NAME)
        else:
            super().save_model(str(folder), _internal_call=True)  # it would push what is not in its place yet
        if self.args.should_save:
            self._finish_folder(folder, is_checkpoint=bool(output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs) -> None:
        """Uploads what is in the output folder. Trainer's own saves once more, replaces the card, and uploads logs."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.is_world_process_zero():
            where = {"token": self.args.hub_token, "revision": self.args.hub_revision}
            upload(Path(self.args.output_dir), self.hub_model_id, commit_message=commit_message, **where)

    def _finish_folder(self, folder: Path, is_checkpoint: bool) -> None:
        """Adds what a saved model still lacks; moves the one at the end to its place."""
        if self.run and is_checkpoint:
            write_run(folder, self.run)
        if isinstance(self.model, PeftModel):
            record_base(folder, self.model)
            (folder / CARD).unlink(missing_ok=True)  # PEFT's, to be filled in by hand
        if is_checkpoint:
            make_readable(folder)
        else:
            put_in_place(folder, Path(self.args.output_dir))
            folder.rmdir()

    def create_optimizer(self, *args) -> torch.optim.Optimizer:
        """Trainer's optimizer, which spares biases and norms weight decay, with groups for components that have a
        learning rate of their own. (PEFT's create_loraplus_optimizer would give the projector's biases that of LORA_B.)

        Raises:
            InputError: a rate for a component that is frozen.
        """
        optimizer, ratio = super().create_optimizer(*args), self.args.loraplus_lr_ratio
        rates = {PROJECTOR: self.args.projector_learning_rate, VISION: self.args.vision_learning_rate}
        rates[LORA_B] = ratio and ratio * self.args.learning_rate
        component = {id(parameter): learning_rate_group(name) for name, parameter in self.model.named_parameters()}
        unused = {name for name, rate in rates.items() if rate is not None}
        for group in [*optimizer.param_groups]:
            for name, rate in rates.items():
                own = [parameter for parameter in group["params"] if component[id(parameter)] == name]
                if rate is not None and own:
                    group["params"] = [parameter for parameter in group["params"] if component[id(parameter)] != name]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
                    unused.discard(name)
        if unused:
            raise InputError(f"a learning rate is given for the {unused.pop()}, but nothing in it is trained.")
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this rank. Trainer's own loader would repeat the first records of an epoch at its end, so that all
        ranks get equally many."""
        if not isinstance(self.train_dataset, LlavaDataset):
            return super().get_train_dataloader()
        args, self.batches = self.args, self._rank_batches(self.train_dataset)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            **self._worker_options(),
        )
        # for one process, as the batches are this rank's already; a pinned batch is copied while the GPU works
        alone = {"num_processes": 1, "process_index": 0, "put_on_device": True}
        return prepare_data_loader(loader, args.device, non_blocking=args.dataloader_pin_memory, **alone)

    def _rank_batches(self, dataset: LlavaDataset) -> RankBatches:
        """This rank's micro-batches: of so many samples in the order that the flags ask for, or of so many tokens."""
        args = self.args
        places = (args.gradient_accumulation_steps, args.world_size, args.process_index, args.dataloader_drop_last)
        if args.tokens_per_batch is not None:
            records = np.repeat(np.arange(len(dataset)), dataset.weights.astype(int))
            packs = (args.tokens_per_batch, args.step_size, args.order_seed)
            return PackBatches(PackSampler(records, dataset.lengths[records], *packs), *places)
        if args.train_sampling_strategy == "sequential":
            order = SequentialSampler(dataset)
        else:
            weights = [source.weight for source in dataset.sources]
            grouped = args.train_sampling_strategy == "group_by_length"
            how = (dataset.lengths, args.step_size, grouped, args.order_seed)
            order = LlavaSampler(dataset.sizes, weights, *how, dataset.blocks)
        return RankBatches(order, args.train_batch_size, *places)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Samples in an epoch, weights counted."""
        batches = dataloader.batch_sampler
        return batches.samples if isinstance(batches, RankBatches) else super().num_examples(dataloader)

    def get_total_train_batch_size(self, args: LlavaTrainingArguments) -> int:
        """Samples in a step, for those per second of the whole run; packs hold as many on average."""
        if not isinstance(self.batches, PackBatches):
            return super().get_total_train_batch_size(args)
        return round(self.batches.samples * args.gradient_accumulation_steps / len(self.batches))
