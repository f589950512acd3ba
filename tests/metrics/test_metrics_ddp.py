import sys

import pytest
import torch
from torch import distributed, multiprocessing

from fairdiff_lightning.metrics import EqualizedOddsDifference, EquityScaled, ExpertUsage, GroupedDice


def batch():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randint(0, 3, (2, 5, 1, 6, 7), generator=generator)
    return pred, target, torch.tensor([0, 2, 2, -1, 0]), torch.rand(5, 4, 3, generator=generator)


def metrics(images):
    """Update one of each metric with some images of the batch; return what they compute."""
    pred, target, group, gates = (x[images] for x in batch())
    dice, equity = GroupedDice(3, 3), EquityScaled(3)
    odds, usage = EqualizedOddsDifference(3), ExpertUsage(3, 3)
    if len(group):
        dice.update(pred, target, group)
        equity.update(dice.score(pred, target), group)
        odds.update(pred, target, group)
        usage.update(gates, group)
    report = {name: value for name, value in dice.compute().items() if name not in ("scores", "groups")}
    return report | {"equity": equity.compute(), "odds": odds.compute(), "usage": usage.compute()}


def worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    uneven = metrics([slice(0, 2), slice(2, 5)][rank])
    one_idle = metrics([slice(0, 5), slice(0, 0)][rank])
    torch.save([uneven, one_idle], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks: spawned processes would import torchmetrics, 10 s each")
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_compute_what_one_does(tmp_path):
    """With unequal shares of the images, and with a process that has none."""
    expected = metrics(slice(0, 5))
    processes = multiprocessing.start_processes(
        worker, args=(str(tmp_path),), nprocs=2, join=False, daemon=True, start_method="fork"
    )
    assert any(processes.join(timeout=60) for _ in range(2)), "the processes wait for each other"
    for rank in range(2):
        for result in torch.load(tmp_path / f"{rank}.pt"):
            assert result.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(result[name], value, equal_nan=True, msg=f"rank {rank}: {name}")
