"""Rejects what C++ accepts and Metal doesn't."""


def lint(preprocessed: str) -> list[str]:
    """Problems of preprocessed Metal text, each ``file:line: sentence``."""
    return []
