"""Install a forward on one instance by giving it a subclass of its own class, and take it back.

The instance stays what it was to everybody else: the subclass has its class's name, module and
attributes; pickling writes the original class; a deep copy keeps the forward. Classes that wrap
``forward`` for every subclass (transformers' gradient checkpointing) wrap this one too, so a
checkpoint encloses the installed forward.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_MARK = "__fusewright__"


def installed(module: nn.Module) -> Any | None:
    """What was passed to :func:`subclass` as ``owner`` for this instance's class, or None."""
    return getattr(type(module), _MARK, None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before :func:`install`."""
    for cls in type(module).__mro__:
        if _MARK not in cls.__dict__ and not hasattr(cls, _MARK):
            return cls
    raise TypeError(f"{type(module).__name__} has no class of its own under the installed one")


def inner_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The class's forward without the checkpointing wrappers that the subclass will get again.

    A layer base class may wrap the forward of every subclass in its gradient checkpoint (each
    subclass made by FSDP adds one more wrapper); such a wrapper is told by the checkpointing
    function that its code looks up.
    """
    forward: Callable[..., Any] = cls.forward
    while "_gradient_checkpointing_func" in getattr(
        getattr(forward, "__code__", None), "co_names", ()
    ) and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


def _told_as(forward: Callable[..., Any], original: Callable[..., Any]) -> None:
    """Give ``forward`` the name, documentation and signature of ``original``.

    Trainers choose a data set's columns, and ``generate`` its arguments, by the parameters' names.
    No ``__wrapped__``: who unwraps a forward to read or trace its code is to find this one.
    """
    functools.update_wrapper(forward, original, updated=())
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]


def subclass(cls: type[nn.Module], forward: Callable[..., Any], owner: object) -> type[nn.Module]:
    """A subclass of ``cls`` whose forward is ``forward`` and that belongs to ``owner``."""
    _told_as(forward, cls.forward)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # Protocol 2's form checks that the object has the class it names; this older one does not.
        state = super(made, self).__reduce_ex__(protocol)[2]
        return copyreg._reconstructor, (cls, object, None), state  # type: ignore[attr-defined]

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        inherited = getattr(super(made, self), "__deepcopy__", None)
        if inherited is not None:
            twin = inherited(memo)
        else:
            twin = cls.__new__(cls)
            memo[id(self)] = twin
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.__class__ = made
        copied: nn.Module = twin
        return copied

    made: type[nn.Module] = type(
        cls.__name__,
        (cls,),
        {
            "forward": forward,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": reduce,
            "__deepcopy__": deepcopy,
            _MARK: owner,
        },
    )
    return made


def own_checkpoint(made: type[nn.Module], around: Callable[..., Any]) -> None:
    """Have ``around(module, theirs, run, *args)`` called where the class would checkpoint its forward.

    ``theirs`` is the checkpointing function that was given to the instance. It stays the instance's
    own attribute: the class only answers for it.
    """
    name = "_gradient_checkpointing_func"

    def get(self: nn.Module) -> Any:
        if name not in self.__dict__:
            raise AttributeError(name)
        return functools.partial(around, self, self.__dict__[name])

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    setattr(made, name, property(get, put))


def install(module: nn.Module, made: type[nn.Module]) -> None:
    """Give the instance the subclass."""
    module.__class__ = made


def uninstall(module: nn.Module) -> None:
    """Give the instance its original class back; does nothing if none was installed."""
    if installed(module) is not None:
        module.__class__ = original_class(module)


@contextmanager
def uninstalled(model: nn.Module) -> Iterator[None]:
    """The model's modules have their original classes inside, and their installed ones after it."""
    found = [(m, type(m)) for m in model.modules() if installed(m) is not None]
    for module, _ in found:
        uninstall(module)
    try:
        yield
    finally:
        for module, made in found:
            install(module, made)
