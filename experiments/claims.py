"""The table of all claims, from the records of the experiments: python -m experiments.claims

Rewrites the part of experiments/README.md between its two marks. A claim that no scale has been run
for is "not yet run".
"""

import importlib
import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- claims -->", "<!-- end of the claims -->"
HEAD = (
    "| claim | paper | scale | ours: difference | 95 % interval | n | verdict |\n"
    "| --- | --- | --- | ---: | ---: | ---: | --- |\n"
)


def names() -> list[str]:
    """Folders of the experiments that share the runner."""
    files = sorted(HERE.glob("*/run.py"))
    return [file.parent.name for file in files if "experiments.runner" in file.read_text()]


def rows(name: str) -> list[str]:
    """One row a claim and scale of an experiment."""
    file = HERE / name / "results.json"
    records = json.loads(file.read_text()) if file.exists() else {}
    found = [
        _row(name, scale, claim)
        for scale, record in records.items()
        if scale != "smoke"
        for claim in record["claims"]
    ]
    judged = {claim["text"] for record in records.values() for claim in record["claims"]}
    claims = importlib.import_module(f"experiments.{name}.run").CLAIMS
    return found + [
        f"| {_cell(claim.text)} ([{name}]({name})) | {_cell(claim.paper)} | | | | | not yet run |"
        for claim in claims
        if claim.text not in judged
    ]


def _row(name: str, scale: str, claim: dict[str, Any]) -> str:
    difference = claim["difference"]
    mean, sd = difference["mean"], difference["sd"]
    ours = "diverged" if mean is None else f"{mean:+.2f} ± {sd:.2f}"
    low, high = claim["interval"]
    interval = "" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"
    count = len(difference["values"])
    return (
        f"| {_cell(claim['text'])} ([{name}]({name})) | {_cell(claim['paper'])} | {scale} | {ours} "
        f"| {interval} | {count} | {claim['verdict']} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "/")


def circumstances() -> list[str]:
    """Hardware, hours and commit of each record."""
    lines = []
    for name in names():
        file = HERE / name / "results.json"
        for scale, record in (json.loads(file.read_text()) if file.exists() else {}).items():
            if scale != "smoke":
                spent = [
                    value
                    for key, found in record["quantities"].items()
                    if key.endswith("/time/seconds")
                    for value in found["values"]
                ]
                hours = sum(x for x in spent if x) / 3600
                hardware = record["hardware"]
                lines.append(
                    f"| [{name}]({name}) | {scale} | {hardware['kind']}, {hardware['cores']} cores "
                    f"| {hours:.1f} | {statistics.median(x for x in spent if x):.0f} "
                    f"| `{record['commit']}` |"
                )
    return lines


def main() -> None:
    """The command."""
    table = HEAD + "\n".join(row for name in names() for row in rows(name))
    runs = (
        "| record | scale | hardware | hours of training | seconds a run | commit |\n"
        "| --- | --- | --- | ---: | ---: | --- |\n" + "\n".join(circumstances())
    )
    file = HERE / "README.md"
    before, _, rest = file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n\n{table}\n\n{runs}\n\n{END}{after}")


if __name__ == "__main__":
    main()
