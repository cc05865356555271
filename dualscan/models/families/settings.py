"""Reading another program's `config.json`: what is missing, contradictory or out of reach is said by name."""

import math
from collections.abc import Mapping
from typing import Any

_REQUIRED = object()


class Settings:
    """The values of a `config.json`.

    Args:
        family: the name of the family, for messages.
        values: as read from JSON.
    """

    def __init__(self, family: str, values: Mapping[str, Any]):
        self.family, self.values = family, values

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        """A value, or the default if the file does not say.

        Raises:
            ValueError: it does not say, and there is no default.
        """
        value = self.values.get(name, default)
        if value is _REQUIRED or (value is None and default is _REQUIRED):
            raise ValueError(f"the {self.family} configuration has no {name!r}; it is incomplete, copy it again.")
        return value

    def only(self, name: str, *allowed: Any, default: Any = _REQUIRED, lacks: str) -> None:
        """Refuses values that the model here cannot express.

        Args:
            name: of the setting.
            *allowed: values that it can.
            default: where the file does not say.
            lacks: what is missing here, for the message.
        """
        value = self(name, allowed[0] if default is _REQUIRED else default)
        if value not in allowed:
            raise self.out_of_reach(f"{name}={value!r}", lacks)

    def out_of_reach(self, what: str, lacks: str) -> ValueError:
        """The error for a model that cannot be expressed here."""
        return ValueError(f"this {self.family} checkpoint has {what}: {lacks} is not supported yet; it is not loaded.")

    def section(self, name: str) -> "Settings":
        """The settings below a key, none if the file does not say."""
        value = self(name, None)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"the {self.family} configuration has {name}={value!r}; expected an object.")
        return Settings(f"{self.family} {name}", value or {})

    def limits(self, name: str, default: tuple[float, float] = (0.0, math.inf)) -> tuple[float, float]:
        """A pair such as a clamp of Δ; transformers spells infinity as a bare word or as an object."""
        value = self(name, default)
        if value is None:
            return default
        try:
            low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in value)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"the {self.family} configuration has {name}={value!r}; expected a pair of numbers."
            ) from error
        return low, high
