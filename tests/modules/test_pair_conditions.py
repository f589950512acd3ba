import pytest
import torch

from fairdiff_lightning.modules.pair_conditions import hide_groups


def test_no_groups_draw_nothing():
    torch.manual_seed(5)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert hide_groups({}, 0.5) == {}
    assert torch.equal(torch.rand(1), after)


def test_one_attribute_is_hidden_by_the_first_draw_alone():
    many = 200
    groups = torch.arange(many) % 3
    torch.manual_seed(5)
    hidden, after = torch.rand(many) < 0.4, torch.rand(1)
    torch.manual_seed(5)
    found = hide_groups({"race": groups}, 0.4)["race"]
    assert torch.equal(found, groups.masked_fill(hidden, -1))
    assert torch.equal(torch.rand(1), after)


def test_every_combination_of_known_and_hidden_attributes_is_trained():
    """All together by one draw of p, and each by one of its own: both hidden in p + (1 - p) p^2 of the samples."""
    p, many = 0.3, 40_000
    groups = {"view": torch.ones(many).long(), "density": torch.full((many,), 3)}
    torch.manual_seed(2)
    first = hide_groups(groups, p)
    torch.manual_seed(2)
    assert all(torch.equal(group, first[name]) for name, group in hide_groups(groups, p).items())
    hidden = torch.stack([first["view"] == -1, first["density"] == -1])
    shares = [
        (hidden == torch.tensor(which).view(2, 1)).all(0).float().mean().item() for which in ((1, 1), (1, 0), (0, 1))
    ]
    alone = (1 - p) * p * (1 - p)
    assert shares == pytest.approx([p + (1 - p) * p**2, alone, alone], abs=0.01)
    assert first["view"].unique().tolist() == [-1, 1]
    assert first["density"].unique().tolist() == [-1, 3]
