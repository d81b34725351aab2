"""Every ``Q4METAL_*`` environment variable, in one table; ``doctor`` prints it."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, the values it takes, and what it does."""

    name: str
    values: str
    meaning: str

    def get(self) -> str | None:
        """The value that is set, or None; an empty string counts as not set."""
        return os.environ.get(self.name) or None


CPU = Variable(
    "Q4METAL_CPU",
    "ref | avx2 | avx512 | amx | neon | amx-emulated",
    "forces the instruction set of the CPU kernels",
)
CACHE = Variable("Q4METAL_CACHE", "a folder", "where converted and streamed models are kept")
NO_HISTORY = Variable("Q4METAL_NOHISTORY", "1", "chat keeps no history file")
HUGE_PAGES = Variable("Q4METAL_HUGE_PAGES", "0", "on Linux, weights stay in the mapped file")

VARIABLES = (CPU, CACHE, NO_HISTORY, HUGE_PAGES)
