"""The table that ends ./run_tests.sh: what passed, failed and was skipped, by suite, and why it was skipped.

    python tests/summary.py FOLDER

FOLDER holds suites.tsv (name, exit status, seconds, report; a line each), the reports as JUnit XML, and those of the GoogleTest
programs that ctest ran, as NAME.xml. Exit status 1 where anything failed, or a suite ended without a report.
"""

from __future__ import annotations

import collections
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Counts:
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: collections.Counter[str] = field(default_factory=collections.Counter)  # by reason

    def add(self, other: Counts) -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped


def reason_of(element: ElementTree.Element) -> str:
    text = (element.get("message") or element.text or "").strip()
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("Skipped: ") if lines else "no reason given"


def read_cases(report: Path) -> Counts:
    """Counts of a JUnit report, of pytest or of GoogleTest."""
    counts = Counts()
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts.failed.append(name)
        elif skip is not None:
            counts.skipped[reason_of(skip)] += 1
        elif case.get("status") != "notrun":  # GoogleTest: left out by a filter
            counts.passed += 1
    return counts


def read_ctest(report: Path) -> Counts:
    """Counts of a ctest report: the cases of every GoogleTest program, one for every other test."""
    counts = Counts()
    for test in ElementTree.parse(report).iter("testcase"):
        name, status = str(test.get("name")), test.get("status")
        cases = report.parent / f"{name}.xml"
        own = read_cases(cases) if cases.exists() else Counts()
        own.failed = [f"{name}: {failed}" for failed in own.failed]
        if status == "fail" and not own.failed:  # a crash, or no GoogleTest program
            own.failed.append(name)
        elif not cases.exists() and status == "run":
            own.passed += 1
        elif not cases.exists() and status != "fail":
            skip = test.find("skipped")
            own.skipped[reason_of(skip) if skip is not None else f"ctest: {status}"] += 1
        counts.add(own)
    return counts


def summarize(folder: Path) -> tuple[list[str], bool]:
    """The lines of the table, and whether all is well."""
    rows, details, total = [("suite", "passed", "failed", "skipped", "seconds")], [], Counts()
    for line in (folder / "suites.tsv").read_text().splitlines():
        name, status, seconds, report = line.split("\t")
        counts = Counts()
        path = folder / report
        if report != "-" and path.exists():
            counts = read_ctest(path) if report == "ctest.xml" else read_cases(path)
        if status != "0" and not counts.failed:
            counts.failed.append(f"{name}: exit status {status}")
        rows.append((name, str(counts.passed), str(len(counts.failed)), str(counts.skipped.total()), seconds))
        details += [f"skipped {number}x ({name}): {reason}" for reason, number in sorted(counts.skipped.items())]
        details += [f"FAILED ({name}): {failed}" for failed in counts.failed]
        total.add(counts)
    rows.append(("all", str(total.passed), str(len(total.failed)), str(total.skipped.total()), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [row[0].ljust(widths[0]) + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
             for row in rows]  # fmt: skip
    verdict = f"{len(total.failed)} FAILED" if total.failed else "everything that ran passed"
    lines += ["", *details, f"run_tests.sh: {verdict}, {total.passed} passed, {total.skipped.total()} skipped"]
    return lines, not total.failed


def main(folder: Path) -> int:
    lines, good = summarize(folder)
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
