"""Weighted sums of text embeddings, the authors' own among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

PROMPT, PHRASE = "{prompt}", "{phrase}"
Preset = Literal["fairdiff", "diffboost"]
PRESETS: dict[str, dict[str, float]] = {
    "fairdiff": {f"{PROMPT}, low quality, blurry": 1.0},
    "diffboost": {f"{PROMPT},best quality, extremely detailed": 0.045, PHRASE: 0.005, "gray, sketch": 0.95},
}
PHRASES = (
    *("Enhance contrast", "High resolution", "Low resolution", "Clear edges", "Blurred edges", "Noise reduction"),
    *("Sharp detail", "Smooth texture", "Brightened image", "Darkened image", "High dynamic range"),
    *("Low dynamic range", "Balanced light", "Even background", "Grey colour map", "Pseudo-colour", "Cropped image"),
    *("Zoomed detail", "Panorama", "Artefact removal", "Image subtraction", "Adaptive histogram equalisation"),
    *("Contrast stretching", "Gamma correction", "Normalised intensity", "Intensity mapping", "Thresholded image"),
    *("Edge detection", "Contours", "Morphology", "Filtered image", "Gaussian blur", "Median filter"),
    *("Bilateral filter", "Anisotropic diffusion", "Image enhancement", "Inverse transform", "Deconvolution"),
    *("Motion compensation", "Image compression", "Denoised image", "Speckle reduction", "Inpainting", "Clustering"),
    *("Vignette correction", "Lens distortion", "Changed perspective", "Reflections", "Shadows", "Image blending"),
)
"""DiffBoost's fifty topics in their order, which weigh half a percent; the words are our own, so that the hash of the
original list is another."""


class PromptMixture:
    """A sample's embedding as a weighted sum of the embeddings of several texts.

    ``diffboost`` is what the code of Zhang et al., arXiv:2310.12868, samples with: 95 % of it is "gray, sketch".
    ``fairdiff`` is the prompt with the words that the code of Li et al., arXiv:2407.06250, adds to it.

    Args:
        weights: text -> weight, or the name of a preset. In a text, ``{prompt}`` stands for the sample's own prompt,
            and ``{phrase}`` for one of :data:`PHRASES`: the k-th sample of a condition takes the k-th of them, and
            after the last the first again.

    Raises:
        ValueError: for an unknown name, no text, or a weight that is no finite number.
    """

    def __init__(self, weights: Mapping[str, float] | Preset) -> None:
        if isinstance(weights, str):
            if weights not in PRESETS:
                raise ValueError(
                    f"prompt_mixture='{weights}': expected is one of {', '.join(PRESETS)}, or texts with their weights."
                )
            weights = PRESETS[weights]
        if not weights or not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(
                f"prompt_mixture={dict(weights)}: expected are texts with finite weights, {{'{PROMPT}': 1.0}} for the "
                "prompt alone."
            )
        self.weights = dict(weights)

    @property
    def counts_rounds(self) -> bool:
        """Whether what is said of a sample depends on its round."""
        return any(PHRASE in text for text in self.weights)

    def texts(self, template: str, prompts: Sequence[str], rounds: Tensor) -> list[str]:
        """What one text of the mixture says for each sample."""
        phrases = [PHRASES[number % len(PHRASES)] for number in rounds.tolist()]
        filled = zip(prompts, phrases, strict=True)
        return [template.replace(PHRASE, phrase).replace(PROMPT, prompt) for prompt, phrase in filled]

    def __call__(self, encode: Callable[[list[str]], Tensor], prompts: Sequence[str], rounds: Tensor) -> Tensor:
        """Embeddings (B, L, D) of samples.

        Args:
            encode: gives the embeddings of any texts.
            prompts: of the samples.
            rounds: (B,), which sample of its condition each one is, from 0.
        """
        terms = [weight * encode(self.texts(text, prompts, rounds)) for text, weight in self.weights.items()]
        return torch.stack(terms).sum(0)
