"""Prompts as embeddings for cross-attention: by a text encoder that reads each text once, or learned."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairdiff_lightning.networks.checkpoint import read_state_dict
from fairdiff_lightning.networks.prompt_mixture import PromptMixture

GROUP = "{group}"
UNKNOWN_GROUP = "unknown"
"""The word for a group that is not known."""
LEARNED_TOKENS = 4
LEARNED_FILE = "prompts.safetensors"
"""Where a saved pipeline has its learned prompts."""
TEXTS = "texts"
"""Where that file has the texts of samples that were learned."""
REMEMBERED = 1024
"""Texts whose embeddings are kept, 240 kB each with CLIP."""


class PromptEncoder:
    """A frozen CLIP text encoder behind a memory of what it has encoded last.

    It is no ``nn.Module`` on purpose: the encoder stays out of parameters, checkpoints and averages, and on the CPU
    unless a pipeline that shares it moves it; only embeddings reach the device.

    Args:
        tokenizer: of ``transformers``.
        encoder: ``CLIPTextModel``; its last hidden state is what Stable Diffusion looks at.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._kept: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}

    def __call__(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings (P, L, D) of the texts, float32, on the device."""
        with torch.inference_mode(False), torch.no_grad():  # what is met while predicting must serve training too
            new = sorted(set(texts) - self._known.keys())
            if new:
                self._known |= {text: row.clone() for text, row in zip(new, self._encode(new), strict=True)}
            rows = torch.stack([self._known[text] for text in texts])
            for text in texts:
                self._known.move_to_end(text)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)

    def keep(self, texts: tuple[str, ...], device: torch.device) -> Tensor:
        """The same for a generator's own few prompts, which stay on the device."""
        if (texts, device) not in self._kept:
            self._kept[texts, device] = self(texts, device)
        return self._kept[texts, device]

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the encoder's weights and forget what was encoded with the old ones."""
        self.encoder.load_state_dict(state)
        self._known.clear()
        self._kept.clear()

    def _encode(self, texts: list[str]) -> Tensor:
        self._say_what_is_cut(texts)
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.encoder.parameters()).device
        with torch.autocast(device.type, enabled=False):
            embeddings: Tensor = self.encoder(tokens.input_ids.clone().to(device))[0]
        return embeddings.float().cpu()

    def _say_what_is_cut(self, texts: list[str]) -> None:
        limit = self.tokenizer.model_max_length
        for text, tokens in zip(texts, self.tokenizer(texts, verbose=False).input_ids, strict=True):
            if len(tokens) > limit:
                warnings.warn(
                    f"prompt '{text}' has {len(tokens)} tokens with start and end, the text encoder reads {limit}: "
                    f"'{self.tokenizer.decode(tokens[limit - 1 : -1])}' is not seen. Shorten the prompt.",
                    stacklevel=2,
                )


class Prompts(nn.Module):
    """The distinct prompts of a generator: one for all, or one for each group and one for unknown groups.

    Samples may bring texts of their own. An encoder reads any; without one an embedding is learned for each text that
    is told of beforehand, by ``texts`` or :meth:`learn`.

    Args:
        template: the text, with ``{group}`` where the group's name goes; None when every sample brings its own.
        num_groups: groups that the template distinguishes, 0 when it names none.
        encoder: turns text into embeddings; None learns one embedding for each distinct prompt.
        dim: channels of a learned embedding.
        negative: what guidance leads away from; the empty prompt when empty.
        mixture: what samples are drawn with instead of the prompt alone.
        texts: of samples, that embeddings are learned of.
        learned: what the learned embeddings start from: ``prompts`` (P, L, D) of the template, one for each group and
            one for unknown groups; of the texts; of the empty prompt; and which of them were ``trained`` (P,).

    Raises:
        ValueError: for a negative prompt or a mixture without an encoder, or embeddings that were learned for other
            prompts.
    """

    def __init__(
        self,
        template: str | None,
        num_groups: int,
        encoder: PromptEncoder | None,
        dim: int,
        negative: str = "",
        mixture: PromptMixture | None = None,
        texts: Sequence[str] = (),
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.template, self.num_groups, self.encoder = template, num_groups, encoder
        self.negative_text, self.mixture = negative, mixture
        self.names: Sequence[str] | None = None
        self._told = False
        self._own_rows = 0 if template is None else num_groups + 1
        self._rows = {text: self._own_rows + row for row, text in enumerate(dict.fromkeys(texts))}
        self.learned: nn.Parameter | None = None
        self.trained: Tensor | None
        self.register_buffer("trained", None)
        if encoder is None:
            if negative or mixture:
                raise ValueError(
                    f"negative_prompt={negative!r}, prompt_mixture={mixture and mixture.weights}: the base has no text "
                    "encoder, so it learns one embedding for each prompt that it is trained with. Give no negative "
                    "prompt and no mixture, or a base with a text encoder."
                )
            shape = (self._own_rows + len(self._rows) + 1, LEARNED_TOKENS, dim)  # the last is empty
            self.learned = nn.Parameter(torch.randn(shape))
            self.trained = torch.zeros(shape[0], dtype=torch.bool)
            if learned is not None:
                self.learned.data.copy_(_fitting(learned["prompts"], shape))
                self.trained = learned["trained"].clone()

    @property
    def learned_texts(self) -> list[str]:
        """Texts of samples that have a learned embedding."""
        return list(self._rows)

    @property
    def reads_texts(self) -> bool:
        """Whether the texts that samples bring are made use of."""
        return self.encoder is not None or bool(self._rows)

    def learn(self, texts: Sequence[str]) -> None:
        """Have one embedding for each of these texts; what is learned already of them stays.

        To be called before an optimizer knows the embeddings.

        Raises:
            ValueError: with an encoder, which learns none.
        """
        if self.learned is None or self.trained is None:
            raise ValueError(f"learned_prompts={list(texts)}: the base has a text encoder, which reads any text.")
        new = list(dict.fromkeys(texts))
        if new == self.learned_texts:
            return
        old, fresh = self.learned.detach(), torch.randn(len(new), *self.learned.shape[1:]).to(self.learned)
        rows = [old[self._rows[text]] if text in self._rows else row for text, row in zip(new, fresh, strict=True)]
        self.learned = nn.Parameter(torch.cat([old[: self._own_rows], *(row[None] for row in rows), old[-1:]]))
        seen, place = self.trained, torch.tensor([self._rows.get(text, -1) for text in new], dtype=torch.int64)
        place = place.to(seen.device)
        self.trained = torch.cat([seen[: self._own_rows], seen[place] & (place >= 0), seen[-1:]])
        self._rows = {text: self._own_rows + row for row, text in enumerate(new)}

    def rows(self, of: Tensor | Sequence[str]) -> Tensor:
        """Places (B,) of samples' embeddings, by their groups (B,), -1 for unknown, or by texts that are learned."""
        if isinstance(of, Tensor):
            return torch.where(of < 0, self.num_groups, of)
        return torch.tensor([self._rows[text] for text in of])

    def mark_trained(self, rows: Tensor, dropout: float) -> None:
        """Note which learned embeddings training samples had.

        Args:
            rows: see :meth:`rows`.
            dropout: share of the samples that had the empty prompt instead.
        """
        assert self.trained is not None, "a text encoder reads any text"
        self.trained[rows.to(self.trained.device, non_blocking=True)] = True
        self.trained[-1] |= dropout > 0

    def check_trained(self, rows: Tensor) -> None:
        """Refuse to sample with learned embeddings that no training sample had, if others were trained.

        Args:
            rows: see :meth:`rows`.

        Raises:
            ValueError: naming the first.
        """
        assert self.trained is not None, "a text encoder reads any text"
        seen = self.trained[rows.to(self.trained.device)]
        if self.trained.any() and not seen.all():
            name = self._name(int(rows[~seen.to(rows.device)][0]))
            raise ValueError(
                f"nothing was learned for {name}: no training sample had it. "
                "Ask for others, or train with samples of it (a request knows the group of one attribute alone)."
            )

    def forward(self, group: Tensor) -> Tensor:
        """Embeddings (B, L, D) for the groups (B,) of samples, -1 for unknown; zeros when the template names none."""
        rows = self.rows(group)
        return (self._own(*self._texts(), device=group.device) if self.learned is None else self.learned)[rows]

    def texts(self, group: Tensor) -> list[str]:
        """The prompts of samples by their groups (B,), as text."""
        known = self._texts()
        return [known[index if index >= 0 else self.num_groups] for index in group.tolist()]

    def encode(self, texts: Sequence[str], device: torch.device, rounds: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, D) of texts, or of what the mixture makes of them for samples of these rounds (B,)."""
        if self.learned is not None:
            return self.learned[self.rows(texts).to(device, non_blocking=True)]
        assert self.encoder is not None, "only a text encoder knows what a text means"
        if self.mixture is None or rounds is None:
            return self.encoder(texts, device)
        return self.mixture(partial(self.encoder, device=device), texts, rounds)

    def drop(self, prompts: Tensor, share: float) -> Tensor:
        """The empty prompt instead of a random share of the prompts (B, L, D)."""
        if not share:
            return prompts
        dropped = torch.rand(len(prompts), 1, 1, device=prompts.device) < share
        return torch.where(dropped, self.empty(prompts.device), prompts)

    def empty(self, device: torch.device) -> Tensor:
        """The empty prompt (1, L, D)."""
        return self._own("", device=device) if self.learned is None else self.learned[-1:]

    def negative(self, device: torch.device) -> Tensor:
        """What guidance leads away from (1, L, D)."""
        return self._own(self.negative_text, device=device) if self.negative_text else self.empty(device)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch without the prompts that are needed, with another number of them, or with unlearned ones.

        Where no text of a sample is learned, but a template is, a warning tells so, once.
        """
        first, given = batch["id"][0], batch.get("prompt")
        if given is None and self.template is None:
            raise ValueError(f"'{first}' has {sorted(batch)}; prompt=None needs 'prompt'.")
        if isinstance(given, str) or (given is not None and len(given) != len(batch["id"])):
            raise ValueError(f"'prompt' of {first!r} and others is {given!r}; expected is a text for each sample.")
        if self.encoder is None and given is not None:
            self._check_learned(first, given)

    def _check_learned(self, first: str, given: Sequence[str]) -> None:
        unknown = [text for text in given if text not in self._rows]
        if unknown and (self._rows or self.template is None):
            raise ValueError(
                f"the batch of '{first}' and others brings the prompt '{unknown[0]}', which has no embedding. "
                f"The base has no text encoder, and knows {self.learned_texts}. Train with learned_prompts=[...] that "
                "holds it, or with a data module that tells its `prompts`; or take a base with a text encoder."
            )
        others = [text for text in unknown if text != self.template]
        if others and not self._told:
            self._told = True
            warnings.warn(
                f"the batch of '{first}' and others brings prompts such as '{others[0]}', but the base has no text "
                "encoder, and neither learned_prompts nor the data module told of them before. What is learned for "
                f"prompt='{self.template}'{' and each of its groups' if self.num_groups else ''} is used instead.",
                stacklevel=3,
            )

    def write_learned(self, path: Path) -> None:
        """Save the learned embeddings and the texts that some of them are of; :func:`read_learned` reads them."""
        from safetensors.torch import save_file

        assert self.learned is not None, "nothing is learned beside a text encoder"
        assert self.trained is not None
        embeddings = {"prompts": self.learned.detach().cpu().contiguous(), "trained": self.trained.cpu()}
        save_file(embeddings, str(path), {TEXTS: json.dumps(self.learned_texts)})

    def check_guidance(self, scale: float, dropout: float) -> None:
        """Refuse guidance away from an empty prompt that is learned, but not trained."""
        if self.learned is not None and not dropout and scale != 1:
            raise ValueError(
                f"guidance_scale {scale} leads away from the empty prompt, whose embedding nothing trains: the base "
                "has no text encoder, and no training sample sees that prompt (text_dropout is 0, which is what "
                "reference_behaviour makes it). Set guidance_scale=1, or text_dropout above 0."
            )

    def _name(self, row: int) -> str:
        """What a learned embedding is of, for a message."""
        if row == -1:
            return "the empty prompt, which guidance leads away from"
        if row >= self._own_rows:
            return f"the prompt '{self.learned_texts[row - self._own_rows]}'"
        if not self.num_groups:
            return f"the prompt '{self.template}'"
        names = self.names or [str(group) for group in range(self.num_groups)]
        return f"group '{(*names, UNKNOWN_GROUP)[row]}' of the prompt '{self.template}'"

    def _texts(self) -> tuple[str, ...]:
        """The template for each group, and last for unknown ones."""
        template = str(self.template)
        if not self.num_groups:
            return (template,)
        if self.names is None or len(self.names) != self.num_groups:
            raise ValueError(
                f"the prompt '{self.template}' names one of {self.num_groups} groups, whose names are {self.names}: "
                "give group_names, or a data module that has attribute_groups."
            )
        return tuple(template.replace(GROUP, name) for name in (*self.names, UNKNOWN_GROUP))

    def _own(self, *texts: str, device: torch.device) -> Tensor:
        assert self.encoder is not None, "only a text encoder knows what a text means"
        return self.encoder.keep(texts, device)


def read_learned(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Learned embeddings ``prompts`` (P, L, D), which of them were ``trained`` (P,), and the samples' texts."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return read_state_dict(path), json.loads(file.metadata()[TEXTS])


def _fitting(learned: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if tuple(learned.shape) != shape:
        raise ValueError(
            f"the base's {LEARNED_FILE} has shape {tuple(learned.shape)}, but this module learns {shape}: an embedding "
            "for each group that the prompt names, one for unknown groups, one for each text and the empty one. Give "
            "the prompt, num_groups and learned_prompts that it was saved with, or remove the file to learn new ones."
        )
    return learned
