"""--global_batch_size: what it makes of the other two flags, what it refuses, and what auto chooses.

That the losses are equal is in test_equality.py.
"""

import re
from itertools import product

import pytest
from conftest import call

from train_llava import train
from train_llava.cli import InputError
from train_llava.planning import micro_batch
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.planning.micro_batch import choose_micro_batch, smaller_micro_batch
from train_llava.training.resume import same_batch


def flags(monkeypatch, ranks, **given):
    monkeypatch.setattr(LlavaTrainingArguments, "world_size", ranks)
    return LlavaTrainingArguments(output_dir="x", use_cpu=True, **given)


def test_what_is_accepted_makes_the_batch_and_what_is_refused_cannot(monkeypatch):
    """All small cases; of what is refused, the numbers that the message names are those that are accepted."""
    for samples, ranks, size in product(range(1, 25), (1, 2, 3, 8), range(1, 10)):
        given = {"global_batch_size": samples, "per_device_train_batch_size": size}
        if samples % (size * ranks) == 0:
            args = flags(monkeypatch, ranks, **given)
            assert args.step_factors["per_device_train_batch_size"] == size and args.step_size == samples
            continue
        with pytest.raises(InputError) as refused:
            flags(monkeypatch, ranks, **given)
        if samples % ranks:
            named = [int(n) for n in re.search(r": give (.*)\.$", str(refused.value))[1].split(" or ")]
            assert named == [n for n in range(1, samples + ranks) if n % ranks == 0 and abs(n - samples) < ranks]
        else:
            named = [int(n) for n in re.search(r"Give one of (.*), or auto", str(refused.value))[1].split(", ")]
            assert named == [n for n in range(1, samples + 1) if samples % (n * ranks) == 0]


def test_without_it_the_flags_are_trainers(monkeypatch):
    assert flags(monkeypatch, 2).step_size == 8 * 1 * 2
    args = flags(monkeypatch, 2, per_device_train_batch_size=3, gradient_accumulation_steps=5)
    assert [*args.step_factors.values()] == [3, 5, 2]


def test_all_three_must_agree(monkeypatch):
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert flags(monkeypatch, 2, global_batch_size=16, **given).gradient_accumulation_steps == 4
    with pytest.raises(InputError, match=r"2 x 4 x 2 ranks are 16 samples in a step, and --global_batch_size says 32"):
        flags(monkeypatch, 2, global_batch_size=32, **given)


@pytest.mark.parametrize("given", [{}, {"global_batch_size": 8, "gradient_accumulation_steps": 2}])
def test_auto_needs_the_global_batch_and_nothing_else(monkeypatch, given):
    with pytest.raises(InputError, match="auto: give --global_batch_size with it"):
        flags(monkeypatch, 1, per_device_train_batch_size="auto", **given)


@pytest.mark.parametrize("name", ["global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", ["0", "-1", "some"])
def test_no_numbers(tmp_path, name, value):
    done = call(train.main, "--model_name_or_path", "m", "--data_path", "d", f"--{name}={value}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--{name}" in done.stderr and f"{value!r} is not a whole number" in done.stderr


@pytest.mark.parametrize(
    "samples, ranks, most, chosen",
    [
        (32, 1, 40, 32), (32, 1, 31, 16), (32, 2, 40, 16), (48, 1, 23, 16), (48, 1, 47, 24),
        (15, 1, 14, 5), (7, 1, 6, 1),
        (32, 1, 0, 1),  # not even one; the memory line says so
        (256, 1, 999, 64), (130, 1, 999, 26),  # never more than 64
    ],
)  # fmt: skip
def test_auto_takes_the_largest_divisor_that_fits(monkeypatch, samples, ranks, most, chosen):
    args = flags(monkeypatch, ranks, per_device_train_batch_size="auto", global_batch_size=samples)
    assert args.step_size == samples  # already, with batches of one
    assert choose_micro_batch(lambda size: size <= most, args) == chosen


def test_all_ranks_take_the_least_of_their_answers(monkeypatch):
    monkeypatch.setattr(micro_batch, "gather_object", lambda answer: [*answer, 4, 8])
    args = flags(monkeypatch, 1, per_device_train_batch_size="auto", global_batch_size=32)
    assert choose_micro_batch(lambda size: size <= 16, args) == 4
    assert choose_micro_batch(lambda size: size <= 2, args) == 2


def test_a_limit_of_a_former_start(monkeypatch, tmp_path):
    args = flags(monkeypatch, 1, per_device_train_batch_size="auto", global_batch_size=48)
    assert not micro_batch.write_limit(12)
    monkeypatch.setenv(micro_batch.LIMIT_FILE, str(tmp_path / "limit"))
    (tmp_path / "limit").touch()  # as the script makes it
    assert choose_micro_batch(lambda size: True, args) == 48
    assert micro_batch.write_limit(11)
    assert choose_micro_batch(lambda size: True, args) == 8


@pytest.mark.parametrize("size, smaller", [(48, 24), (24, 12), (16, 8), (3, 1), (2, 1), (1, 0)])
def test_the_next_smaller_one_is_half_or_less(monkeypatch, size, smaller):
    args = flags(monkeypatch, 1, per_device_train_batch_size=size, global_batch_size=48)
    assert smaller_micro_batch(args) == smaller


def test_a_resumed_run_is_told_the_global_batch_of_its_checkpoint(monkeypatch):
    args = flags(monkeypatch, 8, per_device_train_batch_size="auto", global_batch_size=32)
    assert same_batch(256, args) == "Give --global_batch_size 256."
    args = flags(monkeypatch, 2, per_device_train_batch_size=4)
    assert same_batch(12, args) == "Give --per_device_train_batch_size 3 --gradient_accumulation_steps 2."
