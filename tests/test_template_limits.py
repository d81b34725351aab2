"""Hostile chat templates end soon, in little memory and one sentence; honest ones never notice."""

import resource
import sys
import threading
import time

import pytest
from sentence import assert_one_sentence

from torch_q4metal.chat_template import ChatTemplate
from torch_q4metal.errors import TokenizerError
from torch_q4metal.template_meter import RenderLimits

CHAT = [{"role": "user", "content": "Hi"}]
HONEST = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}{% set ns.last = loop.revindex0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' ~ message.content | trim + '<|im_end|>\\n' }}
    {%- if loop.index0 == ns.last %}{{ tools | tojson }}{% endif %}
{%- endfor %}
"""
TOOLS = [{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}] * 10


LOOP = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}"


def grow(start: str, step: str, end: str = "{{ ns.x }}") -> str:
    return LOOP.replace("START", start).replace("STEP", step.replace("x", "ns.x")) + end


def twins(start: str, step: str) -> str:
    """Two values of the same shape and no shared part: comparing them visits everything."""
    steps = "".join(f"{{% set ns.{n} = {step.replace('N', 'ns.' + n)} %}}" for n in "xy")
    begin = f"{{% set ns = namespace(x={start}, y={start}) %}}"
    return f"{begin}{{% for i in range(60) %}}{steps}{{% endfor %}}{{{{ ns.x == ns.y }}}}"


BIG = "{% set s = 'a' * 1000000 %}"
# What each asks for would take hours, or gigabytes. What the error says is in the second column.
TOO_MUCH = {
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "s",
    ),
    "loops that set": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set a = j %}{% endfor %}"
        "{% endfor %}",
        "more than 0.2 s",
    ),
    "text in loops": (f"{{% for i in range(99999) %}}{'y' * 9999}{{% endfor %}}", "characters"),
    "text in a set block": (
        f"{{% set z %}}{{% for i in range(99999) %}}{'y' * 9999}{{% endfor %}}{{% endset %}}",
        "characters",
    ),
    "times": ("{{ 'a' * 10**10 }}", "characters"),
    "times, from the left": ("{{ 10**10 * ['a'] }}", "characters"),
    "doubling with +": (grow("'a'", "x + x"), "characters"),
    "doubling with ~": (grow("'a'", "x ~ x"), "characters"),
    "doubling with a filter": (grow("'a'", "[x, x] | join"), "characters"),
    "doubling in a set block": (
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}"
        "{% endset %}{% endfor %}",
        "characters",
    ),
    "doubling with %": (grow("'a'", "'%s%s' % (x, x)"), "characters"),
    "doubling with format": (grow("'a'", "'{0}{0}'.format(x)"), "characters"),
    "doubling by replace": (grow("'a'", "x.replace('a', 'aa')"), "characters"),
    "power": ("{{ 2 ** (10**9) }}", "4096 bits"),
    "tower": ("{{ 9 ** (9 ** 9) }}", "4096 bits"),
    "squares": (grow("3", "x * x"), "4096 bits"),
    "digits": ("{{ '1' * 9999 | int }}{{ ('1' * 9999) | int(base=16) }}", "4096 bits"),
    "macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "100 deep"),
    "macro twice": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(80) }}",
        "more than 0.2 s",
    ),
    "block without end": ("{% block a %}{{ self.a() }}{% endblock %}", "100 deep"),
    "loop without end": ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "100 deep"),
    "recursive loop over much": (
        "{% for x in [1] recursive %}{% if x %}{{ loop([0] * 99999) }}{% endif %}"
        + "{% set a = x %}" * 3000
        + "{% endfor %}",
        "more than 0.2 s",
    ),
    "width in %": ("{{ '%9999999999d' % 1 }}", "characters"),
    "width behind a key": ("{{ '%(a(b)c)9999999999d' % {'a(b)c': 1} }}", "characters"),
    "width from the arguments": ("{{ '%*d' % (10**9, 1) }}", "not available"),
    "width in format": ("{{ '{:>9999999999}'.format('a') }}", "characters"),
    "width from format's arguments": ("{{ '{:{w}}'.format('a', w=10**9) }}", "characters"),
    "width in a filter": ("{{ '%9999999999d' | format(1) }}", "characters"),
    "one key many times": (BIG + "{{ ('%(k)s' * 1000) % {'k': s} }}", "characters"),
    "ljust": ("{{ 'a'.ljust(10**10) }}", "characters"),
    "zfill": ("{{ 'a'.zfill(10**10) }}", "characters"),
    "center": ("{{ 'a' | center(10**10) }}", "characters"),
    "center, at compile time": ("{{ ('a' | center(10**10)) | length }}", "characters"),
    "indent": ("{{ ('a\n' * 9999) | indent(10**6) }}", "characters"),
    "expandtabs": ("{{ '\t'.expandtabs(10**10) }}", "str.expandtabs is not available"),
    "translate": ("{{ 'a'.translate({97: 'b' * 10**6}) }}", "str.translate is not available"),
    "replace": (BIG + "{{ s.replace('a', s) }}", "characters"),
    "replace nothing": (BIG + "{{ s | replace('', s) }}", "characters"),
    "join": (BIG + "{{ s.join(s) }}", "characters"),
    "join one text often": (BIG + "{{ ([s] * 999) | join }}", "characters"),
    "list in list": (grow("['lol']", "[x] * 10"), "."),
    "tuple as a key": (grow("('lol',)", "(x, x)", "{{ {ns.x: 1} }}"), "."),
    "dict in dict": (grow("{'a': 1}", "{'a': x, 'b': x}", "{{ ns.x | tojson }}"), "."),
    "dict()": (grow("{'a': 1}", "dict(a=x, b=x)", "{{ ns.x | tojson }}"), "."),
    "lists compared": (twins("[1]", "[N, N]"), "."),
    "dicts compared": (twins("{}", "{'a': N, 'b': N}"), "."),
    "cycler": (grow("1", "cycler(x, x).items", "{{ {ns.x: 1} }}"), "."),
    "varargs": (
        "{% macro f(n) %}{% if n %}{{ f(n-1, varargs, varargs) }}{% endif %}"
        "{% if {varargs: 1} %}{% endif %}{% endmacro %}{{ f(50, 1, 2) }}",
        ".",
    ),
    "depth": (grow("[]", "[[x]]", "{{ ns.x | tojson }}"), "100 deep"),
    "wide texts": (BIG + "{% set l = [[s] * 30] * 1000 %}{{ l | string | length }}", "characters"),
    "tojson's indent": ("{{ [1, [2]] | tojson(indent=10**9) }}", "indents by more"),
    "tojson's separators": (BIG + "{{ ([1] * 999) | tojson(separators=(s, s)) }}", "characters"),
    "batch": ("{{ [1] | batch(10**9, 'x') | list }}", "100000 items"),
    "slice": ("{{ [1] | slice(10**9) | list }}", "more than 0.2 s"),
    "slice in arguments": ("{{ cycler(*([1] | slice(10**9))) }}", "more than 0.2 s"),
    "slice in in": ("{{ 5 in ([1] | slice(10**9)) }}", "more than 0.2 s"),
    "sum of lists": ("{{ ([[1]] * 99999) | sum(start=[]) }}", "."),
    "round": ("{{ 1.5 | round(10**9, 'ceil') }}", "256 digits"),
    "strip": (BIG + "{{ s.strip('xyz' * 10**6) }}", "256 different"),
    "trim": (BIG + "{{ s | trim('xyz' * 10**6) }}", "256 different"),
    "sort": (
        "{% for i in range(9999) %}{% set a = range(99999) | list | sort(reverse=true) %}"
        "{% endfor %}",
        "more than 0.2 s",
    ),
    "select nothing": (
        "{% for i in range(9999) %}{% set a = range(99999) | select('==', -1) | list %}"
        "{% endfor %}",
        "more than 0.2 s",
    ),
    "compare": (
        "{% set s = 'a' * 9000000 %}{% set t = 'a' * 9000000 %}"
        + "{% set b = s == t == s == t %}" * 900,  # one each took 0.2 s where L3 held both
        "more than 0.2 s",
    ),
    "copy": (BIG + "{% set b = s[1:] %}" * 900, "."),
    "split": ("{{ ('ж ' * 9000000).split() | length }}", "characters"),
    "letters": ("{{ ('ж' * 9000000) | list | length }}", "characters"),
    "date": ("{{ strftime_now('%Y' * 9999) }}", "a date in more than"),
    "lipsum": ("{{ lipsum(n=10**9) }}", "'lipsum' is undefined"),
    "parts": ("{{ a }}" * 11_000, "more than 10000 parts"),
    "size": ("x" * 200_000, "200000 characters"),
    "nesting": ("{% for a in [1] %}" * 21 + "{% endfor %}" * 21, "nests more than 20"),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "."),
    "autoescape": ("{% autoescape 'a' | center(10**10) %}{% endautoescape %}", "not available"),
}
FORBIDDEN = {
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__"),
    "class by key": ("{{ ''['__class__'].x }}", "__class__"),
    "class by filter": ("{{ ('' | attr('__class__')).x }}", "__class__"),
    "class by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "__class__"),
    "format by filter": ("{{ ('{0.__class__.x}' | attr('format'))('') }}", "__class__"),
    "class by map": ("{{ [''] | map(attribute='__class__.x') | list }}", "__class__"),
    "format_map": ("{{ '{x}'.format_map({'x': 1}) }}", "str.format_map is not available"),
    "globals": ("{{ raise_exception.__globals__.x }}", "__globals__"),
    "namespace's class": ("{{ namespace.__init__.__globals__ }}", "__init__"),
    "frame": ("{{ ([1] | map('string')).gi_frame.f_globals }}", "gi_frame"),
    "append": ("{{ messages.append(1) }}", "append"),
    "update": ("{{ messages[0].update(a=1) }}", "update"),
    "bytes": ("{{ 'abc'.encode() }}", "str.encode is not available"),
    "int's methods": ("{{ (1).to_bytes(10**9, 'big') }}", "int.to_bytes is not available"),
    "class methods": ("{{ {}.fromkeys(range(99)) }}", "fromkeys is not available"),
    "include": ("{% include '/etc/passwd' %}", "."),
    "import": ("{% import 'os' as os %}", "."),
}


@pytest.mark.parametrize("case", [*TOO_MUCH, *FORBIDDEN])
def test_hostile_templates_end_soon_in_a_sentence(case):
    source, words = (TOO_MUCH | FORBIDDEN)[case]
    template = ChatTemplate(source, "The chat template x.jinja", limits=RenderLimits(seconds=0.2))
    before = peak_bytes()
    start = time.perf_counter()
    with pytest.raises(TokenizerError) as caught:
        template.render(CHAT)
    # A machine shared with others may be slow: the bounds only have to tell seconds from hours.
    assert time.perf_counter() - start < 5
    assert peak_bytes() - before < 300e6
    if "ran for more than" not in str(caught.value):  # on a slow machine time can end first
        assert_one_sentence(caught.value, "The chat template x.jinja", words)


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_bounds_hold_in_any_thread():
    source, words = TOO_MUCH["loops that set"]
    hostile = ChatTemplate(source, limits=RenderLimits(seconds=0.2))
    friendly = ChatTemplate(HONEST)
    errors: list[TokenizerError] = []
    texts: list[str] = []

    def work() -> None:
        try:
            hostile.render(CHAT)
        except TokenizerError as error:
            errors.append(error)
        texts.extend(friendly.render(CHAT * 10, tools=TOOLS) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 4
    assert all(words in str(error) for error in errors)
    assert texts == [friendly.render(CHAT * 10, tools=TOOLS)] * 80


def test_limits_are_counted_for_each_rendering():
    template = ChatTemplate("{{ 'a' * 1000 }}", limits=RenderLimits(characters=3000))
    assert {template.render([]) for _ in range(10)} == {"a" * 1000}


def test_a_long_chat_is_far_from_the_limits():
    messages = [
        {"role": "user", "content": "x" * 1000},
        {"role": "assistant", "content": "y"},
    ] * 500
    limits = RenderLimits(characters=RenderLimits().characters // 8)
    assert len(ChatTemplate(HONEST, limits=limits).render(messages, tools=TOOLS)) > 500_000


def test_a_turn_costs_little():
    template = ChatTemplate(HONEST)
    template.render(CHAT * 10, tools=TOOLS)
    start = time.perf_counter()
    for _ in range(50):
        template.render(CHAT * 10, tools=TOOLS)
    assert (time.perf_counter() - start) / 50 < 0.02  # 0.7 ms; starting a process takes 80
