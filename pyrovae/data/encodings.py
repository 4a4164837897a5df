"""What encodings of recordings have in common: whole numbers, which JSON holds."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

_Encoding = TypeVar("_Encoding", bound="WholeNumbers")


@dataclass(frozen=True)
class WholeNumbers:
    """Base of an encoding that whole numbers describe, its fields.

    A subclass states in `title` what it is, for messages.
    """

    title: ClassVar[str]

    def to_dict(self) -> dict[str, int]:
        """Returns the arguments, as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[_Encoding], entries: Any) -> _Encoding:
        """Returns the encoding of :meth:`to_dict`; raises a ValueError that says what is wrong with the entries."""
        names = [field.name for field in fields(cls)]
        if not isinstance(entries, dict) or entries.keys() != {*names}:
            raise ValueError(f"{cls.title} must have the entries {', '.join(names)}.")
        return cls(**entries)

    def check_at_least(self, **least: int) -> None:
        """Raises a ValueError for a field that is no whole number of at least a number."""
        for name, bound in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < bound:
                raise ValueError(f"{name} must be a whole number of at least {bound}, got {value!r}.")
