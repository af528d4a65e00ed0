"""griffe extension: ``:class:`~package.module.Name``` of docstrings is shown as ``Name``."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(?:~[\w.]*\.)?([\w.]+)`")


class Roles(griffe.Extension):
    """Replaces roles in every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Of a module, class, function or attribute that has been read."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
