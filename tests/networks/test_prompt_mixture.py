import pytest
import torch

from fairdiff_lightning.data import GenerationPlan, Record
from fairdiff_lightning.data.requests import RequestBatches, make_requests
from fairdiff_lightning.networks.prompt_mixture import PHRASES, PRESETS, PromptMixture


class Texts:
    """Embeds each text as a row of its own, and remembers all that it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        known = sorted(set(self.asked))
        return torch.stack([torch.full((3, 2), float(known.index(text) + 1)) for text in texts])


def asked_rounds(count, slices=1):
    """The rounds of requests for so many samples of each slice, by slice."""
    records = [Record(f"slice{i}", {}, {}, f"slice{i}") for i in range(slices)]
    requests = make_requests(GenerationPlan(per_source=count, masks="train"), {0: "sample"}, {}, records, None)
    batch = RequestBatches(requests, len(requests), [], lambda request: {})[0]
    return [batch["round"][[name == record.id for name in batch["condition"]]] for record in records]


def vectors(text):
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(sum(map(ord, text))))


def encode(texts):
    return torch.stack([vectors(text) for text in texts])


def test_diffboosts_weights_and_words_are_the_references(reference):
    expected = reference("diffboost")["prompts"]
    mix, weights = PromptMixture("diffboost"), expected["embedding_mix"]
    joined, phrase, sketch = mix.weights
    assert mix.texts(joined, ["Prostate, MRI"], torch.tensor([0])) == [weights["a_prompt_joined_example"]]
    assert mix.weights[joined] == weights["prompt+a_prompt"]
    assert mix.weights[phrase] == weights["aug word"]
    assert mix.weights[sketch] == weights["'gray, sketch'"]
    assert sum(mix.weights.values()) == pytest.approx(1)


def test_the_kth_of_fifty_samples_has_the_kth_phrase(reference):
    vocabulary = reference("diffboost")["prompts"]["aug_vocabulary"]
    assert len(PHRASES) == len(set(PHRASES)) == vocabulary["n"]
    assert PHRASES[0] == vocabulary["phrase_for_sample_1"]
    assert PHRASES[-1] == vocabulary["phrase_for_sample_50"]
    mixture = PromptMixture({"{phrase}": 1.0})
    for rounds in asked_rounds(50, slices=3):
        assert mixture.texts("{phrase}", ["p"] * 50, rounds) == list(PHRASES)
    (rounds,) = asked_rounds(103)
    assert mixture.texts("{phrase}", ["p"] * 103, rounds) == [*PHRASES, *PHRASES, *PHRASES[:3]]
    assert [PromptMixture(name).counts_rounds for name in ("diffboost", "fairdiff")] == [True, False]


def test_a_mixture_is_the_weighted_sum_of_embeddings():
    rounds, prompts = asked_rounds(51)[0][[7, 50]], ["a", "b {phrase}"]
    found = PromptMixture("diffboost")(encode, prompts, rounds)
    for row, prompt, phrase in zip(found, prompts, (PHRASES[7], PHRASES[0]), strict=True):
        expected = 0.045 * vectors(f"{prompt},best quality, extremely detailed") + 0.005 * vectors(phrase)
        torch.testing.assert_close(row, expected + 0.95 * vectors("gray, sketch"))


def test_the_prompt_alone_is_its_embedding():
    assert torch.equal(PromptMixture({"{prompt}": 1.0})(encode, ["a", "b"], *asked_rounds(2)), encode(["a", "b"]))


def test_fifty_samples_of_a_dataset_need_fifty_two_texts():
    """And the negative prompt: the 53 of DiffBoost, each encoded once by :class:`PromptEncoder`."""
    asked = Texts()
    for rounds in asked_rounds(50, slices=2):
        PromptMixture("diffboost")(asked, ["Prostate, MRI"] * 50, rounds)
    assert len(set(asked.asked)) == 52


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("emit", "prompt_mixture='emit': expected is one of fairdiff, diffboost, or texts"),
        ({}, r"prompt_mixture=\{\}: expected are texts with finite weights, \{'\{prompt\}': 1\.0\}"),
        ({"{prompt}": float("nan")}, "expected are texts with finite weights"),
    ],
)
def test_mixtures_that_mean_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        PromptMixture(weights)


def test_presets_stay_as_they_are_whatever_is_done_to_a_mixture():
    PromptMixture("diffboost").weights["more"] = 1.0
    assert set(PRESETS["diffboost"]) == {"{prompt},best quality, extremely detailed", "{phrase}", "gray, sketch"}
