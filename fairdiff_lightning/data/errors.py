"""Errors of the data layer: each says what was wrong, where, what was expected and what to do."""

from __future__ import annotations

from pathlib import Path


class DatasetNotFoundError(FileNotFoundError):
    """The folder is missing, or it does not hold the data set in its owner's layout.

    Args:
        dataset: name of the data set.
        root: the folder that was searched.
        expected: the tree that was expected.
        source: where the data set comes from and under which licence.
        found: what stands there instead, if anything.
    """

    def __init__(self, dataset: str, root: str | Path, expected: str, source: str, found: str = "") -> None:
        found = f" Found: {found}." if found else ""
        super().__init__(
            f"no {dataset} files under '{root}'.{found}\nExpected:\n{expected}\n{source}\n"
            "To try without the data, leave root empty: a phantom is used."
        )


class InvalidSampleError(ValueError):
    """A file or a value in it is not what the data set's layout promises.

    Args:
        where: the file, and the key or column in it; alone, the whole message, as a loader's worker passes it on.
        problem: what was found, with the value.
        expected: what the layout promises.
    """

    def __init__(self, where: str | Path, problem: str = "", expected: str = "") -> None:
        super().__init__(f"{where}: {problem}. Expected {expected}." if problem else str(where))
