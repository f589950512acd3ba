import pytest
import torch

from fairdiff_lightning.diffusion import generators
from fairdiff_lightning.networks.texture_bank import TextureBank


def peaks(bin_index, count, seed):
    """Histograms that lie around one bin."""
    draws = torch.Generator().manual_seed(seed)
    found = torch.zeros(count, 16)
    found[:, bin_index] = 0.8
    found += 0.2 * torch.rand(count, 16, generator=draws) / 16
    return found / found.sum(1, keepdim=True)


@pytest.fixture
def bank():
    made = TextureBank(3, classes=1, bins=16)
    made.measure(torch.cat([peaks(12, 9, 0), peaks(2, 5, 1), peaks(7, 7, 2)])[torch.randperm(21)])
    return made


def test_prototypes_are_the_kinds_of_lesions_from_dark_to_bright(bank):
    assert bank.centroids.argmax(1).tolist() == [2, 7, 12]
    assert bank.exemplars.argmax(1).tolist() == [2, 7, 12]
    for exemplar in bank.exemplars:
        assert (bank.histograms == exemplar).all(1).any()  # of a real lesion


def test_draws_are_what_was_asked_for_and_of_their_own_seed(bank):
    random = torch.arange(6) + 3
    for k, peak in enumerate((2, 7, 12)):
        for kind in ("cluster", "exemplar"):
            found = bank.draw(f"{kind}:{k}", generators(random))
            assert found.argmax(1).tolist() == [peak] * 6
            torch.testing.assert_close(found.sum(1), torch.ones(6))
            assert not torch.equal(found[0], found[1])
    lesions = bank.draw("empirical", generators(random))
    assert all((bank.histograms == lesion).all(1).any() for lesion in lesions)
    mixed = bank.draw("random", generators(torch.arange(40)))
    assert set(mixed.argmax(1).tolist()) == {2, 7, 12}
    for texture in ("empirical", "random", "cluster:1"):
        alone = torch.cat([bank.draw(texture, generators(seed[None])) for seed in random])
        assert torch.equal(alone, bank.draw(texture, generators(random)))


def test_another_bank_loads_as_many_lesions_as_there_were(bank):
    again = TextureBank(3, classes=1, bins=16)
    again.load_state_dict(bank.state_dict())
    for name in ("histograms", "centroids", "exemplars"):
        assert torch.equal(getattr(again, name), getattr(bank, name))
    assert torch.equal(
        again.draw("random", generators(torch.arange(4))), bank.draw("random", generators(torch.arange(4)))
    )


def test_groups_have_the_textures_of_their_own_lesions():
    bank = TextureBank(2, classes=1, bins=16)
    bank.measure(
        torch.cat([peaks(12, 9, 0), peaks(2, 5, 1), peaks(7, 7, 2)]), torch.tensor([2] * 9 + [0] * 5 + [-1] * 7)
    )
    asked, random = torch.tensor([0, 2, 0, -1, 2]), torch.arange(5)
    found = bank.draw("group", generators(random), asked)
    assert found.argmax(1)[asked >= 0].tolist() == [2, 12, 2, 12]
    alone = [bank.draw("group", generators(random[i : i + 1]), asked[i : i + 1]) for i in range(5)]
    assert torch.equal(torch.cat(alone), found)
    again = TextureBank(2, classes=1, bins=16)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.draw("group", generators(random), asked), found)
    anyone = bank.draw("group", generators(torch.arange(60)))
    assert set(anyone.argmax(1).tolist()) == {2, 7, 12}
    with pytest.raises(ValueError, match=r"no training lesion is of group \[1\]"):
        bank.draw("group", generators(random[:1]), torch.tensor([1]))


def test_unknown_textures_are_refused(bank):
    random = generators(torch.arange(2))
    with pytest.raises(ValueError, match=r"'cluster:3': there are 3, counted from 0"):
        bank.draw("cluster:3", random)
    with pytest.raises(ValueError, match=r"texture 'solid'; expected is 'cluster:<k>'"):
        bank.draw("solid", random)
    with pytest.raises(ValueError, match="no training lesion was measured"):
        TextureBank(3, 1, 16).draw("random", random)
    with pytest.raises(ValueError, match="textures 0; expected is 1 prototype or more"):
        TextureBank(0, 1, 16)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (peaks(2, 2, 0), "2 real training lesions with 2 different histograms make no 3 textures. Ask for at most 2"),
        (peaks(2, 2, 0).repeat(4, 1), "8 real training lesions with 2 different histograms.*Ask for at most 2 `text"),
        (peaks(2, 0, 0), "0 real training lesions with 0 different histograms make no 3 textures. Train on more"),
    ],
    ids=["few", "alike", "none"],
)
def test_no_two_prototypes_are_one(rows, message):
    with pytest.raises(ValueError, match=message):
        TextureBank(3, 1, 16).measure(rows)
    if len(rows):
        bank = TextureBank(2, 1, 16)
        bank.measure(rows)
        assert len(bank.centroids.unique(dim=0)) == len(bank.exemplars.unique(dim=0)) == 2


def test_prototypes_of_several_classes_have_a_sum_of_1_in_each():
    """Half of the bright lesions lack the second class: its row is that of those that have it, not half of it."""
    found = torch.zeros(12, 2, 16)
    found[:6, 0], found[6:, 0] = peaks(2, 6, 0), peaks(12, 6, 1)
    found[6:9, 1] = peaks(5, 3, 2)
    bank = TextureBank(2, classes=2, bins=16)
    bank.measure(found.flatten(1))
    rows = bank.centroids.view(2, 2, 16)
    torch.testing.assert_close(rows.sum(-1), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(rows[1], torch.stack([found[6:, 0].mean(0), found[6:9, 1].mean(0)]))
    drawn = bank.draw("cluster:1", generators(torch.arange(5))).view(5, 2, 16)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(5, 2))
