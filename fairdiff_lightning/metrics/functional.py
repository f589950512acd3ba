"""Per-image overlap scores and fairness statistics of them, on plain tensors."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

EmptyPolicy = Literal["skip", "one", "zero", "reference"]
EquityVariant = Literal["gap_sum", "std"]


class Overlap(NamedTuple):
    """Pixel counts per image and foreground class, each (B, num_classes - 1) int64."""

    intersection: Tensor
    predicted: Tensor
    true: Tensor


def overlap_counts(pred: Tensor, target: Tensor, num_classes: int) -> Overlap:
    """Count the pixels of each foreground class in the prediction, in the truth and in both.

    Args:
        pred: class indices (B, 1, ...) or (B, ...), integer or bool.
        target: the same, of the same size; values outside [0, num_classes) belong to no class.
        num_classes: number of classes, the background (0) included.

    Raises:
        ValueError: the masks differ in size, ``pred`` holds floating point values (logits), or ``num_classes`` is
            below 2.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected at least 2: the background counts as a class.")
    pred, target = _flat_pair(pred, target)
    counts = []
    for index in range(1, num_classes):  # a histogram of (true, predicted) needs 8 bytes a pixel, this needs one
        predicted, true = pred == index, target == index
        counts.append(torch.stack([(predicted & true).sum(1), predicted.sum(1), true.sum(1)]))
    return Overlap(*torch.stack(counts, dim=-1).unbind(0))


def dice_score(pred: Tensor, target: Tensor, num_classes: int, empty: EmptyPolicy = "skip") -> Tensor:
    """Dice score 2|P and T| / (|P| + |T|) of each image and foreground class.

    What a class that the truth lacks scores is a convention, and implementations differ:

    =============  ==========  ====================  ====================  ======================================
    ``empty``      both empty  truth empty,          prediction empty,     also used by
                               prediction not        truth not
    =============  ==========  ====================  ====================  ======================================
    ``skip``       NaN         0                     0                     torchmetrics ``DiceScore``
    ``one``        1           0                     0                     MONAI with ``ignore_empty=False``
    ``zero``       0           0                     0
    ``reference``  0           1                     0                     the code of FairSeg, FairDiff and dMoE
    =============  ==========  ====================  ====================  ======================================

    Args:
        pred: class indices (B, 1, ...) or (B, ...).
        target: the same, of the same size.
        num_classes: number of classes, the background (0) included.
        empty: policy of the table above.

    Returns:
        (B, num_classes - 1) in [0, 1], NaN where not defined; float64 (float32 on MPS).
    """
    overlap = overlap_counts(pred, target, num_classes)
    return _overlap_ratio(2 * overlap.intersection, overlap.predicted + overlap.true, overlap, empty)


def iou_score(pred: Tensor, target: Tensor, num_classes: int, empty: EmptyPolicy = "skip") -> Tensor:
    """Intersection over union of each image and foreground class; arguments and policies as :func:`dice_score`."""
    overlap = overlap_counts(pred, target, num_classes)
    union = overlap.predicted + overlap.true - overlap.intersection
    return _overlap_ratio(overlap.intersection, union, overlap, empty)


def cdr_error(pred: Tensor, target: Tensor, cup: Sequence[int] = (2,), disc: Sequence[int] = (1, 2)) -> Tensor:
    """Absolute error of the cup-to-disc ratio, of areas, as FairSeg measures it (the clinical ratio is of heights).

    Args:
        pred: class indices (B, 1, H, W) or (B, H, W).
        target: the same, of the same size.
        cup: classes that make up the cup.
        disc: classes that make up the disc, the cup's among them.

    Returns:
        (B,), NaN where either disc is empty; float64 (float32 on MPS).
    """
    ratios = [_divide(_isin(mask, cup).sum(1), _isin(mask, disc).sum(1)) for mask in _flat_pair(pred, target)]
    return (ratios[0] - ratios[1]).abs()


def group_means(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Mean score of each group over its samples.

    Args:
        scores: (N, ...) per sample; NaN is skipped.
        group: (N,) group index of each sample; -1 (unknown) belongs to no group.
        num_groups: number of groups.

    Returns:
        (num_groups, ...), NaN for a group without a score.

    Raises:
        ValueError: ``group`` is not (N,) or holds a value outside [-1, num_groups).
    """
    defined = ~scores.isnan()
    sums = sum_by_group(scores.where(defined, 0), group, num_groups)
    counts = sum_by_group(defined.to(scores.dtype), group, num_groups)
    return (sums / counts)[:num_groups]


def overall_mean(scores: Tensor) -> Tensor:
    """Mean (...) over all samples of scores (N, ...), unknown groups included; NaN is skipped."""
    return scores.nanmean(0)


def equity_scaled(
    overall: Tensor,
    per_group: Tensor,
    variant: EquityVariant = "gap_sum",
    alpha: float = 1.0,
    absent: Literal["skip", "nan"] = "skip",
) -> Tensor:
    """Overall score, divided by one plus its disparity between the groups.

    ``gap_sum`` is ES of FairSeg and dMoE, ``overall / (1 + alpha sum_g |M_g - overall|)``. ``std`` replaces the sum by
    the sample standard deviation (n - 1) of the M_g: the authors' code writes it to the columns "Es-Dice" of FairDiff,
    and it is never below ``gap_sum`` for two or three groups. The formula depends on the scale: scores are fractions.

    Args:
        overall: (...) score over all samples.
        per_group: (G, ...) score of each group, NaN for an absent one.
        variant: disparity, as above.
        alpha: weight of the disparity, at least 0.
        absent: ``skip`` leaves absent groups out; ``nan`` lets them make the result NaN, as the reference does.

    Returns:
        (...), at most ``overall``; NaN without any group, and for ``std`` with fewer than two.

    Raises:
        ValueError: the variant is unknown.
    """
    if variant == "gap_sum":
        disparity = (per_group - overall).abs().nansum(0)
    elif variant == "std":
        disparity = group_std(per_group)
    else:
        raise ValueError(f"equity_scaled: variant is {variant!r}, expected 'gap_sum' or 'std'.")
    missing = per_group.isnan()
    undefined = missing.any(0) if absent == "nan" else missing.all(0)
    return (overall / (1 + alpha * disparity)).masked_fill(undefined, torch.nan)


def worst_group(per_group: Tensor, higher_is_better: bool = True) -> Tensor:
    """Score (...) of the worst group present in (G, ...); NaN without any."""
    return _nanmin(per_group) if higher_is_better else -_nanmin(-per_group)


def max_gap(per_group: Tensor) -> Tensor:
    """Difference (...) between the highest and the lowest group present in (G, ...); NaN without any."""
    return -_nanmin(-per_group) - _nanmin(per_group)


def group_std(per_group: Tensor) -> Tensor:
    """Sample standard deviation (...), n - 1, over the groups present in (G, ...); NaN with fewer than two."""
    present = (~per_group.isnan()).sum(0)
    squares = (per_group - per_group.nanmean(0)).square().nansum(0)
    return (squares / (present - 1)).sqrt().masked_fill(present < 2, torch.nan)


def demographic_parity_difference(
    pred: Tensor,
    group: Tensor,
    num_groups: int,
    positive: Sequence[int] | None = None,
    unknown_as_group: bool = False,
) -> Tensor:
    """Largest difference between groups in the share of pixels predicted positive.

    Args:
        pred: class indices (N, ...); all pixels of a sample belong to its group.
        group: (N,) group index, -1 for unknown.
        num_groups: number of groups.
        positive: classes that count as positive; any but 0 by default.
        unknown_as_group: treat the samples of unknown group as one more group, instead of leaving them out.

    Returns:
        Scalar in [0, 1]; absent groups are skipped.
    """
    counts = prediction_counts(pred, group, num_groups, positive)
    return rate_gap(counts if unknown_as_group else counts[:num_groups])


def equalized_odds_difference(
    pred: Tensor,
    target: Tensor,
    group: Tensor,
    num_groups: int,
    positive: Sequence[int] | None = None,
    unknown_as_group: bool = False,
) -> Tensor:
    """Larger of the differences between groups in true-positive and in false-positive rate, over pixels.

    Args:
        pred: class indices (N, ...).
        target: the same, of the same size.
        group: (N,) group index, -1 for unknown.
        num_groups: number of groups.
        positive: classes that count as positive; any but 0 by default.
        unknown_as_group: treat the samples of unknown group as one more group, instead of leaving them out.

    Returns:
        Scalar in [0, 1]; groups where a rate is not defined are skipped for that rate.
    """
    counts = confusion_counts(pred, target, group, num_groups, positive)
    return odds_gap(counts if unknown_as_group else counts[:num_groups])


def prediction_counts(pred: Tensor, group: Tensor, num_groups: int, positive: Sequence[int] | None = None) -> Tensor:
    """Pixels predicted negative and positive in each group: (num_groups + 1, 2) int64, unknown group last."""
    selected = _isin(pred.flatten(1), positive)
    return sum_by_group(torch.stack([(~selected).sum(1), selected.sum(1)], dim=-1), group, num_groups)


def confusion_counts(
    pred: Tensor, target: Tensor, group: Tensor, num_groups: int, positive: Sequence[int] | None = None
) -> Tensor:
    """Pixels by group, truth and prediction: (num_groups + 1, 2, 2) int64, unknown group last."""
    selected, true = (_isin(mask, positive) for mask in _flat_pair(pred, target))
    cells = [(~true & ~selected), (~true & selected), (true & ~selected), (true & selected)]
    table = torch.stack([cell.sum(1) for cell in cells], dim=-1).reshape(-1, 2, 2)
    return sum_by_group(table, group, num_groups)


def rate_gap(counts: Tensor) -> Tensor:
    """Gap (...) between groups in the share of the second column of counts (G, ..., 2)."""
    return max_gap(_divide(counts[..., 1], counts.sum(-1)))


def odds_gap(counts: Tensor) -> Tensor:
    """Larger of the gaps in false-positive and true-positive rate, of :func:`confusion_counts` (G, 2, 2)."""
    false_positive, true_positive = rate_gap(counts)
    return torch.fmax(false_positive, true_positive)


def bootstrap_interval(
    scores: Tensor,
    group: Tensor | None,
    statistic: Callable[[Tensor, Tensor], Tensor],
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap interval of a statistic of per-image scores.

    Samples are drawn with replacement within their group, so that every resample has the groups' sizes and sample
    ``i`` keeps its group. Resamples are stacked on a trailing dimension, of which the functions of this module accept
    any number: ``partial(group_means, num_groups=3)`` is a statistic, and so is
    ``lambda scores, group: overall_mean(scores)``.

    Args:
        scores: (N, ...) per image; NaN stays NaN.
        group: (N,) group of each image, -1 (unknown) being a stratum too; None draws from all images.
        statistic: maps scores (N, ..., R) and group (N,) to (..., R), for any R.
        num_resamples: number of resamples.
        confidence: coverage, in (0, 1).
        seed: of the drawing, which is the same on every device.

    Returns:
        Lower and upper end, each of the statistic's shape without R; resamples where it is NaN are left out.

    Raises:
        ValueError: there is no score, or ``confidence`` is not in (0, 1).
    """
    if len(scores) == 0:
        raise ValueError("bootstrap_interval: scores is empty, expected at least one image.")
    if not 0 < confidence < 1:
        raise ValueError(f"bootstrap_interval: confidence is {confidence}, expected a value in (0, 1), such as 0.95.")
    group = torch.zeros(len(scores), dtype=torch.int64, device=scores.device) if group is None else group
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, 2**22 // scores.numel())  # resamples at a time: about 32 MB of float64
    values = []
    for start in range(0, num_resamples, chunk):
        index = _stratified_resamples(group.cpu(), min(chunk, num_resamples - start), generator)
        values.append(statistic(scores[index.to(scores.device)].movedim(1, -1), group))
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=values[0].dtype, device=scores.device)
    low, high = torch.cat(values, dim=-1).nanquantile(tails, dim=-1)
    return low, high


def sum_by_group(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum values (N, ...) over the samples of each group: (num_groups + 1, ...), the unknown group (-1) last.

    Raises:
        ValueError: ``group`` is not (N,) or holds a value outside [-1, num_groups).
    """
    if group.shape != values.shape[:1]:
        raise ValueError(f"group has shape {tuple(group.shape)}, expected ({len(values)},): one index per sample.")
    if bool(((group < -1) | (group >= num_groups)).any()):
        raise ValueError(
            f"group holds {sorted(set(group.tolist()))}, expected values in [-1, {num_groups}), -1 for unknown. "
            "Set num_groups to the number of groups of the attribute."
        )
    row = torch.where(group < 0, num_groups, group)
    return values.new_zeros(num_groups + 1, *values.shape[1:]).index_add_(0, row, values)


def predicted_classes(pred: Tensor) -> Tensor:
    """Class indices (B, 1, ...) of logits (B, K, ...), K > 1; integer masks pass unchanged.

    Raises:
        ValueError: floating point values of one channel, which are no logits of classes.
    """
    if not pred.is_floating_point():
        return pred
    if pred.shape[1] == 1:
        raise ValueError(
            f"pred has dtype {pred.dtype} and shape {tuple(pred.shape)}, expected logits (B, K, ...) with K > 1 or "
            "integer class indices. Threshold a single channel first."
        )
    return pred.argmax(1, keepdim=True)


def _flat_pair(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both masks as (B, pixels), a channel dimension that only one of them has being ignored."""
    if pred.is_floating_point():
        raise ValueError(f"pred has dtype {pred.dtype}, expected class indices. Take logits.argmax(1) first.")
    if pred.dim() < target.dim():
        pred = pred.unsqueeze(1)
    elif target.dim() < pred.dim():
        target = target.unsqueeze(1)
    if pred.shape != target.shape:
        raise ValueError(
            f"pred has shape {tuple(pred.shape)} and target {tuple(target.shape)}. Bring the prediction to the size of "
            "the truth first; masks of several sizes are scored one by one."
        )
    return pred.flatten(1), target.flatten(1)


def _overlap_ratio(numerator: Tensor, denominator: Tensor, overlap: Overlap, empty: EmptyPolicy) -> Tensor:
    score = _divide(numerator, denominator)  # NaN where both are empty, 0 where one is
    if empty == "skip":
        return score
    if empty == "one":
        return score.nan_to_num(1.0)
    if empty == "zero":
        return score.nan_to_num(0.0)
    if empty == "reference":
        return score.nan_to_num(0.0).masked_fill((overlap.true == 0) & (overlap.predicted > 0), 1.0)
    raise ValueError(f"empty is {empty!r}, expected 'skip', 'one', 'zero' or 'reference'.")


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Ratio of two counts, exact to float64 where the device has it (MPS has not)."""
    dtype = torch.float32 if numerator.device.type == "mps" else torch.float64
    return numerator.to(dtype) / denominator.to(dtype)


def _isin(mask: Tensor, classes: Sequence[int] | None) -> Tensor:
    return mask != 0 if classes is None else torch.isin(mask, torch.tensor(classes, device=mask.device))


def _nanmin(x: Tensor) -> Tensor:
    missing = x.isnan()
    return x.masked_fill(missing, torch.inf).amin(0).masked_fill(missing.all(0), torch.nan)


def _stratified_resamples(group: Tensor, num_resamples: int, generator: torch.Generator) -> Tensor:
    """Indices (N, R): row i is drawn from the samples of the group of sample i."""
    order = group.argsort(stable=True)
    _, stratum, size = torch.unique(group, return_inverse=True, return_counts=True)
    first, size = (size.cumsum(0) - size)[stratum, None], size[stratum, None]
    draw = torch.rand(len(group), num_resamples, dtype=torch.float64, generator=generator)
    return order[first + torch.minimum((draw * size).long(), size - 1)]
