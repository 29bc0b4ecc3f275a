"""Writes api.md and api-integrations.md from the docstrings, so that they can be read without the site.

``python docs/reference.py`` writes both pages. A test compares them with what the docstrings say now.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rlhf_kernels as rk  # noqa: E402

WIDTH = 120
GROUPS = {
    "Statistics": ("token_stats", "token_stats_from_logits", "token_logps", "kl_divergence"),
    "Policy losses": ("ppo_loss", "grpo_loss"),
    "Preference losses": ("dpo_loss", "ipo_loss", "kto_loss", "orpo_loss", "simpo_loss"),
    "Supervised fine-tuning": ("sft_loss",),
    "Value and reward models": ("value_loss", "bradley_terry_loss", "plackett_luce_loss", "infonce_loss"),
    "Advantages": ("gae", "shaped_rewards", "group_advantages", "whiten"),
    "Your own objective": ("fused_loss",),
    "Backends": ("backends", "warmup"),
    "Types": ("HeadOptions", "LossOutput", "TokenStats"),
}
INTEGRATIONS = ("transformers", "distributed", "trl", "verl", "openrlhf")
SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):$", re.M)
TITLES = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises", "Attributes": "Attributes"}
ENTRY = re.compile(r"^(\*{0,2}\w+): ", re.M)
Definition = ast.FunctionDef | ast.ClassDef


def library() -> str:
    """The page of all that is ``rk.NAME``."""
    names = [name for group in GROUPS.values() for name in group]
    page = [
        "# Losses and statistics",
        "Everything here is `rk.NAME` after `import rlhf_kernels as rk`. [`HeadOptions`](#headoptions) are the options "
        "of every function with a head; they come last in its signature, as `**head`. [Quick start](quickstart.md) "
        "says what form a batch has. A `Count` is a number or a tensor with one element. This page is made from the "
        "docstrings by `python docs/reference.py`.",
        "\n".join(f"- {title}: " + ", ".join(map(link, group)) for title, group in GROUPS.items()),
    ]
    for title, group in GROUPS.items():
        page.append(f"## {title}")
        for name in group:
            found = inspect.unwrap(getattr(rk, name))
            source = Path(inspect.getfile(found)).read_text(encoding="utf-8")
            page += described(defined(source, name), source, "rk.", names, "")
    return finished(page)


def integrations() -> str:
    """The page of the adapters, whose packages need not be there: the files are read and not imported."""
    page = [
        "# Integrations",
        "One module for each trainer or library that is adapted; [in your own trainer](integrations.md) shows them at "
        "work. This page is made from the docstrings by `python docs/reference.py`.",
    ]
    for module in INTEGRATIONS:
        dotted = f"rlhf_kernels.integrations.{module}"
        source = (ROOT / f"{dotted.replace('.', '/')}.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        public = [x for x in tree.body if isinstance(x, Definition) and not x.name.startswith("_")]
        names = [x.name for x in public]
        page += [f"## {dotted}", *prose(ast.get_docstring(tree) or "", names)]
        for definition in public:
            page += described(definition, source, "", names, dotted)
    return finished(page)


def link(name: str) -> str:
    return f"[`{name}`](#{name.lower()})"


def defined(source: str, name: str) -> Definition:
    """The definition of this name at the top of a file."""
    (found,) = (x for x in ast.parse(source).body if isinstance(x, Definition) and x.name == name)
    return found


def described(definition: Definition, source: str, prefix: str, names: list[str], module: str) -> Iterator[str]:
    """A heading, the signature, and what the docstring says; then the same of public methods."""
    yield f"### {definition.name}"
    yield f"```py\n{signature(definition, prefix)}\n```"
    yield from documented(definition, names, module)
    if not isinstance(definition, ast.ClassDef):
        return
    lines = source.splitlines()
    fields = [x for x in definition.body if isinstance(x, ast.AnnAssign)]
    if fields and not SECTION.search(ast.get_docstring(definition) or ""):
        yield "\n".join(
            f"- `{ast.unparse(field)}`" + (f": {tidy(comment, names)}" if comment else "")
            for field in fields
            for comment in [lines[(field.end_lineno or 0) - 1].partition("  # ")[2]]
        )
    for method in definition.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
            plain = any(ast.unparse(x) == "property" for x in method.decorator_list)
            shown = (
                f"{definition.name}.{method.name}" if plain else signature(method, f"{definition.name}.", bound=True)
            )
            yield f"#### {definition.name}.{method.name}"
            yield f"```py\n{shown}\n```"
            yield from documented(method, names, module)


def signature(definition: Definition, prefix: str, *, bound: bool = False) -> str:
    """As it would be called, on one line where it fits."""
    if isinstance(definition, ast.ClassDef):
        made = [x for x in definition.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
        if not made:
            bases = ", ".join(map(ast.unparse, definition.bases))
            return f"class {definition.name}({bases})" if bases else f"class {definition.name}"
        function, name, bound = made[0], definition.name, True
    else:
        function, name = definition, definition.name
    given = function.args
    parts = []
    for arguments, defaults in ((given.args, given.defaults), (given.kwonlyargs, given.kw_defaults)):
        missing = [None] * (len(arguments) - len(defaults))
        if arguments is given.kwonlyargs and (given.vararg or arguments):
            parts.append(f"*{ast.unparse(given.vararg)}" if given.vararg else "*")
        for argument, default in zip(arguments, [*missing, *defaults], strict=True):
            parts.append(ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else ""))
    parts = parts[1:] if bound else parts
    if given.kwarg:
        parts.append(f"**{given.kwarg.arg}")
    returns = f" -> {ast.unparse(function.returns)}" if function.returns and function.name != "__init__" else ""
    parts = [part.replace("'", '"') for part in parts]
    line = f"{prefix}{name}({', '.join(parts)}){returns}"
    if len(line) <= 100:
        return line
    return f"{prefix}{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def documented(definition: Definition, names: list[str], module: str) -> Iterator[str]:
    """The docstring of a definition, section by section; its example last."""
    text, _, example = (ast.get_docstring(definition) or "").partition(">>> ")
    first, *rest = SECTION.split(text)
    yield from prose(first, names)
    for section, body in zip(rest[::2], rest[1::2], strict=True):
        body = textwrap.dedent(body.strip("\n"))
        entries = ENTRY.split(body)
        if section == "Returns" or len(entries) == 1:
            yield from prose(f"{TITLES[section]}: {body.strip()}", names, bold=TITLES[section])
            continue
        items = [f"- `{name}`: {joined(what)}" for name, what in zip(entries[1::2], entries[2::2], strict=True)]
        yield f"**{TITLES[section]}**"
        yield "\n".join(wrapped(tidy(item, names), "  ") for item in items)
    if example:
        imported = definition.name if isinstance(definition, ast.ClassDef | ast.FunctionDef) else ""
        needs = module and f"import {imported}" not in example and not example.startswith("from ")
        start = f">>> from {module} import {imported}\n" if needs else ""
        yield f"```python\n{start}>>> {example.strip()}\n\n```"


def prose(text: str, names: list[str], bold: str = "") -> Iterator[str]:
    """Paragraphs, lists, and code that is indented."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.startswith("    "):
            yield block
        elif block.lstrip().startswith("* "):
            items = re.split(r"^\* ", block, flags=re.M)[1:]
            yield "\n".join(wrapped(tidy(f"- {joined(item)}", names), "  ") for item in items)
        elif block.strip():
            shown = tidy(joined(block), names)
            yield wrapped(shown.replace(f"{bold}:", f"**{bold}:**", 1) if bold else shown)


def joined(text: str) -> str:
    return " ".join(text.split())


def tidy(text: str, names: list[str]) -> str:
    """Markdown in place of reStructuredText: code, addresses, links to what stands on the same page."""
    text = text.replace("``", "`")
    text = re.sub(r"(?<!<)(?<!\]\()https?://[^\s,)]+[^\s,).;]", r"<\g<0>>", text)
    return re.sub(r"`(\w+)`", lambda m: link(m[1]) if m[1] in names else m[0], text)


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def finished(blocks: list[str]) -> str:
    """A page, whose introduction is wrapped like the rest."""
    title, introduction, *rest = blocks
    return "\n\n".join([title, wrapped(introduction), *rest]) + "\n"


PAGES = {"api.md": library, "api-integrations.md": integrations}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
