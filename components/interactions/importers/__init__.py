"""Importers translate a source into the contract: one file a source, found by looking into this folder.

An importer's module holds `Config`, a frozen pydantic model whose `name` is the literal name of the source, and
`import_log(config, path, out, loop, until)`, which reads the source's folder `path` and writes a log into `out`: of
what was logged by `until`, where that is given. A file whose name begins with an underscore is no source; `_reading.py`
holds what the importers share.
"""

import importlib
import pkgutil
from datetime import datetime
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from pydantic import BaseModel

from components.interactions.log_folder import Log


@runtime_checkable
class Importer(Protocol):
    """What an importer's module offers."""

    Config: type[BaseModel]

    def import_log(self, config: BaseModel, path: Path, out: Path, loop: str, until: datetime | None = None) -> Log:
        """Translate the source in `path` into a log in `out`.

        Where the source has times, `until` leaves out what was logged later, as if it ended there.

        Raises:
            InputError: a file is missing or cannot be read as what it should be.
        """
        ...


def importers() -> dict[str, Importer]:
    """Every importer of this folder by the name of its source."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.Config.model_fields["name"].default: cast(Importer, module) for module in modules}
