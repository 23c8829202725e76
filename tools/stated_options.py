"""An extension of mkdocstrings: on the pages of docs/api a field's text begins with what its option is for."""

import ast
from typing import Any

import griffe

__all__ = ["StatedOptions"]


class StatedOptions(griffe.Extension):
    """Reads `metadata=option("...")` and `metadata=keyword("...")`, see bundles/shared/option_fields.py."""

    def on_attribute_instance(self, *, node: Any, attr: Any, **_others: Any) -> None:
        """Put the option's text before the docstring that the field may have, and show its default alone."""
        value = getattr(node, "value", None)
        given = {argument.arg: argument.value for argument in value.keywords} if isinstance(value, ast.Call) else {}
        stated = given.get("metadata")
        if isinstance(stated, ast.Call) and ast.unparse(stated.func) in ("option", "keyword"):
            more = "" if attr.docstring is None else f"\n\n{attr.docstring.value}"
            attr.docstring = griffe.Docstring(ast.literal_eval(stated.args[0]) + more, parent=attr)
            default = given.get("default", given.get("default_factory"))
            attr.value = None if default is None else ast.unparse(default)
