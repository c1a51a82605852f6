"""What a foreign format is to longwave: a module with these names. `FORMATS` lists them."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from longwave.hub.keys import Rename
from longwave.models.kinds import TokenModelConfig

Aliases = Mapping[str, str | None]


class Family(Protocol):
    """A published model family: how its config.json and its tensor names read in longwave's terms, and back."""

    @property
    def WEIGHTS(self) -> str:
        """The file that export writes, one of `hub.folder.WEIGHT_FILES`."""
        ...

    @property
    def ALIASES(self) -> Aliases | Callable[[Collection[str]], Aliases]:
        """Other spellings of tensor names that occur in published folders: {spelling: name}, or a function that finds
        them among the names of a folder's tensors. The name is None for a tensor that is no weight, and left out."""
        ...

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Does this config.json belong to the family?"""
        ...

    def config_from(self, config: Mapping[str, Any]) -> TokenModelConfig:
        """The model it describes. Raises UsageError that names an option which longwave lacks."""
        ...

    def config_to(self, model: Any) -> dict[str, Any]:
        """The config.json of a model. Raises UsageError that says what the format cannot express."""
        ...

    def rename(self, model: Any) -> Rename:
        """{module of ours: its published name, or the layout of its tensors}, read as `hub.keys` says."""
        ...
