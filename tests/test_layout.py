import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fairdiff_lightning"
FORBIDDEN = {
    "geometry": {"modules", "data", "callbacks", "networks", "diffusion", "losses", "metrics"},
    "diffusion": {"modules", "data", "callbacks"},
    "networks": {"modules", "data", "callbacks", "losses", "metrics"},
    "losses": {"modules", "data", "callbacks"},
    "metrics": {"modules", "data", "callbacks"},
    "data": {"modules", "callbacks", "networks", "losses"},
    "callbacks": {"modules", "networks", "losses"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_imports_point_one_way(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        for name in imported(path):
            top, _, rest = name.partition(".")
            assert top != "fairdiff_lightning" or rest.split(".")[0] not in FORBIDDEN[folder], f"{path.name}: {name}"
