import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from fairdiff_lightning.data import GenerationPlan, InvalidSampleError, LIDCDataModule, Record
from fairdiff_lightning.data.requests import RequestBatches, make_requests

SOLID = [0.0] * 11 + [0.25, 0.75] + [0.0] * 3
SCANS = [Record(f"scan{k}", {}, {}, f"scan{k}") for k in range(3)]
MASKS = [Record(f"mask{k}", {}, {}, f"mask{k}") for k in range(4)]


def made(textures, **more):
    plan = GenerationPlan(total=5, masks="train", backgrounds="healthy", textures=textures, **more)
    return make_requests(plan, {0: "sample"}, {0: 4}, MASKS, None, SCANS)


def saved(path, values):
    np.save(path, np.asarray(values))
    return str(path)


def test_each_lesion_comes_once_in_each_texture_of_one_seed(tmp_path):
    file = saved(tmp_path / "half solid.npy", np.array(SOLID, np.float32))
    plain, asked = made(()), made(["cluster:0", file, SOLID])
    assert len(asked) == 15
    assert len({request.id for request in asked}) == 15
    for k, pair in enumerate(plain):
        three = asked[3 * k : 3 * k + 3]
        assert [r.id.rsplit("-", 1)[0] for r in three[1:]] == [f"{pair.id}_half-solid", f"{pair.id}_histogram"]
        assert three[0].id == f"{pair.id}_cluster-0"
        assert {(r.seed, r.condition.id, r.background.id) for r in three} == {
            (pair.seed, pair.condition.id, pair.background.id)
        }
    alone = {request.id: request for request in made(["cluster:0"])}
    assert all(alone[request.id] == request for request in asked if request.id in alone)
    assert len(alone) == 5


def test_an_id_means_one_histogram(tmp_path):
    first = made([saved(tmp_path / "a.npy", SOLID)])[0]
    again = made([saved(tmp_path / "a.npy", SOLID[::-1])])[0]
    assert first.id != again.id
    assert first.seed == again.seed


def test_histograms_of_unequal_lengths_are_refused_by_name(tmp_path):
    file = saved(tmp_path / "two.npy", [SOLID, SOLID])
    with pytest.raises(
        InvalidSampleError, match=r"two.npy: 32 numbers, and 16 in generate.textures\[1\]. Expected one"
    ):
        made(["cluster:0", SOLID, file])
    assert len(made([[*SOLID, *SOLID], file])) == 10


def test_a_generator_gets_histograms_or_names():
    numbers = RequestBatches(made([SOLID, SOLID[::-1]]), 4, [], lambda request: {})[0]["texture"]
    assert torch.equal(numbers, torch.tensor([SOLID, SOLID[::-1]] * 2))
    mixed = RequestBatches(made(["exemplar:2", SOLID]), 3, [], lambda request: {})[1]["texture"]
    assert mixed[0].tolist() == SOLID
    assert mixed[1] == "exemplar:2"
    assert "texture" not in RequestBatches(made(()), 4, [], lambda request: {})[0]


def test_histograms_of_several_classes_and_of_other_bins():
    two = made([[[0.5, 0.5, 0, 0], [0, 0, 0, 0]]], texture_bins=4)[0].texture
    assert two.asked == (0.5, 0.5, 0, 0, 0, 0, 0, 0)
    assert made([[0.5, 0.5, 0, 0, 0, 0, 1, 0]], texture_bins=4)[0].texture.asked[6] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array(SOLID) * 0.9, r"made.npy: numbers from 0 to 0.675, sum 0.9. Expected shares of 16 bins"),
        (np.r_[-0.25, SOLID[1:12], 1.0, SOLID[13:]], "numbers from -0.25 to 1, sum 1"),
        (np.full(16, np.nan), "sum nan"),
        (np.zeros(16), "sum 0"),
        (SOLID[:15], r"numbers of shape \(15,\)"),
        (np.zeros((0,)), r"numbers of shape \(0,\)"),
        (np.ones((2, 8)) / 8, r"numbers of shape \(2, 8\)"),
        (np.array(["a"] * 16), "no numbers"),
        (np.array([None] * 16), "unreadable"),
    ],
)
def test_what_is_no_histogram_is_named_with_its_sum(tmp_path, values, message):
    with pytest.raises(InvalidSampleError, match=message):
        made([saved(tmp_path / "made.npy", values)])
    if not isinstance(values, np.ndarray) or values.dtype.kind == "f":
        with pytest.raises(InvalidSampleError, match=r"generate.textures\[1\]: numbers"):
            made(["random", np.asarray(values).tolist()])


def test_textures_are_refused_where_they_mean_nothing(tmp_path):
    with pytest.raises(InvalidSampleError, match=r"absent.npy: unreadable"):
        made([str(tmp_path / "absent.npy")])
    with pytest.raises(ValueError, match=r"textures\[0\]='shiny'; expected is 'cluster:<k>'"):
        made(["shiny"])
    with pytest.raises(ValueError, match=r"textures='cluster:0'; expected is a list"):
        made("cluster:0")
    with pytest.raises(ValueError, match="'cluster-0' twice"):
        made(["cluster:0", "random", "cluster:0"])
    with pytest.raises(ValueError, match=r"textures with backgrounds=None.*Say which `backgrounds`"):
        GenerationPlan(total=3, masks="train", textures=["random"])
    with pytest.raises(ValueError, match=r"equal_scale=True: they are of lesions"):
        GenerationPlan(equal_scale=True, masks="train", backgrounds="healthy", textures=["random"])


def test_textures_are_not_asked_for_twice():
    """Groups of LIDC are textures too, which the samples would get as their label."""
    plan = GenerationPlan(total=3, masks="own", backgrounds="healthy", textures=["cluster:0"])
    data = LIDCDataModule(generate=plan, cache="none")
    data.prepare_data()
    data.setup()
    with pytest.raises(ValueError, match=r"groups of 'texture', which the samples get as a label.*attributes=\[\]"):
        data.requests()
    free = LIDCDataModule(generate=plan, cache="none", attributes=())
    free.setup()
    assert len(free.requests()) == 3


def test_the_command_line_takes_names_files_and_numbers():
    parser = ArgumentParser()
    parser.add_class_arguments(GenerationPlan, "generate")
    numbers = ",".join(map(str, SOLID))
    words = ["--generate.total=5", "--generate.masks=train", "--generate.backgrounds=healthy"]
    parsed = parser.parse_args([*words, f"--generate.textures=[cluster:0,cluster:10,[{numbers}]]"])
    plan = parser.instantiate_classes(parsed).generate
    assert list(plan.textures) == ["cluster:0", "cluster:10", SOLID]
