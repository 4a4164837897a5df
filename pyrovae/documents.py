"""YAML documents, read within limits: a small file must not take hours or gigabytes."""

from typing import Any

import yaml

MAX_DEPTH = 100  # nested lists and dicts
MAX_NODES = 1_000_000  # values, each alias counted as all that it stands for


def read_yaml(text: str) -> Any:
    """Reads a YAML document without running code from it.

    Raises:
        ValueError: when it is no YAML, has other values than text, numbers, dates, lists and dicts, or is nested deeper
            than `MAX_DEPTH` or larger than `MAX_NODES`.

    >>> read_yaml("a: [1, 2.5, text]")
    {'a': [1, 2.5, 'text']}
    """
    try:
        _check_size(text)
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {_one_line(error)}") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:  # such as of "!!bool x"
        raise ValueError(f"it is no YAML: {_one_line(error)}") from None


def _check_size(text: str) -> None:
    # Events come from a parser without recursion, which does not follow aliases.
    sizes: dict[str, int] = {}  # of what aliases stand for
    anchors: list[str | None] = []
    counts = [0]  # of nodes in the collections that are open
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            anchors.append(event.anchor)
            counts.append(1)
            if len(counts) > MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} lists and dicts.")
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = counts.pop(), anchors.pop()
            counts[-1] += size
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} stands for nothing, or for a part that contains it.")
            counts[-1] += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            counts[-1] += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if counts[-1] > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES:,} values, aliases counted as what they stand for.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
