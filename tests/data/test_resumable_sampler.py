from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from fairdiff_lightning.data.resumable_sampler import CHUNK, WINDOW, ResumableLoader, ResumableSampler


def order(length, seed=0, replicas=1, rank=0, epoch=0):
    sampler = ResumableSampler(length, seed, replicas, rank)
    sampler.set_epoch(epoch)
    return list(sampler)


def loader(length=23, batch_size=4, workers=0, seed=0):
    return ResumableLoader(
        torch.arange(length),
        sampler=ResumableSampler(length, seed),
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_an_epoch_has_every_sample_once(replicas):
    shares = [order(30, 5, replicas, rank) for rank in range(replicas)]
    assert sorted(i for share in shares for i in share) == list(range(30))
    assert len({len(share) for share in shares}) == 1


@given(length=st.integers(0, 40), replicas=st.integers(1, 5))
def test_what_the_replicas_do_not_divide_is_filled_up(length, replicas):
    seen = Counter(i for rank in range(replicas) for i in order(length, 1, replicas, rank))
    assert set(seen) == set(range(length))
    assert seen.total() - length == -length % replicas


def test_the_order_is_that_of_seed_and_epoch_whatever_the_replicas():
    alone = order(30, 5)
    assert alone == order(30, 5)
    assert alone != order(30, 6)
    assert alone != order(30, 5, epoch=1)
    assert alone != list(range(30))
    for replicas in (2, 3):
        shares = [order(30, 5, replicas, rank) for rank in range(replicas)]
        assert [i for step in zip(*shares, strict=True) for i in step] == alone


def test_samples_of_a_file_come_close_to_each_other():
    block, files = 5, 4 * WINDOW
    seen = list(ResumableSampler(block * files - 2, 3, block=block))
    assert sorted(seen) == list(range(block * files - 2))
    windows = [{i // block for i in seen[start : start + WINDOW * block]} for start in range(0, len(seen), 5)]
    assert max(len(window) for window in windows) <= 2 * WINDOW
    first = [i // block for i in seen[: WINDOW * block - 2]]
    assert len(set(first)) == WINDOW
    assert first != sorted(first, key=first.index), "and are mixed among these files"
    assert max(set(first)) - min(set(first)) > WINDOW, "which are any"


def test_more_samples_than_are_objects_at_a_time():
    assert sorted(order(2 * CHUNK + 3)) == list(range(2 * CHUNK + 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_exactly_after_what_was_handed_out(workers):
    whole = loader(workers=workers)
    whole.sampler.set_epoch(3)
    expected = [batch.tolist() for batch in whole]
    first = loader(workers=workers)
    first.sampler.set_epoch(3)
    begun = [batch.tolist() for batch in islice(first, 2)]
    second = loader(workers=workers)
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(3)  # as Lightning does, after the state
    rest = [batch.tolist() for batch in second]
    assert begun + rest == expected
    assert len(second) == len(expected), "Lightning counts the batches of the whole epoch"
    second.sampler.set_epoch(4)
    assert len(list(second)) == len(expected)


def test_a_state_of_another_epoch_or_a_finished_one_leaves_nothing_out():
    first = loader()
    list(first)
    assert first.state_dict()["consumed"] == 23
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(1)
    assert sorted(torch.cat(list(second)).tolist()) == list(range(23))


def test_a_pass_begun_anew_starts_at_the_first_sample():
    data = loader()
    begun = [batch.tolist() for batch in islice(data, 2)]
    assert [batch.tolist() for batch in data][:2] == begun


@pytest.mark.parametrize(
    ("name", "other"),
    [("length", loader(24)), ("seed", loader(seed=1)), ("batch_size", loader(batch_size=5))],
)
def test_another_order_cannot_go_on(name, other):
    with pytest.raises(ValueError, match=rf"{name}=(23|0|5)|{name}=.*Resume with the same"):
        other.load_state_dict(loader().state_dict())


def test_another_number_of_replicas_cannot_go_on():
    state = ResumableSampler(10, 0, 2, 1).state_dict()
    with pytest.raises(ValueError, match=r"num_replicas=2.*has 3.*number of devices"):
        ResumableSampler(10, 0, 3, 0).load_state_dict(state)


class Recorder(LightningModule):
    """Remembers what it was trained on, and dies when it is told to."""

    def __init__(self, die_at=None):
        super().__init__()
        self.layer, self.seen, self.die_at = nn.Linear(1, 1), [], die_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.die_at:
            raise KeyboardInterrupt
        self.seen.append(batch.tolist())
        return self.layer(batch[:, None].float()).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, module, resume=None, epochs=3):
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[keep],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), ckpt_path=resume, weights_only=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [2, 6, 9])
def test_lightning_resumes_in_the_middle_of_an_epoch(tmp_path, step):
    unbroken = Recorder()
    fit(tmp_path / "a", unbroken)
    resumed = Recorder()
    fit(tmp_path / "b", resumed, resume=str(tmp_path / "a" / f"step={step}.ckpt"))
    assert len(unbroken.seen) == 18
    assert resumed.seen == unbroken.seen[step:]
