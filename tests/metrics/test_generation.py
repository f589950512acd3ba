import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.metrics import (
    GenerationScores,
    chamfer_distances,
    cosine_distances,
    coverage,
    euclidean_distances,
    generation,
    generation_scores,
    minimum_matching_distance,
    nearest_real_distance,
    one_nearest_neighbour_accuracy,
)

INF = float("inf")


def plain_mmd(distances):
    """Mean over real of the smallest distance to a generated one, entry by entry."""
    return sum(min(row[j] for row in distances) for j in range(len(distances[0]))) / len(distances[0])


def plain_coverage(distances):
    """Distinct real samples that some generated sample has as its nearest."""
    return len({min(range(len(row)), key=row.__getitem__) for row in distances}) / len(distances[0])


def plain_accuracy(samples, kinds, distance):
    """Leave-one-out vote of the one nearest neighbour; no ties."""
    correct = 0
    for i, sample in enumerate(samples):
        others = [j for j in range(len(samples)) if j != i]
        nearest = min(others, key=lambda j: distance(sample, samples[j]))
        correct += kinds[nearest] == kinds[i]
    return correct / len(samples)


def plain_cosine(x, y):
    return float((1 - torch.dot(x, y) / (x.norm() * y.norm())) / 2)


def plain_chamfer(x, y):
    there = sum(min(float((p - q).square().sum()) for q in y) for p in x) / len(x)
    back = sum(min(float((p - q).square().sum()) for p in x) for q in y) / len(y)
    return there + back


DISTANCES = {
    "cosine": (cosine_distances, plain_cosine, (5,)),
    "euclidean": (euclidean_distances, lambda x, y: float((x - y).norm()), (5,)),
    "chamfer": (chamfer_distances, plain_chamfer, (4, 3)),
}


def test_fairdiff_example_both_ways_round(reference):
    check = reference("fairdiff")["ge01_mmd_cov"]
    generated, real = (torch.tensor(check["inputs"][name], dtype=torch.float32) for name in ("generated", "real"))
    distances = cosine_distances(generated, real)
    expected = check["expected"]
    torch.testing.assert_close(distances, torch.tensor(expected["distance_matrix"]), rtol=0, atol=1e-6)
    for swapped, numbers in ((True, expected["official"]), (False, expected["standard"])):
        mmd, cov = (next(value for key, value in numbers.items() if name in key.lower()) for name in ("mmd", "cov"))
        assert minimum_matching_distance(distances, swapped).item() == pytest.approx(mmd, rel=0, abs=1e-6)
        assert coverage(distances, swapped).item() == cov


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("block", [1, 40, 2**22])
def test_distances_and_scores_are_those_of_loops_over_the_definition(name, block, monkeypatch):
    """Whatever the size of the blocks."""
    monkeypatch.setattr(generation, "BLOCK", block)
    matrix, plain, shape = DISTANCES[name]
    generated, real = torch.randn(4, *shape).double(), torch.randn(7, *shape).double()
    expected = [[plain(x, y) for y in real] for x in generated]
    torch.testing.assert_close(matrix(generated, real), torch.tensor(expected, dtype=torch.float64))
    scores = generation_scores(generated, real, name)
    kinds = [0] * len(generated) + [1] * len(real)
    assert scores["mmd"].item() == pytest.approx(plain_mmd(expected), abs=1e-9)
    assert scores["coverage"].item() == pytest.approx(plain_coverage(expected))
    assert scores["1nna"].item() == pytest.approx(plain_accuracy([*generated, *real], kinds, plain))
    assert scores["nearest_real"].item() == pytest.approx(sum(map(min, expected)) / 4)
    swapped = generation_scores(generated, real, name, reference_behaviour=True)
    transposed = list(map(list, zip(*expected, strict=True)))
    assert swapped["mmd"].item() == pytest.approx(plain_mmd(transposed))
    assert swapped["coverage"].item() == pytest.approx(plain_coverage(transposed))


@pytest.mark.parametrize("name", DISTANCES)
def test_float32_keeps_the_distance_of_near_copies_far_from_the_origin(name):
    matrix, plain, shape = DISTANCES[name]
    real = torch.randn(3, *shape) + 100
    generated = real + 1e-3 * torch.randn(3, *shape)
    expected = [[plain(x.double(), y.double()) for y in real] for x in generated]
    torch.testing.assert_close(matrix(generated, real), torch.tensor(expected), rtol=1e-4, atol=1e-12)


entries = st.integers(0, 6)
matrices = st.integers(1, 6).flatmap(
    lambda rows: st.integers(1, 6).flatmap(
        lambda columns: st.lists(st.lists(entries, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )
)


@settings(max_examples=40, deadline=None)
@given(matrices, st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_of_samples_even_with_ties(entries, random):
    distances = torch.tensor(entries, dtype=torch.float32)
    rows, columns = (random.sample(range(n), n) for n in distances.shape)
    shuffled = distances[rows][:, columns]
    for score in (minimum_matching_distance, coverage):
        for swapped in (False, True):
            torch.testing.assert_close(score(distances, swapped), score(shuffled, swapped))
    assert 0 < coverage(distances) <= 1
    torch.testing.assert_close(nearest_real_distance(shuffled), nearest_real_distance(distances)[rows])
    torch.testing.assert_close(minimum_matching_distance(distances, True), minimum_matching_distance(distances.T))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000))
def test_a_copy_of_the_real_set_matches_and_covers_it(count, seed):
    real = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = generation_scores(real.flip(0), real, "euclidean")
    assert scores["mmd"] < 1e-6
    assert scores["nearest_real"] < 1e-6
    assert scores["coverage"] == 1
    assert scores["1nna"] == 0  # the nearest other sample of each is its copy in the other set


def test_sets_far_apart_are_told_apart():
    scores = generation_scores(torch.randn(5, 3), torch.randn(4, 3) + 100, "euclidean")
    assert scores["1nna"] == 1
    assert scores["coverage"] < 1


def test_one_nearest_neighbour_ties_count_half():
    tied = torch.ones(3, 2)
    assert one_nearest_neighbour_accuracy(torch.ones(3, 3), tied, torch.ones(2, 2)) == 0.5


def test_one_nearest_neighbour_ignores_the_diagonal():
    within = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    assert one_nearest_neighbour_accuracy(within, torch.full((2, 2), 2.0), within) == 0


def test_chamfer_of_points_two_apart_is_eight():
    assert chamfer_distances(torch.zeros(1, 1, 3), torch.tensor([[[2.0, 0.0, 0.0]]])).item() == pytest.approx(8)


@pytest.mark.parametrize("name", DISTANCES)
def test_bad_sets_are_refused_by_name(name):
    matrix, _, shape = DISTANCES[name]
    good = torch.randn(2, *shape)
    with pytest.raises(ValueError, match=r"\(0, .*empty.*at least one"):
        matrix(good[:0], good)
    with pytest.raises(ValueError, match="1 of 2 samples hold NaN or infinity"):
        matrix(good, torch.stack([good[0], good[1] * INF]))
    with pytest.raises(ValueError, match="the same size for both"):
        matrix(good, good[..., :2])


def test_bad_matrices_are_refused():
    with pytest.raises(ValueError, match=r"\(0, 3\), expected \(generated, real\)"):
        coverage(torch.empty(0, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        minimum_matching_distance(torch.tensor([[INF]]))
    with pytest.raises(ValueError, match=r"\(2, 3\), expected \(2, 2\)"):
        one_nearest_neighbour_accuracy(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="'manhattan', expected one of cosine, euclidean, chamfer"):
        GenerationScores("manhattan")


@pytest.mark.parametrize("name", DISTANCES)
def test_metric_in_batches_gives_the_scores_of_all(name):
    _, _, shape = DISTANCES[name]
    generated, real = torch.randn(5, *shape), torch.randn(6, *shape)
    metric = GenerationScores(name)
    for batch in generated.split(2):
        metric.update(batch, real=False)
    for batch in real.split(4):
        metric.update(batch, real=True)
    computed = metric.compute()
    for key, value in generation_scores(generated, real, name).items():
        torch.testing.assert_close(computed[key], value)
    metric.reset()
    with pytest.raises(ValueError, match="empty"), pytest.warns(UserWarning, match="before the ``update``"):
        metric.compute()


def test_metric_refuses_samples_of_another_size():
    metric = GenerationScores()
    metric.update(torch.rand(2, 4), real=True)
    with pytest.raises(ValueError, match=r"\(2, 6\), expected \[1, 4\]"):
        metric.update(torch.rand(2, 6), real=False)
    with pytest.raises(ValueError, match=r"expected \(B, D\)"):
        metric.update(torch.rand(2, 4, 3), real=False)
