"""A pickle reader for torch.load that makes tensors and containers alone; every other object comes out as nothing.

Checkpoints of training runs hold optimisers, callbacks and settings beside the weights: objects of classes that may not
be installed, and that nobody should run. Here their names are looked up nowhere. An `Inert` takes their place, which
accepts whatever is done to it and keeps none of it.

torch.load takes this module as its `pickle_module`.
"""

import pickle
from collections import OrderedDict
from typing import Any

from torch import _utils

# Of the module's interface. torch.load uses it for files older than its zip format only, which folder.py keeps from it.
load = pickle.load


class Inert:
    """An object that was not made."""

    def __new__(cls, *args: Any, **options: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any): ...

    def __call__(self, *args: Any, **options: Any) -> "Inert":
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


_MADE = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
}


class Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        return _MADE.get((module_name, global_name), Inert)
