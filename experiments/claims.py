"""What the records of the experiments say, in their READMEs: python -m experiments.claims

Rewrites the parts between two marks: in experiments/README.md the table of all claims, in each
experiment's README.md its record. A claim that no scale has been run for is "not yet run".
"""

import importlib
import json
import statistics
from pathlib import Path
from typing import Any

from experiments.runner import Claim, table

HERE = Path(__file__).parent
BEGIN, END = "<!-- from the records -->", "<!-- end of the records -->"


def names() -> list[str]:
    """Folders of the experiments that share the runner."""
    files = sorted(HERE.glob("*/run.py"))
    return [file.parent.name for file in files if "experiments.runner" in file.read_text()]


def records(name: str) -> dict[str, dict[str, Any]]:
    """The records of an experiment by scale, without that of the smoke scale."""
    file = HERE / name / "results.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {scale: record for scale, record in found.items() if scale != "smoke"}


def all_claims() -> str:
    """The claims that were judged, the runs that they are judged from, and the claims left."""
    judged, left, runs = [], [], []
    for name in names():
        for scale, record in records(name).items():
            judged += [_judged(name, scale, claim) for claim in record["claims"]]
            runs.append(_runs(name, scale, record))
        known = {c["text"] for record in records(name).values() for c in record["claims"]}
        claims: list[Claim] = importlib.import_module(f"experiments.{name}.run").CLAIMS
        left += [
            f"| {_cell(claim.text)} | [{name}]({name}) | {_cell(claim.paper)} |"
            for claim in claims
            if claim.text not in known
        ]
    return "\n".join(
        [
            "| claim | experiment | scale | paper | ours: difference | 95 % interval | seeds "
            "| verdict |",
            "| --- | --- | --- | --- | ---: | ---: | ---: | --- |",
            *judged,
            "",
            "The runs:",
            "",
            "| experiment | scale | runs | seconds a run | minutes | hardware | commit |",
            "| --- | --- | ---: | ---: | ---: | --- | --- |",
            *runs,
            "",
            "Not yet run:",
            "",
            "| claim | experiment | paper |",
            "| --- | --- | --- |",
            *left,
        ]
    )


def _judged(name: str, scale: str, claim: dict[str, Any]) -> str:
    difference = claim["difference"]
    mean, sd = difference["mean"], difference["sd"]
    ours = "diverged" if mean is None else f"{mean:+.2f} ± {sd:.2f}"
    low, high = claim["interval"]
    interval = "" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"
    count = len(difference["values"])
    return (
        f"| {_cell(claim['text'])} | [{name}]({name}) | {scale} | {_cell(claim['paper'])} | {ours} "
        f"| {interval} | {count} | {claim['verdict']} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _runs(name: str, scale: str, record: dict[str, Any]) -> str:
    seconds = [x for x in record["training_seconds"] if x is not None]
    return (
        f"| [{name}]({name}) | {scale} | {len(record['training_seconds'])} "
        f"| {statistics.median(seconds):.0f} | {sum(seconds) / 60:.0f} "
        f"| {_hardware(record)} | `{record['commit']}` |"
    )


def _hardware(record: dict[str, Any]) -> str:
    hardware = record["hardware"]
    devices, kind, cores = (hardware[key] for key in ("devices", "kind", "cores"))
    return f"{cores} CPU cores" if kind == "cpu" else f"{devices} x {kind}"


def of_experiment(name: str) -> str:
    """The records of an experiment: command, hardware, time, quantities, verdicts, picture."""
    parts = []
    for scale, record in records(name).items():
        seconds = [x for x in record["training_seconds"] if x is not None]
        parts.append(
            f"`{record['command']}`, {_hardware(record)}, commit `{record['commit']}`: "
            f"{len(record['training_seconds'])} runs, {statistics.median(seconds):.0f} s of "
            f"training each (median), {sum(seconds) / 60:.0f} minutes in all; mean ± standard "
            f"deviation of {record['seeds']} seeds.\n\n{table(record)}"
        )
        if (HERE / name / f"{scale}.png").exists():
            parts.append(f"![{name}, {scale} scale]({scale}.png)")
    return "\n\n".join(parts) or "Not run yet beyond the smoke scale."


def between_marks(file: Path, text: str) -> str:
    """What a file holds, with a text between its marks.

    Raises:
      ValueError: the file has no such marks.
    """
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{file} needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """All READMEs with what the records say."""
    found = {HERE / "README.md": between_marks(HERE / "README.md", all_claims())}
    for name in names():
        file = HERE / name / "README.md"
        found[file] = between_marks(file, of_experiment(name))
    return found


def main() -> None:
    """The command."""
    for file, text in pages().items():
        file.write_text(text)


if __name__ == "__main__":
    main()
