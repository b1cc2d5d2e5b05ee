"""`python -m supcon_jax`: what commands there are."""

import ast
from importlib.resources import files

COMMANDS = (
    "train",
    "evaluate",
    "embed",
    "predict",
    "search",
    "explore",
    "export",
    "report",
    "doctor",
    "data.prepare",
)


def purpose(name: str) -> str:
    """The first line of a module's docstring; nothing is imported."""
    source = files("supcon_jax").joinpath(f"{name.replace('.', '/')}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or name).splitlines()[0]


if __name__ == "__main__":
    print("Commands; each has --help:\n")
    for name in COMMANDS:
        print(f"  python -m supcon_jax.{name}\n    {purpose(name)}")
