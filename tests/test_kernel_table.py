"""Every kernel table that this CPU has, as the extension was built, without torch in the way."""

import os
import re

import kernel_table
import test_instruction_sets


def test_every_table_of_this_cpu(record_property):
    compiler = os.environ.get("CXX", "c++")
    program = kernel_table.build("quick", compiler, kernels=kernel_table.EXTENSION_KERNELS)
    output = kernel_table.run(program, "--quick")
    record_property("tables", output)  # says which ran natively and which were emulated
    print(output)
    tested = re.findall(r"^(\S+): ok \((?:native|emulated)\)", output, re.MULTILINE)
    assert set(tested) == set(test_instruction_sets.available())
