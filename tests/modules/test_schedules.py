import math

import pytest
import torch

from fairdiff_lightning.modules import LinearDecay, PolynomialDecay, WarmupCosine


def rates(schedule, base=1.0, **arguments):
    """Learning rate that each optimizer step uses."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    scheduler = schedule(optimizer, **arguments)
    while True:
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def at(schedule, steps, **arguments):
    wanted, found = set(steps), {}
    for step, rate in enumerate(rates(schedule, **arguments)):
        if step in wanted:
            found[step] = rate
        if len(found) == len(wanted):
            return found
    return found


@pytest.mark.parametrize("run", ["fairseg_8000_300ep", "ham_example_7967_100ep"])
def test_lagging_polynomial_decay_is_the_references(reference, run):
    expected = reference("dmoe")["F1_lr"][run]
    lr = {int(step): value for step, value in expected["lr"].items()}
    found = at(PolynomialDecay, lr, base=0.0175, total_steps=expected["max_iter"], lag=True)
    assert found == pytest.approx(lr, abs=1e-12)


def test_polynomial_decay_is_fairdiffs_one_step_later(reference):
    check = reference("fairdiff")["sl01_lr"]
    steps = [it + 1 for it in check["inputs"]["transunet_it"]]  # the code sets the rate of the step after
    found = at(PolynomialDecay, steps, base=0.02, total_steps=300 * 84, lag=True)
    assert list(found.values()) == pytest.approx(check["expected"]["transunet"], abs=1e-12)


def test_decay_without_lag_ends_at_zero():
    found = at(PolynomialDecay, range(11), total_steps=10)
    assert [found[t] for t in range(11)] == pytest.approx([(1 - t / 10) ** 0.9 for t in range(11)])


def test_linear_decay_is_fairdiffs(reference):
    expected = reference("fairdiff")["pd08_lr"]["expected"]
    for step, rate in expected.items():
        optimizer = torch.optim.Adam([{"params": [torch.zeros(1)], "lr": 2e-3, "initial_lr": 2e-3}])
        LinearDecay(optimizer, start=100_000, end=300_000, end_lr=1e-4, last_epoch=int(step) - 1)  # resumed there
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-12)


def test_linear_decay_steps_along_a_straight_line_that_stays():
    found = at(LinearDecay, range(9), base=1.0, start=2, end=6, end_lr=0.2)
    assert list(found.values()) == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    with pytest.raises(ValueError, match="start=6 and end=6"):
        LinearDecay(torch.optim.SGD([torch.zeros(1)], lr=1.0), start=6, end=6, end_lr=0.1)


def test_warmup_cosine_rises_linearly_and_falls_to_zero():
    found = at(WarmupCosine, range(101), total_steps=100, warmup=0.2)
    assert [found[t] for t in range(19)] == pytest.approx([(t + 1) / 20 for t in range(19)])
    assert [found[t] for t in (20, 60, 100)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert found[40] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert at(WarmupCosine, [0], total_steps=100, warmup=0.0)[0] == 1


def test_the_first_step_is_part_of_the_warm_up_when_the_length_comes_later():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = WarmupCosine(optimizer, warmup=0.2)
    scheduler.set_length(100)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 20)


def test_a_prolonged_run_gets_a_longer_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    short, long = PolynomialDecay(optimizer, 10), PolynomialDecay(optimizer, 20)
    long.load_state_dict(short.state_dict())
    assert long.total_steps == 20


def test_a_schedule_without_length_says_so():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = PolynomialDecay(optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match="total_steps"):
        scheduler.step()
