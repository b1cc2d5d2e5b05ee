"""The tables of docs/configuration.md: every field, from the comments in supcon_jax/config.py.

python docs/fields.py  # writes them into the page; a test compares
"""

import ast
import io
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from supcon_jax import config as configuration

PAGE = Path(__file__).parent / "configuration.md"
BEGIN, END = "<!-- fields, made by docs/fields.py -->", "<!-- end of the fields -->"
CONTRASTIVE, CLASSIFYING = ("supcon", "simclr"), ("linear", "cross_entropy", "finetune")
PARTS = {  # of the run: heading -> what its fields begin with
    "The run": ("seed", "stages"),
    "Data": ("data.",),
    "Model": ("model.",),
    "Evaluation, checkpoints, log": ("evaluation.", "checkpoint.", "log."),
}
OF_KIND = ("objective.", "head.")  # what differs between the two kinds of stages


def tables() -> str:
    """All tables, as Markdown."""
    values, meanings = configuration.flatten(configuration.base()), comments("base")
    sections = [
        section(heading, {k: v for k, v in values.items() if k.startswith(begins)}, meanings)
        for heading, begins in PARTS.items()
    ]
    stages = {
        name: {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
        for name in configuration.STAGES
    }
    shared = {k: across(k, stages) for k in stages["linear"] if not k.startswith(OF_KIND)}
    sections.append(section("Every stage", shared, comments("_stage")))
    for heading, names, function in (
        ("Contrastive stages: supcon, simclr", CONTRASTIVE, "_contrastive_stage"),
        ("Classifying stages: linear, cross_entropy, finetune", CLASSIFYING, "_classifying_stage"),
    ):
        of_kind = {name: stages[name] for name in names}
        own = {k: across(k, of_kind) for k in stages[names[0]] if k.startswith(OF_KIND)}
        sections.append(section(heading, own, comments(function)))
    return "\n\n".join(sections)


def section(heading: str, values: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
    """One table, in the order of the file.

    Raises:
      ValueError: a field has no comment.
    """
    if missing := sorted(values.keys() - meanings.keys()):
        raise ValueError(f"{', '.join(missing)}: no comment in supcon_jax/config.py")
    order = {name: place for place, name in enumerate(meanings)}
    rows = [
        f"| `{name}` | {shown(values[name])} | {meanings[name].replace('|', chr(92) + '|')} |"
        for name in sorted(values, key=order.__getitem__)
    ]
    return "\n".join(
        [f"## {heading}", "", "| field | default | meaning |", "| --- | --- | --- |", *rows]
    )


def across(field: str, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A field's default by stage."""
    return {name: stage[field] for name, stage in stages.items()}


def shown(value: Any) -> str:
    """A default as a table has it; of one that differs, the stages of all but the most common."""
    if not isinstance(value, dict):
        return f"`{plain(value)}`"
    by_value: dict[str, list[str]] = {}
    for name, one in value.items():
        by_value.setdefault(f"`{plain(one)}`", []).append(name)
    most, *others = sorted(by_value, key=lambda one: -len(by_value[one]))
    return "; ".join([most, *(f"{one} in {', '.join(by_value[one])}" for one in others)])


def plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(plain, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, float):
        return str(round(value, 4))
    return value if isinstance(value, str) and value else repr(value).replace("'", '"')


def comments(function: str) -> dict[str, str]:
    """`field -> comment` of the dictionaries in a function of config.py, in its order."""
    text = Path(configuration.__file__).read_text()
    tree, remarks = ast.parse(text), {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            remarks[token.start[0]] = token.string.removeprefix("#").strip()
    lines = text.splitlines()
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    calls = (n for n in ast.walk(found) if isinstance(n, ast.Call) and called(n) == "dict")
    stage = (n for n in ast.walk(found) if isinstance(n, ast.Call) and called(n) == "_stage")
    outermost = next(stage, None) or next(calls)
    return {
        path: said
        for path, line in leaves(outermost, "")
        if (said := remark(line, remarks, lines)) is not None
    }


def remark(line: int, remarks: Mapping[int, str], lines: list[str]) -> str | None:
    """The comment on a line, or the lines of nothing but comment above it."""
    if line in remarks:
        return remarks[line]
    above: list[str] = []
    while (line := line - 1) in remarks and lines[line - 1].lstrip().startswith("#"):
        above.insert(0, remarks[line])
    return " ".join(above) or None


def leaves(call: ast.Call, prefix: str) -> Iterator[tuple[str, int]]:
    """The fields of `dict(...)` and of those inside it, with their lines."""
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Call) and called(keyword.value) == "dict":
            yield from leaves(keyword.value, f"{prefix}{keyword.arg}.")
        else:
            yield f"{prefix}{keyword.arg}", keyword.value.lineno


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def updated(page: str) -> str:
    """The page with new tables."""
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
