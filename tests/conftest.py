"""Fixtures that all tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FAIRDIFF_CACHE", str(Path(__file__).parent / ".cache"))

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def reference() -> Callable[[str], dict[str, Any]]:
    """Numbers made by the papers' own code: ``reference("dmoe")["A1_router_noise_off"]``."""

    def load(name: str) -> dict[str, Any]:
        content = json.loads((Path(__file__).parent / "reference" / f"{name}.json").read_text())
        return {check["id"]: check for check in content["checks"]} if "checks" in content else content

    return load


@pytest.fixture
def realdata() -> Path:
    """Folder of real files; tests that need it are skipped without it."""
    folder = Path(os.environ.get("FAIRDIFF_REALDATA", REPOSITORY.parent / "shared" / "realdata"))
    if not folder.is_dir():
        pytest.skip(f"no real files at '{folder}'; FAIRDIFF_REALDATA names their folder")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
