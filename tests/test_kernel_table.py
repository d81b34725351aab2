"""Every kernel table that this CPU has: a whole table is tested without torch in the way."""

import os
import re

import kernel_table
import test_instruction_sets


def test_every_table_of_this_cpu(record_property):
    program = kernel_table.build("quick", os.environ.get("CXX", "c++"), flags="-O1")
    output = kernel_table.run(program, "--quick")
    record_property("tables", output)  # says which ran natively and which were emulated
    print(output)
    tested = re.findall(r"^(\S+): ok \((?:native|emulated)\)", output, re.MULTILINE)
    assert set(tested) == set(test_instruction_sets.available())
