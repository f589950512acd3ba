import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from fairdiff_lightning.data import HAM10000, FairSeg
from fairdiff_lightning.data.native import atomic_path, sweep

SAMPLE = {"image": torch.rand(3, 9, 12), "mask": torch.ones(1, 9, 12), "attributes": {}, "id": "whole"}


def killed_while_writing(path):
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def interrupted(path):
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("power cut")


def leave_half(path):
    process = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = path.parent.glob(".*half*")
    return left


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        (FairSeg(), "half.npz"),
        (HAM10000(), "HAM10000_images/half.jpg"),
        (HAM10000(), "HAM10000_segmentations_lesion_tschandl/half_segmentation.png"),
    ],
)
def test_what_a_killed_process_leaves_is_no_sample_and_is_swept(tmp_path, dataset, file):
    sample = SAMPLE | {"image": SAMPLE["image"][: dataset.channels]}
    path = dataset.write(tmp_path, sample)
    left = leave_half(tmp_path / file)
    index = dataset.index(tmp_path)
    assert ([record.id for record in index.records], index.left_out, index.errors) == (["whole"], {}, [])
    sweep(tmp_path)
    assert not left.exists()
    assert path.exists()


def test_hidden_files_are_no_samples(tmp_path):
    path = FairSeg().write(tmp_path, SAMPLE | {"image": SAMPLE["image"][:1]})
    for hidden in (tmp_path / "._whole.npz", tmp_path / ".trash" / "other.npz"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(path.read_bytes())
    assert [record.id for record in FairSeg().index(tmp_path).records] == ["whole"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted(path)
    assert np.load(path).tolist() == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]
