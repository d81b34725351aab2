"""What every error that a user can see looks like."""


def assert_one_sentence(message: object, *words: str) -> None:
    """One line that ends with a full stop and names each of ``words``."""
    text = str(message)
    assert text.isprintable(), text
    assert text.endswith("."), text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
