"""Stop strings: nothing of them leaks, whatever pieces the text comes in."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from torch_q4metal.stop_strings import StopStrings


def show(pieces, stops):
    """(shown text, whether it stopped), as generation drives it."""
    filter_ = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stopped = filter_.add(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + filter_.finish(), False


def test_text_before_a_stop_string_is_all_that_shows():
    for pieces in (["Yes.\nUser: no"], list("Yes.\nUser: no"), ["Yes.\nUs", "er: no"]):
        assert show(pieces, ["\nUser:"]) == ("Yes.", True)
    assert show(["Yes.\nUs"], ["\nUser:"]) == ("Yes.\nUs", False)


def test_what_may_begin_one_is_held_back_and_nothing_more():
    filter_ = StopStrings(["</end>", "\n\n"])
    assert filter_.add("a <") == ("a ", False)
    assert filter_.add("/en") == ("", False)
    assert filter_.add("x") == ("</enx", False)
    assert filter_.add("\n") == ("", False)
    assert filter_.finish() == "\n"
    assert filter_.finish() == ""


def test_no_stop_strings_hold_nothing_back():
    assert StopStrings([]).add("abc") == ("abc", False)
    assert StopStrings([""]).add("abc") == ("abc", False)


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
@example(text="aab", stops=["ab"], cuts=[1, 2])
@example(text="xabc", stops=["abc", "b"], cuts=[])
def test_any_cutting_gives_the_same(text, stops, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown, stopped = show(pieces, stops)
    assert (shown, stopped) == show(list(text), stops)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not stopped:
        assert shown == text
