"""NiiVue, the viewer of the page, out of the installed `ipyniivue`: one JavaScript module, no network.

ipyniivue is a Jupyter widget; its bundle holds NiiVue whole but exports the widget alone. The bundle is served with
NiiVue's class added to what it exports. ipyniivue itself is never imported, so Jupyter is not started.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from nnunet_oneshot.errors import OneShotError

PACKAGE = "ipyniivue"
_BUNDLE = "ipyniivue/static/widget.js"
_MADE = re.compile(r"Creating new Niivue instance\"\);.{0,200}?=new ([\w$]+)\(", re.DOTALL)
_EXPORT = re.compile(r"export\{([^{}]*)\};?\s*$")


@lru_cache(maxsize=1)
def niivue_module() -> bytes:
    """An ES module that exports `Niivue`.

    Raises:
        OneShotError: ipyniivue is not installed, or of a version whose bundle is put together otherwise.
    """
    try:
        installed = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise OneShotError(
            f"expected the package {PACKAGE} (NiiVue) for the review page, found none; "
            'install it: pip install ".[review]" in the clone'
        ) from error
    path = Path(str(installed.locate_file(_BUNDLE)))
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    module = with_niivue_exported(text)
    if module is None:
        raise OneShotError(
            f"expected {PACKAGE} 2.4 with NiiVue's class in its bundle, found {installed.version} without; "
            'install the version that is asked for: pip install ".[review]" in the clone'
        )
    return module.encode()


def with_niivue_exported(bundle: str) -> str | None:
    """The bundle with `Niivue` among its exports; None where the class or the exports are not found."""
    made, export = _MADE.search(bundle), _EXPORT.search(bundle)
    if made is None or export is None:
        return None
    return f"{bundle[: export.start()]}export{{{export.group(1)},{made.group(1)} as Niivue}};\n"
