"""Prompts as embeddings for cross-attention: by a text encoder that reads each text once, or learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GROUP = "{group}"
UNKNOWN_GROUP = "unknown"
"""The word for a group that is not known."""
LEARNED_TOKENS = 4


class PromptEncoder:
    """A frozen CLIP text encoder behind a memory of what it has encoded.

    It is no ``nn.Module`` on purpose: the encoder stays on the CPU and out of parameters, checkpoints and averages;
    only embeddings reach the device.

    Args:
        tokenizer: of ``transformers``.
        encoder: ``CLIPTextModel``; its last hidden state is what Stable Diffusion looks at.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        self._known: dict[tuple[str, torch.device], Tensor] = {}

    def __call__(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings (P, L, D) of the texts, on the device."""
        new = sorted({text for text in texts if (text, device) not in self._known})
        if new:
            self._known |= zip([(text, device) for text in new], self._encode(new).to(device), strict=True)
        return torch.stack([self._known[text, device] for text in texts])

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the encoder's weights and forget what was encoded with the old ones."""
        self.encoder.load_state_dict(state)
        self._known.clear()

    def _encode(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # no inference mode: what is remembered while predicting must serve training too
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            embeddings: Tensor = self.encoder(tokens.input_ids.clone())[0]
        return embeddings


class Prompts(nn.Module):
    """The distinct prompts of a generator: one for all, or one for each group and one for unknown groups.

    Args:
        template: the text, with ``{group}`` where the group's name goes; None when every sample brings its own.
        num_groups: groups that the template distinguishes, 0 when it names none.
        encoder: turns text into embeddings; None learns one embedding for each distinct prompt.
        dim: channels of a learned embedding.
        negative: what guidance leads away from; the empty prompt when empty.
        sampling_suffix: what the prompt ends with in sampling only.

    Raises:
        ValueError: when prompts would have to be learned that are not known beforehand.
    """

    def __init__(
        self,
        template: str | None,
        num_groups: int,
        encoder: PromptEncoder | None,
        dim: int,
        negative: str = "",
        sampling_suffix: str = "",
    ) -> None:
        super().__init__()
        self.template, self.num_groups, self.encoder = template, num_groups, encoder
        self.negative_text, self.sampling_suffix = negative, sampling_suffix
        self.names: Sequence[str] | None = None
        self.learned: nn.Parameter | None = None
        if encoder is None:
            if template is None or negative:
                raise ValueError(
                    f"prompt={template!r}, negative_prompt={negative!r}: the base has no text encoder, so it learns "
                    "one embedding for each prompt that is known beforehand. Give a constant prompt or one with "
                    "{group}, and no negative prompt; or a base with a text encoder."
                )
            self.learned = nn.Parameter(torch.randn(num_groups + 1 + 1, LEARNED_TOKENS, dim))  # the last is empty

    def forward(self, group: Tensor, sampling: bool = False) -> Tensor:
        """Embeddings (B, L, D) for the groups (B,) of samples, -1 for unknown; zeros when the template names none."""
        table = self._table(group.device, sampling)
        return table[torch.where(group < 0, self.num_groups, group)]

    def encode(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings (B, L, D) of any texts."""
        assert self.encoder is not None, "only a text encoder knows what a text means"
        return self.encoder(texts, device)

    def empty(self, device: torch.device) -> Tensor:
        """The empty prompt (1, L, D)."""
        return self.encode([""], device) if self.learned is None else self.learned[-1:]

    def negative(self, device: torch.device) -> Tensor:
        """What guidance leads away from (1, L, D)."""
        return self.encode([self.negative_text], device) if self.negative_text else self.empty(device)

    def _table(self, device: torch.device, sampling: bool) -> Tensor:
        if self.learned is not None:
            return self.learned[:-1]
        text = f"{self.template}{self.sampling_suffix if sampling else ''}"
        if not self.num_groups:
            return self.encode([text], device)
        if self.names is None or len(self.names) != self.num_groups:
            raise ValueError(
                f"the prompt '{self.template}' names one of {self.num_groups} groups, whose names are {self.names}: "
                "give group_names, or a data module that has attribute_groups."
            )
        return self.encode([text.replace(GROUP, name) for name in (*self.names, UNKNOWN_GROUP)], device)
