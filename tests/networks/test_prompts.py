import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fairdiff_lightning.networks import prompts
from fairdiff_lightning.networks.prompt_mixture import PromptMixture
from fairdiff_lightning.networks.prompts import PromptEncoder, Prompts

CPU = torch.device("cpu")


class Lengths(nn.Module):
    """Embeds a text by its length, and remembers what it was given."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device=device))
        self.seen = []

    def forward(self, ids):
        self.seen.append(ids)
        values = ids.new_zeros(len(ids), 1, 1, device="cpu") if ids.is_meta else ids[:, :1, None]
        return (values.expand(-1, 3, 2).to(self.weight.dtype),)


def tokenizer(texts, **_):
    return SimpleNamespace(input_ids=torch.tensor([[len(text), 0] for text in texts]))


tokenizer.model_max_length = 2


def test_only_the_last_texts_are_remembered_each_by_itself(monkeypatch):
    monkeypatch.setattr(prompts, "REMEMBERED", 2)
    encoder = PromptEncoder(tokenizer, Lengths())
    assert encoder(["a", "bb", "ccc"], CPU)[:, 0, 0].tolist() == [1, 2, 3]
    assert list(encoder._known) == ["bb", "ccc"]
    encoder(["bb"], CPU)
    encoder(["dddd"], CPU)
    assert list(encoder._known) == ["bb", "dddd"]
    assert [len(ids) for ids in encoder.encoder.seen] == [3, 1]
    assert all(row.untyped_storage().nbytes() == row.numel() * 4 for row in encoder._known.values())


def test_a_generators_own_prompts_stay_however_many_texts_come(monkeypatch):
    monkeypatch.setattr(prompts, "REMEMBERED", 1)
    own = Prompts("{group}", 2, PromptEncoder(tokenizer, Lengths()), 2)
    own.names = ["a", "bb"]
    first = own(torch.tensor([0, 1, -1]))
    own.encode(["x", "yy", "zzz"], CPU)
    assert torch.equal(own(torch.tensor([0, 1, -1])), first)
    assert len(own.encoder.encoder.seen) == 2
    own.encoder.load_state_dict(own.encoder.encoder.state_dict())
    own(torch.tensor([0]))
    assert len(own.encoder.encoder.seen) == 3, "other weights are asked anew"


def test_texts_follow_an_encoder_that_a_pipeline_has_moved(monkeypatch):
    exact = []
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: exact.append((kind, enabled)) or nullcontext())
    encoder = PromptEncoder(tokenizer, Lengths("meta"))
    assert encoder(["a"], CPU).device == CPU
    assert encoder.encoder.seen[0].device.type == "meta"
    assert exact == [("meta", False)]


def test_embeddings_are_float32_whatever_the_encoder_computes_in():
    encoder = PromptEncoder(tokenizer, Lengths().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(["a"], CPU).dtype == torch.float32


def test_learned_prompts_start_from_given_ones_of_the_same_number():
    learned = {"prompts": torch.randn(4, 4, 6), "trained": torch.tensor([True, False, False, True])}
    own = Prompts("{group}", 2, None, 6, learned=learned)
    assert torch.equal(own.learned, learned["prompts"])
    assert torch.equal(own.trained, learned["trained"])
    with pytest.raises(ValueError, match=r"shape \(4, 4, 6\), but this module learns \(5, 4, 6\)"):
        Prompts("{group}", 3, None, 6, learned=learned)


def test_each_text_of_samples_has_an_embedding_of_its_own_beside_those_of_the_template():
    own = Prompts("{group}", 2, None, 6, texts=["bb", "a", "bb"])
    groups, empty = own(torch.tensor([0, 1, -1])), own.empty(CPU)
    assert own.learned_texts == ["bb", "a"]
    assert own.encode(["a", "bb", "a"], CPU).equal(own.learned[[4, 3, 4]])
    assert torch.cat([groups, own.encode(["bb", "a"], CPU), empty]).unique(dim=0).shape == (6, 4, 6)
    own.encode(["a"], CPU).sum().backward()
    assert own.learned.grad.abs().sum((1, 2)).nonzero().tolist() == [[4]], "that one alone learns from it"


def test_texts_that_are_learned_later_leave_the_others_as_they_are(tmp_path):
    own = Prompts(None, 0, None, 6, texts=["a", "bb"])
    kept, empty, embeddings = own.encode(["bb"], CPU), own.empty(CPU), own.learned
    own.learn(["a", "bb"])
    assert own.learned is embeddings, "nothing is new"
    own.mark_trained(own.rows(["bb"]), dropout=0.0)
    assert own.trained.tolist() == [False, True, False]
    own.learn(["ccc", "bb"])
    assert own.trained.tolist() == [False, True, False]
    own.learn(["bb", "ccc"])
    assert own.trained.tolist() == [True, False, False]
    assert own.learned.shape == (3, 4, 6)
    assert own.encode(["bb"], CPU).equal(kept)
    assert own.empty(CPU).equal(empty)
    own.write_learned(tmp_path / "prompts.safetensors")
    learned, texts = prompts.read_learned(tmp_path / "prompts.safetensors")
    again = Prompts(None, 0, None, 6, texts=texts, learned=learned)
    assert again.encode(["bb", "ccc"], CPU).equal(own.encode(["bb", "ccc"], CPU))
    with pytest.raises(ValueError, match=r"learned_prompts=\['a'\]: the base has a text encoder"):
        Prompts(None, 0, PromptEncoder(tokenizer, Lengths()), 2).learn(["a"])


def test_an_embedding_that_nothing_trained_is_named_and_not_sampled_with():
    own = Prompts("eye of {group}", 2, None, 6, texts=["eye", "nose"])
    own.check_trained(own.rows(torch.tensor([0, -1])))  # of weights that nobody trained any
    own.mark_trained(own.rows(torch.tensor([1, 1])), dropout=0.0)
    own.mark_trained(own.rows(["eye"]), dropout=0.0)
    own.check_trained(own.rows(["eye"]))
    own.check_trained(own.rows(torch.tensor([1])))
    with pytest.raises(ValueError, match="nothing was learned for the prompt 'nose': no training sample had it"):
        own.check_trained(own.rows(["eye", "nose"]))
    with pytest.raises(ValueError, match=r"for group '0' of the prompt 'eye of \{group\}'"):
        own.check_trained(own.rows(torch.tensor([1, 0])))
    own.names = ["a", "bb"]
    with pytest.raises(ValueError, match=r"for group 'unknown' of the prompt"):
        own.check_trained(own.rows(torch.tensor([-1])))
    own(torch.tensor([0]))
    own.encode(["nose"], CPU)
    assert own.trained.tolist() == [False, True, False, True, False, False], "looking up trains nothing"
    with pytest.raises(ValueError, match="nothing was learned for the empty prompt, which guidance leads away from"):
        own.check_trained(torch.tensor([1, -1]))
    own.mark_trained(own.rows(["eye"]), dropout=0.1)
    own.check_trained(torch.tensor([1, -1]))


class Words:
    """A tokenizer of five tokens that knows no word, as CLIP's would, cut or not."""

    model_max_length = 5

    def __call__(self, texts, padding=False, truncation=False, **_):
        ids = [[0, *(1 + i for i in range(len(text.split()))), 99] for text in texts]
        if truncation:
            ids = torch.tensor([[*(row[:-1] + [99] * 5)[:4], 99] for row in ids])
        return SimpleNamespace(input_ids=ids)

    def decode(self, tokens):
        return " ".join(f"word{token}" for token in tokens)


def test_what_the_text_encoder_does_not_see_of_a_prompt_is_said():
    encoder = PromptEncoder(Words(), Lengths())
    with pytest.warns(UserWarning, match="'a b c d e' has 7 tokens .* reads 5: 'word4 word5' is not seen. Shorten"):
        encoder(["a b c d e"], CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["a b c", "a b c d e"], CPU)  # one is whole, the other has been said


def test_samples_of_groups_are_mixed_each_by_its_text_and_seed():
    own = Prompts("of {group}", 2, PromptEncoder(tokenizer, Lengths()), 2, mixture=PromptMixture({"{prompt}!": 0.5}))
    own.names = ["a", "bb"]
    texts = own.texts(torch.tensor([1, -1, 0]))
    assert texts == ["of bb", "of unknown", "of a"]
    assert own.encode(texts, CPU, torch.arange(3))[:, 0, 0].tolist() == [3, 5.5, 2.5]
    assert own.encode(texts, CPU)[:, 0, 0].tolist() == [5, 10, 4], "training sees the prompt alone"


def test_a_mixture_without_a_text_encoder_is_refused():
    with pytest.raises(ValueError, match=r"prompt_mixture=\{'\{prompt\}': 1\.0\}: the base has no text encoder"):
        Prompts("", 0, None, 6, mixture=PromptMixture({"{prompt}": 1.0}))
