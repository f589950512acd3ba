"""Modules of which only a part is trained: the rest stays in evaluation and out of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from lightning.pytorch import LightningModule
from torch import nn

from fairdiff_lightning.networks.checkpoint import check_state_dict


class PartlyTrained(LightningModule):
    """Base, beside others and before them, of a module with frozen parts that it can build again by itself."""

    _frozen: tuple[nn.Module, ...] = ()
    _thawed: tuple[nn.Module, ...] = ()

    def freeze_parts(self, *frozen: nn.Module, but: Sequence[nn.Module] = ()) -> None:
        """Train everything but these.

        Args:
            *frozen: modules that are neither trained nor saved.
            but: modules inside of them that are.
        """
        self._frozen, self._thawed = frozen, tuple(but)
        for modules, learns in ((self._frozen, False), (self._thawed, True)):
            for module in modules:
                module.requires_grad_(learns)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch to training; what is frozen stays in evaluation."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        for module in self._thawed:
            module.train(mode)
        return self

    def trained_names(self) -> set[str]:
        """Names of the tensors of ``state_dict`` that do not lie in frozen parts."""
        frozen = _tensors(self._frozen) - _tensors(self._thawed)
        return {name for name, tensor in self.state_dict(keep_vars=True).items() if id(tensor) not in frozen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained."""
        super().on_save_checkpoint(checkpoint)
        kept = self.trained_names()
        checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say by name what does not fit when the checkpoint is of another part or architecture; add what is frozen."""
        super().on_load_checkpoint(checkpoint)
        kept, state = self.trained_names(), self.state_dict()
        check_state_dict(checkpoint["state_dict"], {name: state[name] for name in kept}, "checkpoint")
        checkpoint["state_dict"] = {**state, **checkpoint["state_dict"]}


def _tensors(modules: Sequence[nn.Module]) -> set[int]:
    return {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
