"""Results with named fields that also read as a tuple and as a dict, and the error for images that are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn

from torch.utils import _pytree as pytree


class Output(dict[str, Any]):
    """Base of the dataclasses that models, schedulers and pipelines return.

    For `out = UNet2DOutput(sample=x)`, `out.sample`, `out["sample"]` and `out[0]` are the same tensor. Fields that are
    `None` are left out of the dict and of the tuple. Iterating gives the names, as with any dict; `out.to_tuple()`
    gives the values, ready to unpack. Every subclass is a PyTree node, so outputs pass through `torch.export`,
    `torch.compile` and `DistributedDataParallel`.

    A mapping given as the only argument fills the fields by name: that is how libraries rebuild an output
    (`type(out)({name: cast(value)})`).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        values = {name: getattr(self, name) for name in names}
        first, *others = names
        if isinstance(values[first], Mapping) and all(values[name] is None for name in others):
            unknown = [name for name in values[first] if name not in names]
            if unknown:
                raise TypeError(f"{type(self).__name__} has the fields {names}, not {unknown}")
            values = {name: values[first].get(name) for name in names}
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            if value is None:
                dict.pop(self, name, None)
            else:
                dict.__setitem__(self, name, value)
        super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            raise KeyError(name)
        setattr(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not `None`, in the order of their definition."""
        return tuple(self[field.name] for field in fields(self) if field.name in self)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"the fields of {type(self).__name__} are fixed; assign to them: `out.name = value`")

    __delitem__ = pop = popitem = setdefault = update = clear = _refuse


class BadImagesError(FloatingPointError):
    """Some images came out NaN or infinite; `bad` lists which: indices in a batch, or the seeds of a job."""

    def __init__(self, message: str, bad: list[int] | None = None) -> None:
        super().__init__(message)
        self.bad = bad or []
