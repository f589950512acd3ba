from itertools import product

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, directed_hausdorff

from fairdiff_lightning.geometry import chamfer_distance, distances, knn_points, sample_farthest_points


@pytest.fixture(params=["torch", "pytorch3d"])
def backend(request):
    if request.param == "pytorch3d":
        pytest.importorskip("pytorch3d")
    return request.param


@pytest.fixture
def recorded(reference):
    """Point sets and what pytorch3d made of them."""
    content = reference("pytorch3d")
    sets = {name: torch.tensor(content[name]) for name in ("x", "y", "x_lengths", "y_lengths")}
    return sets, content


def clouds(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(3, 17, 3, generator=generator), torch.randn(3, 23, 3, generator=generator)
    return x.to(dtype), y.to(dtype), torch.tensor([17, 9, 2]), torch.tensor([5, 23, 1])


def test_chamfer_equals_the_recorded_values(recorded, backend):
    sets, content = recorded
    assert len(content["chamfer"]) == 48
    for case in content["chamfer"]:
        lengths = {"x_lengths": sets["x_lengths"], "y_lengths": sets["y_lengths"]} if case["lengths"] else {}
        keys = ("norm", "point_reduction", "batch_reduction", "single_directional")
        value, normals = chamfer_distance(
            sets["x"], sets["y"], **lengths, **{k: case[k] for k in keys}, backend=backend
        )
        assert value.item() == pytest.approx(case["value"], rel=1e-5), case
        assert normals is None


def test_farthest_points_equal_the_recorded_ones(recorded, backend):
    sets, content = recorded
    sampled, idx = sample_farthest_points(sets["x"], sets["x_lengths"], K=4, backend=backend)
    assert idx.tolist() == content["fps_k4_idx"]
    assert torch.equal(sampled, torch.stack([cloud[i] for cloud, i in zip(sets["x"], idx, strict=True)]))


def test_nearest_neighbours_equal_the_recorded_ones(recorded, backend):
    sets, content = recorded
    found = knn_points(*sets.values(), K=3, backend=backend)
    torch.testing.assert_close(found.dists, torch.tensor(content["knn_k3_dists"]))


@pytest.mark.parametrize("norm", [1, 2])
def test_nearest_neighbours_equal_a_search_one_by_one(norm, backend):
    x, y, x_lengths, y_lengths = clouds()
    found = knn_points(x, y, x_lengths, y_lengths, norm=norm, K=4, return_nn=True, backend=backend)
    for n, (a, b) in enumerate(zip(x_lengths, y_lengths, strict=True)):
        pairs = cdist(x[n, :a], y[n, :b], "cityblock" if norm == 1 else "sqeuclidean")
        k = min(4, int(b))
        order = pairs.argsort(1)[:, :k]
        np.testing.assert_array_equal(found.idx[n, :a, :k], order)
        np.testing.assert_allclose(found.dists[n, :a, :k], np.take_along_axis(pairs, order, 1), rtol=1e-5)
        np.testing.assert_array_equal(found.knn[n, :a, :k], y[n][order])
        for absent in (found.dists[n, :, k:], found.idx[n, :, k:], found.knn[n, :, k:], found.dists[n, a:]):
            assert not absent.any()


def test_unsorted_neighbours_are_the_same_set(backend):
    x, y, *_ = clouds()
    loose, strict = (knn_points(x, y, K=5, return_sorted=s, backend=backend) for s in (False, True))
    assert torch.equal(loose.idx.sort(-1).values, strict.idx.sort(-1).values)


@pytest.mark.parametrize("norm", [1, 2])
def test_gradients_are_those_of_the_distance(norm):
    x, y, x_lengths, y_lengths = clouds(dtype=torch.float64)

    def distance(x, y):
        return chamfer_distance(x, y, x_lengths, y_lengths, norm=norm)[0]

    assert torch.autograd.gradcheck(distance, (x.requires_grad_(), y.requires_grad_()))


def test_memory_is_bounded_by_working_in_parts(monkeypatch):
    x, y, x_lengths, y_lengths = clouds()
    whole = knn_points(x, y, x_lengths, y_lengths, K=3, backend="torch")
    largest, cdist_whole = [], torch.cdist

    def watched(*args, **kwargs):
        largest.append(cdist_whole(*args, **kwargs))
        return largest[-1]

    monkeypatch.setattr(distances, "PAIRS_AT_ONCE", 150)
    monkeypatch.setattr(torch, "cdist", watched)
    parts = knn_points(x, y, x_lengths, y_lengths, K=3, backend="torch")
    assert len(largest) == 9
    assert max(part.numel() for part in largest) <= 150
    assert torch.equal(parts.idx, whole.idx)
    assert torch.equal(parts.dists, whole.dists)


def test_max_is_the_hausdorff_distance(backend):
    x, y, *_ = clouds()
    value, _ = chamfer_distance(x, y, batch_reduction=None, point_reduction="max", backend=backend)
    expected = [max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0]) ** 2 for a, b in zip(x, y, strict=True)]
    assert value.tolist() == pytest.approx(expected, rel=1e-5)


def test_chamfer_of_a_set_with_itself_is_zero_and_of_a_shifted_one_its_shift(backend):
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0), torch.zeros(1))[None]
    assert chamfer_distance(grid, grid, backend=backend)[0] == 0
    shifted, _ = chamfer_distance(grid, grid + torch.tensor([0.0, 0.0, 0.3]), backend=backend)
    assert shifted.item() == pytest.approx(2 * 0.09, rel=1e-5)


def test_weights_and_normals_follow_the_definition(backend):
    x, y, *_ = clouds()
    weights = torch.tensor([1.0, 0.0, 3.0])
    per_cloud, none = chamfer_distance(x, y, batch_reduction=None, backend=backend)
    weighted, _ = chamfer_distance(x, y, weights=weights, backend=backend)
    assert none is None
    assert weighted.item() == pytest.approx(((per_cloud * weights).sum() / 4).item(), rel=1e-5)

    up = torch.tensor([0.0, 0.0, 1.0])
    for towards, signed, unsigned in ((up, 0, 0), (-up, 4, 0), (torch.tensor([1.0, 0.0, 0.0]), 2, 2)):
        for abs_cosine, expected in ((False, signed), (True, unsigned)):
            _, normals = chamfer_distance(
                x,
                y,
                x_normals=up.expand_as(x),
                y_normals=towards.expand_as(y),
                abs_cosine=abs_cosine,
                backend=backend,
            )
            assert normals.item() == pytest.approx(expected, abs=1e-5)


def test_farthest_points_equal_the_greedy_choice(backend):
    x, _, lengths, _ = clouds()
    sampled, idx = sample_farthest_points(x, lengths, K=[5, 9, 4], backend=backend)
    assert idx.shape == (3, 9)
    for n, (length, k) in enumerate(zip([17, 9, 2], [5, 9, 4], strict=True)):
        pairs, chosen = cdist(x[n, :length], x[n, :length]), [0]
        while len(chosen) < min(length, k):
            chosen.append(int(pairs[chosen].min(0).argmax()))
        assert idx[n].tolist() == chosen + [-1] * (9 - len(chosen))
        assert torch.equal(sampled[n, : len(chosen)], x[n, chosen])
        assert not sampled[n, len(chosen) :].any()


def test_random_start_lies_within_the_lengths_and_varies(backend):
    x, _, lengths, _ = clouds()
    starts = torch.stack(
        [sample_farthest_points(x, lengths, 1, random_start_point=True, backend=backend)[1] for _ in range(40)]
    )[..., 0]
    assert (starts >= 0).all()
    assert (starts < lengths).all()
    assert [len(start.unique()) > 1 for start in starts.T] == [True] * 3


def test_torch_equals_pytorch3d():
    pytest.importorskip("pytorch3d")
    for seed, ragged in product(range(3), (False, True)):
        x, y, x_lengths, y_lengths = clouds(seed)
        lengths = (x_lengths, y_lengths) if ragged else (None, None)
        for norm, k in product((1, 2), (1, 4, 30)):
            for ours, theirs in zip(
                *(knn_points(x, y, *lengths, norm, k, return_nn=True, backend=b) for b in ("torch", "pytorch3d")),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs)
        normals = torch.randn(3, 17, 3), torch.randn(3, 23, 3)
        leaves = [cloud.clone().requires_grad_() for cloud in (x, y, x, y)]
        weights = torch.tensor([0.5, 2.0, 1.0])
        for reductions in (("mean", "sum"), ("sum", "mean"), (None, "mean"), (None, None)):
            results = [
                chamfer_distance(a, b, *lengths, *normals, weights, *reductions, abs_cosine=False, backend=name)
                for a, b, name in ((*leaves[:2], "torch"), (*leaves[2:], "pytorch3d"))
            ]
            torch.testing.assert_close(*results)
            for distance, _ in results:
                sum(term.sum() for term in (distance if isinstance(distance, tuple) else (distance,))).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[2].grad)
        torch.testing.assert_close(leaves[1].grad, leaves[3].grad)
        for number in (1, 7, torch.tensor([3, 12, 1])):
            for ours, theirs in zip(
                *(sample_farthest_points(x, lengths[0], number, backend=b) for b in ("torch", "pytorch3d")), strict=True
            ):
                torch.testing.assert_close(ours, theirs)


def test_whole_chamfer_equals_pytorch3d_s_own():
    loss = pytest.importorskip("pytorch3d.loss")
    x, y, x_lengths, y_lengths = clouds()
    weights = torch.tensor([0.5, 2.0, 1.0])
    for points, batch in (("mean", "mean"), ("sum", "sum"), ("max", "mean"), ("mean", None), (None, None)):
        for single in (True, False):
            arguments = (x, y, x_lengths, y_lengths, None, None, weights, batch, points, 2, single)
            torch.testing.assert_close(chamfer_distance(*arguments), loss.chamfer_distance(*arguments))


class FakeOps:
    """Stands for pytorch3d.ops: says which of its functions were called."""

    def __init__(self):
        self.called = []

    def knn_points(self, p1, p2, *args):
        self.called.append("knn_points")
        return knn_points(p1, p2, *args, backend="torch")

    def sample_farthest_points(self, points, *args):
        self.called.append("sample_farthest_points")
        return sample_farthest_points(points, *args, backend="torch")


def test_pytorch3d_is_used_when_installed_and_only_for_what_it_knows(monkeypatch):
    ops = FakeOps()
    monkeypatch.setattr(distances, "_load_pytorch3d", lambda device: ops)
    x, y, *_ = clouds()
    chamfer_distance(x, y)
    sample_farthest_points(x, K=3)
    assert ops.called == ["knn_points", "knn_points", "sample_farthest_points"]
    chamfer_distance(x.double(), y.double())
    chamfer_distance(x, y, backend="torch")
    assert len(ops.called) == 3
    with pytest.raises(ValueError, match=r"float32 points, but got .*float64.*use 'torch'"):
        knn_points(x.double(), y.double(), backend="pytorch3d")


def test_pytorch3d_is_missed_aloud(monkeypatch):
    monkeypatch.setattr(distances, "find_spec", lambda name: None)
    distances._load_pytorch3d.cache_clear()
    x, y, *_ = clouds()
    with pytest.raises(ModuleNotFoundError, match=r"fairdiff_lightning\[pytorch3d\]"):
        knn_points(x, y, backend="pytorch3d")
    assert knn_points(x, y).dists.shape == (3, 17, 1)


def test_torch_takes_over_with_a_warning_where_the_installed_pytorch3d_does_not_work(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN2at4_ops")

    monkeypatch.setattr(distances, "find_spec", lambda name: object())
    monkeypatch.setattr(distances, "import_module", broken)
    distances._load_pytorch3d.cache_clear()
    x, y, *_ = clouds()
    with pytest.warns(UserWarning, match="does not work on 'cpu'.*undefined symbol.*torch computes instead"):
        found = knn_points(x, y)
    torch.testing.assert_close(found.dists, knn_points(x, y, backend="torch").dists)
    with pytest.raises(ModuleNotFoundError, match="does not work on 'cpu'"):
        knn_points(x, y, backend="pytorch3d")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: knn_points(x, y[:2]), r"\(N, P1, D\) and \(N, P2, D\), but are \(3, 17, 3\), \(2, 23, 3\)"),
        (lambda x, y: knn_points(x, y, norm=3), "norm must be 1 or 2, but is 3"),
        (lambda x, y: knn_points(x, y, torch.tensor([17, 18, 1])), "not exceed 17"),
        (lambda x, y: knn_points(x, y, backend="cuda"), "backend must be one of"),
        (lambda x, y: chamfer_distance(x, y, point_reduction="median"), "point_reduction must be None or one of"),
        (lambda x, y: chamfer_distance(x, y, batch_reduction="max"), "batch_reduction must be None or one of"),
        (lambda x, y: chamfer_distance(x, y, point_reduction=None), "batch_reduction must be None when"),
        (lambda x, y: chamfer_distance(x, y, x_normals=x, point_reduction="max"), "no meaning for normals"),
        (lambda x, y: chamfer_distance(x, y, weights=-torch.ones(3)), "weights must be non-negative"),
        (lambda x, y: sample_farthest_points(x[0]), r"shape \(N, P, D\), but have \(17, 3\)"),
        (lambda x, y: sample_farthest_points(x, K=[1, 2]), "one for each of 3 clouds"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    x, y, *_ = clouds()
    with pytest.raises(ValueError, match=message):
        call(x, y)
