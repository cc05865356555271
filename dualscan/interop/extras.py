"""Optional packages: imported where they are needed, and missed with the command that installs them."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional package.

    Args:
        module: its name.
        extra: the extra of this package that installs it.

    Returns:
        The module.

    Raises:
        ImportError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} cannot be imported ({error}); run: pip install "dualscan[{extra}]"') from error
