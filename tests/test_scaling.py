"""The benchmarks of start and scale: what they work out, against figures from elsewhere."""

import pytest

from benchmarks.scaling.projection import Share, sent, step
from benchmarks.speed.startup import split


def test_start_is_split_by_what_the_main_thread_did():
    notes = [
        ["start", "100.5", "0.0", "python -m deepspeed.launcher.runner --module train_llava.train"],
        ["start", "101.5", "0.0", "python -u -m deepspeed.launcher.launch train_llava.train"],
        ["start", "103.0", "0.1", "python -u -m train_llava.train --local_rank=0"],
        ["look", "105.0", "2.1", "_run_module_as_main <module> _find_and_load exec_module"],
        ["look", "105.5", "2.5", "_run_module_as_main <module> wrapper main load from_pretrained _find_and_load"],
        ["look", "106.0", "2.6", "main train _inner_training_loop _prepare_for_training initialize"],
        ["look", "107.0", "3.0", "main train _inner_training_loop _run_epoch training_step"],
        ["look", "109.0", "9.0", "main train _inner_training_loop _run_epoch training_step"],
    ]
    found = split(notes, begun=100.0)
    seconds, cpu = found["seconds"], found["cpu_of_rank_0"]
    assert (seconds["script"], seconds["launcher"], seconds["imports"]) == (0.5, 2.5, 2.0)
    assert (seconds["model"], seconds["DeepSpeed"], seconds["first batch"], seconds["all"]) == (0.5, 0.5, 1.0, 7.0)
    assert cpu["imports"] == 2.0 and cpu["all"] == pytest.approx(2.9)


def test_zero2_sends_what_the_paper_says_and_deepspeed_was_seen_to_reduce():
    """DeepSpeed 0.19.8 was given 2,000,000 parameters, 2 ranks and 4 accumulated batches, and its calls were counted:
    all-reduces of 8,000,000 elements, or without `use_multi_rank_bucket_allreduce` reductions of as many."""
    reduced, gathered = sent(2_000_000, gpus=2, accumulated=4)
    assert reduced == 2 * 8_000_000 * 2 * (2 - 1) / 2  # twice the bf16 bytes, the factor of an all-reduce in a ring
    assert gathered == 2_000_000 * 2 / 2
    # section 7.2.1: with one batch, twice the parameters in all, for a large number of GPUs
    assert sum(sent(1_000_000, 10**9, 1, all_reduce=False)) == pytest.approx(2 * 2 * 1_000_000)


def test_hours_on_paper():
    """12.73 TFLOP at 40% of 989 TFLOP/s are 31 samples a second; 8 GPUs accumulate 8 batches of 4."""
    one = step(Share(12.73e12, 3_959_549_440), gpus=8, cards=0)
    assert 32 / one.compute == pytest.approx(0.4 * 989 / 12.73)
    assert one.reduce == pytest.approx(8 * 2 * 3.96e9 * 2 * 7 / 8 / 450e9, rel=1e-3)
    assert one.fastest < one.slowest == pytest.approx(one.compute + one.reduce + one.gather + one.update)
