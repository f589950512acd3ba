"""Checks that a data module is what a module was built for, and that an attribute is one of the data's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fairdiff_lightning.data.sample import Sample


def check_data(data: Any, num_groups: Mapping[str, int], **built: Any) -> None:
    """Compare a data module's facts with those that a module was built from; facts that it does not tell are not.

    Args:
        data: the data module, or None.
        num_groups: attribute -> number of groups that the module was built for.
        **built: other facts by name, such as ``num_classes``.

    Raises:
        ValueError: naming the fact, what the data module has and what the module was built for.
    """
    name = type(data).__name__
    for fact, value in built.items():
        has = getattr(data, fact, None)
        if has is not None and has != value:
            raise ValueError(f"{fact}: {name} has {has}, the module was built for {value}.")
    has = getattr(data, "num_groups", None)
    for attribute, value in num_groups.items():
        if has is not None and has.get(attribute) != value:
            found = has.get(attribute, "no such attribute")
            raise ValueError(f"attribute '{attribute}': {name} has {found} groups, the module was built for {value}.")


def check_requests(data: Any, attribute: str | None) -> None:
    """Check that what a data module asks for tells the groups of the attribute that a generator looks at.

    Args:
        data: the data module, or None.
        attribute: that the generator looks at, None when it looks at none.

    Raises:
        ValueError: when the requests' groups are those of another attribute.
    """
    groups = getattr(data, "attribute_groups", None)
    if attribute is None or getattr(data, "generate", None) is None or groups is None:
        return
    first = next(iter(groups), None)
    if first != attribute:
        raise ValueError(
            f"attribute '{attribute}': {type(data).__name__} asks for groups of {first!r}, the first of its attributes "
            f"{list(groups)}, and every request's '{attribute}' would be unknown. Name '{attribute}' first in the data "
            "module's `attributes`."
        )


def group_of(batch: Sample, attribute: str) -> Tensor:
    """Group indices (B,) of a batch, -1 when unknown.

    Raises:
        ValueError: when the batch does not carry the attribute, with those that it carries.
    """
    attributes = batch["attributes"]
    if attribute not in attributes:
        raise ValueError(
            f"the batch carries the attributes {sorted(attributes)}, but the model is conditional on '{attribute}': "
            "name it in the data module's `attributes`, or build the model without groups."
        )
    return attributes[attribute]


def chosen_attribute(attribute: str | None, num_groups: Mapping[str, int], needed: bool = False) -> str | None:
    """The attribute that a module looks at: the given one, or the first of the data's.

    Raises:
        ValueError: when it is not one of the data's, or there is none and one is needed.
    """
    if attribute is None and num_groups:
        return next(iter(num_groups))
    if (attribute is None and needed) or (attribute is not None and attribute not in num_groups):
        known = ", ".join(f"{a} ({n} groups)" for a, n in num_groups.items()) or "none"
        raise ValueError(
            f"attribute={attribute!r}: num_groups names {known}. Give num_groups={{'<attribute>': <groups>}}; with "
            "the CLI it comes from the data module's `attributes`."
        )
    return attribute
