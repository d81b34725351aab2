"""The whole test of every kernel table under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os

import kernel_table


def test_every_table():
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    program = kernel_table.build("sanitized", os.environ.get("CXX", "c++"), flags=flags)
    print(kernel_table.run(program))
