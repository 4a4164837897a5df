"""The directive `public`: all public names of a module, and links to them by whatever path they are imported.

`.. public:: pyrovae.bounds` shows the module's docstring, tables of its public names, and each name's own docstring.
Public names are those of `__all__`: in which file a class is defined has no part in it. A name that is in two modules
is described in the one that stands first in the configuration's `public_modules`.
"""

import inspect
import re
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode


def public_names(module: ModuleType) -> dict[str, Any]:
    """Returns the public names of a module and what they stand for, without modules and the version."""
    found = {name: getattr(module, name) for name in module.__all__ if not name.startswith("_")}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


def described(modules: list[str]) -> dict[int, str]:
    """Returns the name under which each object is described, by the object's id."""
    names: dict[int, str] = {}
    for path in modules:
        for name, value in public_names(import_module(path)).items():
            names.setdefault(id(value), f"{path}.{name}")
    return names


def groups(found: dict[str, Any]) -> dict[str, list[str]]:
    """Returns names under headings: classes under their base where that is public and has several, then the others."""
    classes = {value: name for name, value in found.items() if inspect.isclass(value)}
    families: dict[str, list[str]] = {}
    for cls, name in classes.items():
        base = [other for other in cls.__mro__ if other in classes][-1]
        families.setdefault(classes[base], []).append(name)
    headings = {f"{base} and its subclasses": names for base, names in families.items() if len(names) > 2}
    grouped = {name for names in headings.values() for name in names}
    functions = [name for name, value in found.items() if inspect.isroutine(value)]
    headings["Classes"] = [name for name in classes.values() if name not in grouped]
    headings["Functions"] = functions
    headings["Values"] = [name for name in found if name not in {*classes.values(), *functions}]
    return {heading: names for heading, names in headings.items() if names}


def described_value(value: Any) -> str:
    """Returns a sentence on a value that is neither a class nor a function."""
    if isinstance(value, dict):
        return f"A dict with the keys {', '.join(f'``{key!r}``' for key in value)}."
    return (inspect.getdoc(type(value)) or repr(value)).splitlines()[0]


class Public(SphinxDirective):
    """Describes the public names of a module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (path,) = self.arguments
        found = public_names(import_module(path))
        names = described(self.config.public_modules)
        lines = [f".. automodule:: {path}", ""]
        for heading, members in groups(found).items():
            lines += [f".. rubric:: {heading}", ""]
            if heading == "Values":  # whose docstring is that of their type
                lines += [f"- :py:data:`{path}.{name}`" for name in members] + [""]
                continue
            lines += [".. autosummary::", "   :nosignatures:", ""]
            for name in members:
                target = names[id(found[name])]
                lines.append(f"   {name}" if target.startswith(f"{path}.") else f"   ~{target}")
            lines += [""]
        for name, value in found.items():
            if names[id(value)] == f"{path}.{name}":
                if not inspect.isclass(value) and not inspect.isroutine(value):
                    lines += [f".. py:data:: {path}.{name}", "", f"   {described_value(value)}", ""]
                    continue
                kind = "class" if inspect.isclass(value) else "function"
                lines += [f".. auto{kind}:: {path}.{name}"]
                if kind == "class":
                    lines.append("   :members:")
                if kind == "class" and value.__bases__ != (object,):
                    lines.append("   :show-inheritance:")
                lines.append("")
        container = nodes.Element()
        self.state.nested_parse(StringList(lines, source=path), self.content_offset, container)
        return container.children


def locate(path: str) -> list[tuple[Any, str]]:
    """Returns the objects that a dotted path leads through, the last first, each with the rest of the path."""
    parts = path.split(".")
    for size in range(len(parts), 0, -1):
        if (value := sys.modules.get(".".join(parts[:size]))) is not None:
            found = [(value, "".join(f".{part}" for part in parts[size:]))]
            for i, part in enumerate(parts[size:], size + 1):
                if not hasattr(value, part):
                    return []
                value = getattr(value, part)
                found.insert(0, (value, "".join(f".{part}" for part in parts[i:])))
            return found
    return []


def resolve(app, env, node, contnode):
    """Links a name that was given by another path than the one it is described under.

    What exists, but has no page, stays text: a class of torch, or one that is not public. What does not exist is left
    to Sphinx, which warns.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    names = described(app.config.public_modules)
    for path in (target, f"{node.get('py:module')}.{target}", f"builtins.{target}"):
        found = locate(path)
        for value, rest in found:
            name = names.get(id(value), "") + rest
            if entry := env.domains["py"].objects.get(name):
                return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)
        if found:
            return contnode
    return None


def skip_fields(app, what, name, value, skip, options):
    """Leaves out the fields of named tuples: the class says what they are."""
    return True if (inspect.getdoc(value) or "").startswith("Alias for field number") else None


def plain_defaults(app, what, name, value, options, signature, annotation):
    """Writes "..." for defaults that are shown as <...>, with which Sphinx could not read the signature."""
    return (re.sub(r"<[^<>]*>", "...", signature), annotation) if signature else None


def setup(app):
    app.add_config_value("public_modules", [], "env")
    app.add_directive("public", Public)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-signature", plain_defaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
