"""The states of a step, counted in DeepSpeed itself while it takes one: see zero_step.py."""

import json

import pytest
from conftest import run_module

from train_llava.planning.memory import MemoryModel, ZeroConfig

RANKS = 8
CASES = [(stage, element, False) for stage in range(4) for element in (2, 4)] + [(1, 2, True)]
ALL = 10**6  # weights


@pytest.fixture(scope="module")
def counted():
    """For each case the bytes per weight between steps, of gradients at most, and in the optimizer's step."""
    done = run_module("tests.zero_step", json.dumps([RANKS, CASES]), DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    return dict(zip(CASES, rows[-1], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_are_those_that_deepspeed_holds(counted, case):
    """Gradients are gone before the step under ZeRO-1 and 2, where the optimizer reads a copy of its part of them. fp32
    sums under ZeRO-1 are read as they are."""
    stage, element, fp32_sums = case
    model, zero = MemoryModel(element, element * ALL, ALL, ALL), ZeroConfig(stage, RANKS, fp32_sums=fp32_sums)
    between, gradients, in_step = (each * ALL for each in counted[case])
    lasting = zero.of_weights(model.weights) + model.optimizer(zero)
    if stage == 3:  # its gradients have a buffer
        lasting += model.gradients(zero)
    if fp32_sums:
        lasting += 4 * ALL
    assert between == pytest.approx(lasting, rel=0.01)
    gone = model.fp32_gradients(zero) if fp32_sums else model.gradients(zero) * (stage in (1, 2))
    assert in_step == pytest.approx(model.states_at_step(zero) - gone, rel=0.01)
    if stage == 1 and not fp32_sums:  # all, and a layer's on their way
        assert model.gradients(zero) == pytest.approx(gradients, rel=0.15)
