"""Prompts as embeddings for cross-attention: by a text encoder that reads each text once, or learned."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fairdiff_lightning.networks.prompt_mixture import PromptMixture

GROUP = "{group}"
UNKNOWN_GROUP = "unknown"
"""The word for a group that is not known."""
LEARNED_TOKENS = 4
LEARNED_FILE = "prompts.safetensors"
"""Where a saved pipeline has its learned prompts."""
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

    Args:
        template: the text, with ``{group}`` where the group's name goes; None when every sample brings its own.
        num_groups: groups that the template distinguishes, 0 when it names none.
        encoder: turns text into embeddings; None learns one embedding for each distinct prompt.
        dim: channels of a learned embedding.
        negative: what guidance leads away from; the empty prompt when empty.
        mixture: what samples are drawn with instead of the prompt alone.
        learned: values (num_groups + 2, L, D) that the learned embeddings start from.

    Raises:
        ValueError: when prompts would have to be learned that are not known beforehand, or were learned for others.
    """

    def __init__(
        self,
        template: str | None,
        num_groups: int,
        encoder: PromptEncoder | None,
        dim: int,
        negative: str = "",
        mixture: PromptMixture | None = None,
        learned: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.template, self.num_groups, self.encoder = template, num_groups, encoder
        self.negative_text, self.mixture = negative, mixture
        self.names: Sequence[str] | None = None
        self._told = False
        self.learned: nn.Parameter | None = None
        if encoder is None:
            if template is None or negative or mixture:
                raise ValueError(
                    f"prompt={template!r}, negative_prompt={negative!r}, prompt_mixture={mixture and mixture.weights}: "
                    "the base has no text encoder, so it learns one embedding for each prompt that is known "
                    "beforehand. Give a constant prompt or one with {group}, no negative prompt and no mixture; or a "
                    "base with a text encoder."
                )
            shape = (num_groups + 1 + 1, LEARNED_TOKENS, dim)  # the last is empty
            values = torch.randn(shape)
            self.learned = nn.Parameter(values if learned is None else values.copy_(_fitting(learned, shape)))

    def forward(self, group: Tensor) -> Tensor:
        """Embeddings (B, L, D) for the groups (B,) of samples, -1 for unknown; zeros when the template names none."""
        table = self._own(*self._texts(), device=group.device) if self.learned is None else self.learned[:-1]
        return table[torch.where(group < 0, self.num_groups, group)]

    def texts(self, group: Tensor) -> list[str]:
        """The prompts of samples by their groups (B,), as text."""
        known = self._texts()
        return [known[index if index >= 0 else self.num_groups] for index in group.tolist()]

    def encode(self, texts: Sequence[str], device: torch.device, rounds: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, D) of any texts, or of what the mixture makes of them for samples of these rounds (B,)."""
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
        """Refuse a batch without the prompts that are needed, or with another number of them than samples.

        Its texts say nothing to learned embeddings: a warning tells so, once, when they differ from the template.
        """
        first, given = batch["id"][0], batch.get("prompt")
        if given is None and self.template is None:
            raise ValueError(f"'{first}' has {sorted(batch)}; prompt=None needs 'prompt'.")
        if isinstance(given, str) or (given is not None and len(given) != len(batch["id"])):
            raise ValueError(f"'prompt' of {first!r} and others is {given!r}; expected is a text for each sample.")
        others = [text for text in given or () if text != self.template]
        if self.encoder is None and others and not self._told:
            self._told = True
            warnings.warn(
                f"the batch of '{first}' and others brings prompts such as '{others[0]}', which need a base with a "
                f"text encoder. This one has none: what it learns for prompt='{self.template}'"
                f"{' and each of its groups' if self.num_groups else ''} is used instead.",
                stacklevel=2,
            )

    def check_guidance(self, scale: float, dropout: float) -> None:
        """Refuse guidance away from an empty prompt that is learned, but not trained."""
        if self.learned is not None and not dropout and scale != 1:
            raise ValueError(
                f"guidance_scale {scale} leads away from the empty prompt, whose embedding nothing trains: the base "
                "has no text encoder, and no training sample sees that prompt (text_dropout is 0, which is what "
                "reference_behaviour makes it). Set guidance_scale=1, or text_dropout above 0."
            )

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


def _fitting(learned: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if tuple(learned.shape) != shape:
        raise ValueError(
            f"the base's {LEARNED_FILE} has shape {tuple(learned.shape)}, but this module learns {shape}: an embedding "
            "for each group that the prompt names, one for unknown groups and the empty one. Give the prompt and "
            "num_groups that it was saved with, or remove the file to learn new ones."
        )
    return learned
