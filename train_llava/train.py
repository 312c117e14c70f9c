"""Trains a LLaVA. `run_zero2.sh` starts this under DeepSpeed; torchrun or plain python work too:

    python -m train_llava.train --model_name_or_path models/llava --data_path data/LLaVA-CC3M-Pretrain-595K \\
        --train_type use_lora --output_dir output/first
"""

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import HfArgumentParser, PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from train_llava.arguments import DataArguments, LlavaTrainingArguments, ModelArguments
from train_llava.callbacks import ProgressLine
from train_llava.command import InputError, command
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.load import load
from train_llava.output_dir import checkpoint_to_resume, claim_output_dir
from train_llava.parts import parts_table
from train_llava.train_type import apply_train_type
from train_llava.trainer import LlavaTrainer


@command
def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, LlavaTrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    checkpoint = checkpoint_to_resume(args)
    claim_output_dir(args, checkpoint)

    # DeepSpeed with bf16 keeps fp32 master weights of its own; everywhere else the weights themselves are the masters
    dtype = torch.bfloat16 if args.deepspeed and args.bf16 else torch.float32
    model, processor = load(model_args.model_name_or_path, dtype=dtype)
    if isinstance(model, PeftModel):
        raise InputError(f"{model_args.model_name_or_path}: an adapter; give --model_name_or_path a whole model.")
    train_dataset = LlavaDataset(data_args.data_path)
    eval_dataset = LlavaDataset(data_args.eval_data_path) if data_args.eval_data_path else None
    model = apply_train_type(model, model_args)
    if args.process_index == 0:
        print(f"--train_type {model_args.train_type}\n{parts_table(model)}", flush=True)

    # the processor is saved beside the weights in every checkpoint
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": LlavaCollator(processor)}
    trainer = LlavaTrainer(model, args, processing_class=processor, callbacks=[ProgressLine()], **data)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    trainer.save_model()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
