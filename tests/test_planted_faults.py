"""The faults that ``tests/mutations.py`` plants: each stands for code that is there, once."""

import runpy
from collections import Counter
from pathlib import Path

SCRIPT = runpy.run_path(str(Path(__file__).with_name("mutations.py")))
ROOT, FAULTS = SCRIPT["ROOT"], SCRIPT["planted"]()


def test_every_fault_can_be_planted():
    """Code moves; a fault of code that is gone tests nothing, and nobody sees it in an hour's output."""

    def places(fault):
        path = ROOT / "disparse_plugin" / fault.file
        return path.read_text().count(fault.old) if path.is_file() else 0

    assert [fault for fault in FAULTS if places(fault) != 1 or fault.new == fault.old] == []


def test_no_fault_is_planted_twice_and_each_has_tests_that_are_there():
    counts = Counter((fault.file, fault.old, fault.new) for fault in FAULTS)
    assert [fault for fault, times in counts.items() if times > 1] == []
    assert [test for fault in FAULTS for test in fault.tests if not Path(ROOT, test).exists()] == []
