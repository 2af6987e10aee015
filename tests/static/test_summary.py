"""The table at the end of run_tests.sh (tests/summary.py): nothing that failed, crashed, was skipped or never ran looks as if it passed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from summary import summarize

PYTEST = """<testsuites><testsuite>
<testcase classname="t" name="good"/>
<testcase classname="t" name="bad"><failure message="planted"/></testcase>
<testcase classname="t" name="left_out"><skipped message="Skipped: CUDA graphs need a GPU"/></testcase>
</testsuite></testsuites>"""
GTEST = """<testsuites><testsuite>
<testcase classname="S" name="good" status="run" result="completed"/>
<testcase classname="S" name="filtered" status="notrun" result="suppressed"/>
<testcase classname="S" name="left_out" status="run" result="skipped"><skipped message="a.h:3&#10;no CUDA device"/></testcase>
</testsuite></testsuites>"""
CTEST = """<testsuite>
<testcase name="forward.lazy" status="run"/>
<testcase name="consumer" status="run"/>
<testcase name="crashes" status="fail"/>
<testcase name="absent" status="notrun"><skipped message="SKIP_RETURN_CODE=77"/></testcase>
</testsuite>"""


def write(folder: Path, suites: str, **reports: str) -> Path:
    (folder / "suites.tsv").write_text(suites)
    for name, text in reports.items():
        (folder / f"{name.replace('__', '.')}.xml").write_text(text)
    return folder


def test_counts_and_reasons(tmp_path):
    suites = "Python\t1\t12\tpython.xml\nC++\t8\t3\tctest.xml\n"
    lines, good = summarize(write(tmp_path, suites, python=PYTEST, ctest=CTEST, forward__lazy=GTEST))
    text = "\n".join(lines)
    assert not good
    rows = {line.split("  ")[0]: line.split()[-4:] for line in lines[1:3]}
    assert rows == {"Python": ["1", "1", "1", "12"], "C++": ["2", "1", "2", "3"]}
    assert "FAILED (Python): t.bad" in text and "FAILED (C++): crashes" in text
    assert "skipped 1x (Python): CUDA graphs need a GPU" in text and "skipped 1x (C++): no CUDA device" in text
    assert lines[-1] == "run_tests.sh: 2 FAILED, 3 passed, 3 skipped"


def test_a_suite_that_dies_without_a_report_failed(tmp_path):
    lines, good = summarize(write(tmp_path, "build\t1\t5\t-\nPython\t139\t5\tpython.xml\n"))
    assert (
        not good
        and "FAILED (build): build: exit status 1" in lines
        and "FAILED (Python): Python: exit status 139" in lines
    )


def test_all_well(tmp_path):
    report = PYTEST.replace('<failure message="planted"/>', "")
    lines, good = summarize(write(tmp_path, "build\t0\t5\t-\nPython\t0\t5\tpython.xml\n", python=report))
    assert good and lines[-1] == "run_tests.sh: everything that ran passed, 2 passed, 1 skipped"
