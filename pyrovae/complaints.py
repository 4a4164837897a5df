"""Errors of jsonargparse, which repeat types and namespaces of each level, in a sentence."""

import re

_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_TYPE = re.compile(r"^(Type .*? expects a function or a callable class: |Does not validate against any of .*?:\s*)")
_UNION = re.compile(
    r"^Does not validate against any of .*?Errors:\s*- (.*?)(\s+- Expected .*|\s+Given value.*)?$", re.DOTALL
)
_VALUE = re.compile(r"\.? Got value: .*$", re.DOTALL)
_NAMESPACE = re.compile(r"Namespace\(.*\)")
_LONGEST = 300  # characters


def explain(message: str) -> str:
    """Returns the innermost cause of an error of jsonargparse, after its key; other text in one line.

    >>> explain('Parser key "prior":\\n  Parser key "bounds":\\n    Expected a list. Got value: 3. Got value: {}')
    'prior.bounds: Expected a list, got 3.'
    >>> either = 'Does not validate against any of the Union subtypes\\n  Subtypes: [float, NoneType]\\n  Errors:'
    >>> explain(f'Parser key "lr":\\n {either}\\n    - Expected a float\\n    - Expected a None\\n  Given value: x')
    'lr: Expected a float, got x.'
    """
    keys = _KEY.findall(message)
    if not keys:
        union = _UNION.match(message)
        return _one_line(union[1] if union else message)
    cause = _KEY.split(message)[-1].strip()
    union = _UNION.match(cause)
    given = union and re.search(r"Given value: ([^\s(]+)$", union[2] or "")
    cause = _one_line(union[1] if union else cause)
    cause = _TYPE.sub("", cause)
    value = cause.partition("Got value: ")[2].partition(". Got value: ")[0].rstrip(".")
    value = given[1] if given else value
    cause = _VALUE.sub("", cause).rstrip(".")
    if value and not re.search(rf"(?<!\w){re.escape(value)}(?!\w)", cause) and not _NAMESPACE.search(value):
        cause += f", got {value}"
    return f"{'.'.join(keys)}: {cause}."[:_LONGEST]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST]
