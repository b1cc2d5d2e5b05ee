"""What is claimed, how it is judged, and what the records say: python -m experiments.claims

Rewrites the parts of READMEs between two marks: in experiments/README.md the table of all claims,
in each experiment's README.md its record, in the project's README.md some of the claims. A claim
that no scale has been run for is "not yet run".
"""

import importlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
BEGIN, END = "<!-- from the records -->", "<!-- end of the records -->"
Values = dict[str, list[float]]  # "setting/metric" -> one number a seed
SHOWN = (  # in the project's README, from the cpu scale
    ("positives_cap", "more positives are better: all against none of other images"),
    ("classification", "SupCon is more accurate than SimCLR (fashion_mnist)"),
    ("classification", "SupCon is more accurate than L_in (fashion_mnist)"),
    ("classification", "SupCon is more accurate than N-pairs (fashion_mnist)"),
    ("temperature", "a temperature of 0.1 is better than 1.0"),
    ("gradients", "hard positives contribute more to the gradient than easy ones (SupCon)"),
    ("epochs", "pre-training with SupCon twice as long is better than half as long"),
    ("batch_size", "a batch of 256 is better for SupCon than one of 16"),
    ("classification", "SupCon is more accurate than cross-entropy (fashion_mnist)"),
    (
        "learning_rate",
        "SupCon depends less on the learning rate: standard deviation of top-1 over the grid",
    ),
    ("corruptions", "SupCon has a smaller error on corrupted images"),
    ("corruptions", "SupCon is better calibrated on clean images"),
)


class Claim(NamedTuple):
    """A claim of the paper as a difference of two quantities, both known for every seed.

    It is reproduced if the 95 % interval of the paired difference `first - second` over the seeds
    is above 0, not reproduced otherwise. The rule was fixed before the runs. There is no interval
    where a run diverged, and none of a single seed, which is not judged.

    Attributes:
      text: the claim, in a sentence.
      paper: the paper's numbers.
      first: quantity that the claim says is larger, "setting/metric" or a derived one.
      second: quantity that it says is smaller.
    """

    text: str
    paper: str
    first: str
    second: str


def judged(claim: Claim, values: Values) -> dict[str, Any]:
    """The paired difference over the seeds, its 95 % interval (Student's t), and the verdict."""
    from scipy import stats

    pairs = list(zip(values[claim.first], values[claim.second], strict=False))  # seeds of both
    differences = np.array([first - second for first, second in pairs])
    number, mean, half = len(pairs), differences.mean(), float("nan")
    if number > 1:
        half = stats.t.ppf(0.975, number - 1) * np.std(differences, ddof=1) / np.sqrt(number)
    if np.isnan(mean):
        verdict = "no interval"
    elif number == 1:
        verdict = "not judged: one seed"
    else:
        verdict = "reproduced" if mean - half > 0 else "not reproduced"
    return {
        **claim._asdict(),
        "difference": spread(differences),
        "interval": [_rounded(mean - half), _rounded(mean + half)],
        "verdict": verdict,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and (n - 1) standard deviation; null where a run has diverged."""
    numbers = np.asarray(values, float)
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
    return {
        "mean": _rounded(numbers.mean()),
        "sd": _rounded(sd),
        "values": [_rounded(number) for number in numbers],
    }


def _rounded(number: float) -> float | None:
    return round(float(number), 4) if np.isfinite(number) else None


def table(record: dict[str, Any]) -> str:
    """The quantities and claims of a record, in Markdown.

    Settings against metrics, the shorter side across; curves ("... at epoch 4") are left out.
    """
    cells: dict[str, dict[str, str]] = {}
    alone = []
    for name, found in record["quantities"].items():
        number = number_of(found)
        setting, _, metric = name.rpartition("/")
        if not setting:
            alone.append(f"- {name}: {number}")
        elif " at epoch " not in metric:
            cells.setdefault(setting, {})[metric] = number
    columns = list(dict.fromkeys(metric for row in cells.values() for metric in row))
    corner = "setting"
    if len(columns) > len(cells):
        corner, rows = "metric", columns
        columns, cells = list(cells), {r: {c: cells[c].get(r, "") for c in cells} for r in rows}
    lines = [f"| {corner} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, row in cells.items():
        lines.append(f"| {name} | {' | '.join(row.get(column, '') for column in columns)} |")
    if alone:
        lines += ["", *alone]
    if record["claims"]:
        lines += ["", *(f"- {verdict(claim)}" for claim in record["claims"])]
    return "\n".join(lines)


def number_of(found: dict[str, Any], form: str = ".2f") -> str:
    """Mean ± standard deviation of a quantity, the number alone of one seed."""
    if found["mean"] is None:
        return "diverged"
    deviation = f" ± {found['sd']:.2f}" if len(found["values"]) > 1 else ""
    return f"{found['mean']:{form}}{deviation}"


def interval_of(claim: dict[str, Any]) -> str:
    """The interval of a claim's difference; empty where there is none."""
    low, high = claim["interval"]
    return "" if low is None else f"{low:+.2f} to {high:+.2f}"


def verdict(claim: dict[str, Any]) -> str:
    """A claim, its verdict and the interval or else the difference, in a sentence."""
    found = interval_of(claim) or number_of(claim["difference"], "+.2f")
    return f"{claim['text']}: **{claim['verdict']}** ({found})"


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
            "The runs. A results.json tells of each its time, with measuring, its commit, and the",
            "hash of its configuration, which names the run's folder, where config.json is.",
            "",
            "| experiment | scale | runs | seconds a run | in all | hardware | commits |",
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
    return (
        f"| {_cell(claim['text'])} | [{name}]({name}) | {scale} | {_cell(claim['paper'])} "
        f"| {number_of(difference, '+.2f')} | {interval_of(claim)} | {len(difference['values'])} "
        f"| {claim['verdict']} |"
    )


def shown_claims() -> str:
    """The claims of the project's README, as the cpu scale judges them."""
    lines = ["| claim | the paper | here: difference | 95 % interval | verdict |"]
    lines.append("| --- | --- | ---: | ---: | --- |")
    for name, text in SHOWN:
        record = records(name).get("cpu", {"claims": []})
        found = next((c for c in record["claims"] if c["text"] == text), None)
        link = f"[{_cell(text)}](experiments/{name})"
        if found is None:
            lines.append(f"| {link} | | | | not yet run |")
        else:
            difference = number_of(found["difference"], "+.2f")
            lines.append(
                f"| {link} | {_cell(found['paper'])} | {difference} | {interval_of(found)} "
                f"| {found['verdict']} |"
            )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _runs(name: str, scale: str, record: dict[str, Any]) -> str:
    number, median, total = _times(record)
    return (
        f"| [{name}]({name}) | {scale} | {number} | {median} | {total} | {_hardware(record)} "
        f"| {_commits(record)} |"
    )


def _times(record: dict[str, Any]) -> tuple[int, str, str]:
    """How many runs, their median of seconds, and their sum in minutes or hours."""
    seconds = [run["seconds"] for run in _runs_of(record)]
    minutes = sum(seconds) / 60
    total = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    return len(seconds), f"{statistics.median(seconds):.0f}", total


def _commits(record: dict[str, Any]) -> str:
    return ", ".join(f"`{commit}`" for commit in sorted({r["commit"] for r in _runs_of(record)}))


def _runs_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for found in record["runs"].values() for run in found]


def _hardware(record: dict[str, Any]) -> str:
    hardware = record["hardware"]
    devices, kind, cores = (hardware[key] for key in ("devices", "kind", "cores"))
    return f"{cores} CPU core{'s' * (cores > 1)}" if kind == "cpu" else f"{devices} x {kind}"


def of_experiment(name: str) -> str:
    """The records of an experiment: command, hardware, time, quantities, verdicts, picture."""
    parts = []
    for scale, record in records(name).items():
        number, median, total = _times(record)
        parts.append(
            f"`{record['command']}`, {_hardware(record)}, commit {_commits(record)}: {number} "
            f"runs, {median} s each (median), {total} in all; mean ± standard deviation of "
            f"{_seeds(record)}.\n\n{table(record)}"
        )
        if (HERE / name / f"{scale}.png").exists():
            parts.append(f"![{name}, {scale} scale]({scale}.png)")
    return "\n\n".join(parts) or "Not run yet beyond the smoke scale."


def _seeds(record: dict[str, Any]) -> str:
    numbers = {len(found["values"]) for found in record["quantities"].values()}
    least, most = min(numbers), max(numbers)
    return f"{most} seed{'s' * (most > 1)}" if least == most else f"{least} to {most} seeds"


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
    project = HERE.parent / "README.md"
    found = {
        project: between_marks(project, shown_claims()),
        HERE / "README.md": between_marks(HERE / "README.md", all_claims()),
    }
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
