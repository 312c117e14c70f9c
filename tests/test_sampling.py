"""The order of training: weights, determinism, the longest first, groups of similar length."""

from collections import Counter

import numpy as np
import pytest
from trainers import trainer_of

from train_llava.training.sampler import LlavaSampler, RankBatches, spread_over_lanes
from train_llava.training.trainer import LlavaTrainer


def sampler(grouped=False, seed=3, sizes=(60, 40), weights=(1, 1), batch=8):
    lengths = np.random.default_rng(0).integers(10, 500, sum(sizes))
    return LlavaSampler(list(sizes), list(weights), lengths, batch, grouped, seed)


def epoch(order, number):
    order.set_epoch(number)
    return list(order)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_has_every_record_once_in_an_order_fixed_by_seed_and_epoch(grouped):
    first, again, other = (epoch(sampler(grouped, seed), 1) for seed in (3, 3, 4))
    assert sorted(first) == list(range(100))
    assert first == again != other
    assert first != epoch(sampler(grouped), 2)


@pytest.mark.parametrize("grouped", [False, True])
def test_weights(grouped):
    order = sampler(grouped, weights=(2.5, 0.25))
    epochs = [Counter(epoch(order, number)) for number in (0, 1)]
    for seen in epochs:
        assert len(order) == seen.total() == 160
        assert sorted(seen[i] for i in range(60)) == [2] * 30 + [3] * 30
        assert sorted(seen[i] for i in range(60, 100)) == [0] * 30 + [1] * 10
    assert epochs[0] != epochs[1]  # the fractions are drawn anew


def test_shares_of_records_are_rounded():
    """As the length of the epoch is."""
    order = sampler(sizes=(50, 40, 3), weights=(0.99, 0.67, 1.2))
    for number in (0, 1):
        seen = epoch(order, number)
        counts = [sum(i in source for i in seen) for source in (range(50), range(50, 90), range(90, 93))]
        assert counts == [round(49.5), 27, 4] and len(seen) == len(order)


def test_the_data_seed_alone_decides_where_it_is_given(llava, data, tmp_path):
    def order(**seeds):
        trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, "projector", **seeds)
        return list(trainer.get_train_dataloader().batch_sampler)

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) == order(seed=5) != order(seed=1)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_longest_come_first(grouped):
    order = sampler(grouped)
    first = [order.lengths[i] for i in epoch(order, 0)[:8]]
    assert max(first) == order.lengths.max()
    if not grouped:
        assert sorted(first) == sorted(order.lengths)[-8:]
        later = [order.lengths[i] for i in epoch(order, 1)[:8]]  # when they have fitted once
        assert sorted(later) != sorted(first)


def test_groups_need_less_padding():
    def padding(order):
        lengths = order.lengths[list(order)].reshape(-1, 8)
        return (lengths.max(1, keepdims=True) - lengths).sum()

    assert padding(sampler(True, sizes=(600, 200))) < 0.2 * padding(sampler(False, sizes=(600, 200)))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("size", "accumulation", "ranks"), [(4, 1, 1), (2, 3, 2), (3, 2, 4), (1, 5, 3)])
@pytest.mark.parametrize("records", [24, 100, 101, 7])
def test_every_place_of_the_order_is_in_one_step_of_one_rank(size, accumulation, ranks, drop_last, records):
    """All ranks have equally many micro-batches; a step's are together the next places of the order."""
    order = np.random.default_rng(0).permutation(records).tolist()
    loaders = [RankBatches(order, size, accumulation, ranks, rank, drop_last) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    step = size * accumulation * ranks
    steps = records // step if drop_last else -(-records // step)
    assert {len(each) for each in batches} == {len(loader) for loader in loaders} == {steps * accumulation}
    for number in range(steps):
        part = [each[number * accumulation : (number + 1) * accumulation] for each in batches]
        seen = sorted(place for each in part for batch in each for place in batch)
        assert seen == sorted(order[number * step : (number + 1) * step])
        sizes = [len(batch) for each in part for batch in each]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= size


@pytest.mark.parametrize("records", [1, 7, 64, 67])
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_lanes_hold_every_place_once_and_run_forwards(records, batch):
    spread = spread_over_lanes(np.arange(records), batch)
    assert sorted(spread.tolist()) == list(range(records))
    assert all((np.diff(spread[lane::batch]) == 1).all() for lane in range(min(batch, records)))
