import sys

import pytest
import torch
from torch import distributed, multiprocessing

from fairdiff_lightning.metrics import GenerationScores


def scores(generated, real):
    """What the metrics compute from some of the samples."""
    draw = torch.Generator().manual_seed(0)
    sets = torch.rand(5, 4, generator=draw), torch.rand(7, 4, generator=draw)
    clouds = torch.rand(5, 6, 3, generator=draw), torch.rand(7, 6, 3, generator=draw)
    features, shapes = GenerationScores(), GenerationScores("chamfer")
    for metric, (made, true) in ((features, sets), (shapes, clouds)):
        for samples, is_real in ((made[generated], False), (true[real], True)):
            if len(samples):
                metric.update(samples, real=is_real)
    return features.compute(), shapes.compute()


def worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    uneven = scores(*[(slice(0, 1), slice(0, 5)), (slice(1, 5), slice(5, 7))][rank])
    one_idle = scores(*[(slice(0, 5), slice(0, 7)), (slice(0, 0), slice(0, 0))][rank])
    torch.save([uneven, one_idle], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks: spawned processes would import torchmetrics, 10 s each")
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_compare_all_samples(tmp_path):
    """With unequal shares, and with a process that has none."""
    expected = scores(slice(0, 5), slice(0, 7))
    processes = multiprocessing.start_processes(
        worker, args=(str(tmp_path),), nprocs=2, join=False, daemon=True, start_method="fork"
    )
    assert any(processes.join(timeout=60) for _ in range(2)), "the processes wait for each other"
    for rank in range(2):
        for result in torch.load(tmp_path / f"{rank}.pt"):
            for found, wanted in zip(result, expected, strict=True):
                assert found.keys() == wanted.keys()
                for name, value in wanted.items():
                    torch.testing.assert_close(found[name], value, msg=f"rank {rank}: {name}")
