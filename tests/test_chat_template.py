"""Chat templates: the text that transformers makes of them, and nothing that hostile ones want."""

import json
import pickle
from datetime import datetime
from typing import Any

import pytest
from sentence import assert_one_sentence
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from torch_q4metal.chat_template import ChatTemplate, choose_template, find_templates
from torch_q4metal.errors import TokenizerError

CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message, messages = messages[0].content | trim, messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages if message.role != 'ipython' %}
    {%- if 'tool_calls' in message and message.tool_calls | length != 1 %}
        {{- raise_exception("This model calls one tool at a time!") }}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {{- {"name": message.tool_calls[0].function.name} | tojson }}
    {%- else %}
        {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
        {{- message.content | trim ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string
           and not (message.content.startswith('<tool_response>')) %}
        {%- set ns.multi = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.function.name }}{{- '", "arguments": ' }}
            {%- if call.function.arguments is string %}{{- call.function.arguments }}
            {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}
{%- set loop_messages = messages | rejectattr('role', 'equalto', 'system') | list %}
{%- for message in loop_messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}
"""
MACROS = """\
{% macro kind(schema, depth=0) -%}
{%- if schema.type == 'object' -%}
{ {%- for key, value in schema.properties|dictsort -%}
{{ key }}: {{ kind(value, depth + 1) }}{{ ', ' if not loop.last }}
{%- endfor -%} }
{%- elif schema.type is iterable and schema.type is not string -%}
{{ schema.type | map('upper') | join('|') }}
{%- else -%}
{{ "%s@%d" % (schema.type, depth) }}
{%- endif -%}
{%- endmacro %}
{% macro twice(a, b='-') %}{{ caller(a) ~ b ~ caller(varargs | length) }}{% endmacro %}
{% call(n) twice(1, '+', 3) %}<{{ n }}>{% endcall %}
{% for tool in tools or [] %}{{ kind(tool.function.parameters) }}{% endfor %}
{% generation %}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}
{% if m.role == 'tool' %}{% continue %}{% endif %}
{{ loop.cycle('odd', 'even') }} {{ m.content | replace('e', '€') | title | indent(2) }}
{% endfor %}{% endgeneration %}
{% set text %}{{ messages | map(attribute='role') | unique | sort | join(',') }}{% endset %}
{{ text.upper().center(40, '*') }} {{ '{:>6.2f}|{!r}'.format(3.14159, 'x') }} {{ 2 ** 10 % 7 }}
{{ messages | groupby('role') | map('first') | list }} {{ [1, 2, 3] | sum }} {{ (1, 'a') }}
{{ messages | tojson }} {{ {'b': 1, 'a': [true, none]} | tojson(sort_keys=true) }}
{{ messages[0].nothing }}{{ range(3) | list }} {{ dict(a=1).items() | list }} {{ 7 // 2 }}
{{ -3 | abs }}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL, "macros": MACROS}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'In <b>"Zürich"</b> & elsewhere',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": ["integer", "null"]},
                "at": {"type": "object", "properties": {"x": {"type": "number"}}},
            },
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <there> & 世界 🙂"}],
    "turns": [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo"},
        {"role": "user", "content": "  three\n\nlines  "},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "20 °C"},
        {"role": "tool", "content": "21 °C"},
        {"role": "assistant", "content": "Fine."},
    ],
    "out of order": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
}


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_transformers(name, chat, tools, oracle):
    template = ChatTemplate(TEMPLATES[name])
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    for options in ({}, {"enable_thinking": False, "add_generation_prompt": False}):
        options = {"add_generation_prompt": True} | options
        try:
            wanted = oracle.apply_chat_template(
                CHATS[chat], tools, chat_template=TEMPLATES[name], tokenize=False, **options
            )
        except Exception as error:
            assert name in ("mistral", "llama3")
            with pytest.raises(TokenizerError) as caught:
                template.render(CHATS[chat], tools=tools, **named, **options)
            assert_one_sentence(caught.value, "refuses these messages", str(error).rstrip("."))
        else:
            assert template.render(CHATS[chat], tools=tools, **named, **options) == wanted
            assert len(wanted) > 5


def test_the_clock_can_be_set():
    template = ChatTemplate(LLAMA3, clock=lambda: datetime(2024, 7, 4))
    assert "Today Date: 04 Jul 2024\n" in template.render(CHATS["one"], bos_token="")


def test_what_a_template_says_is_one_line():
    template = ChatTemplate("{{ raise_exception('No\\n  system\\trole! ' ~ 'x' * 1000) }}", "T")
    with pytest.raises(TokenizerError) as caught:
        template.render([])
    assert_one_sentence(caught.value, "T refuses these messages: No system role!")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("\n{% for %}", "not valid at line 2"),
        ("{% for a in b %}", "not valid at line 1"),
        ("{{ a | nothing }}", "No filter named 'nothing'"),
        ("{{ messages[0].content.nothing() }}", "nothing"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ messages.0.missing.more }}", "missing"),
    ],
)
def test_a_damaged_template_is_one_sentence(source, words):
    with pytest.raises(TokenizerError) as caught:
        ChatTemplate(source, "The chat template t").render(CHATS["one"])
    assert_one_sentence(caught.value, "The chat template t", words)


def test_templates_get_plain_copies():
    class Text(str):
        __slots__ = ()

        def upper(self) -> str:
            raise AssertionError("a template called it")

    messages = [{"role": Text("user"), "content": ("a", 1, 2.5, True, None)}]
    text = ChatTemplate("{{ messages[0].role.upper() }} {{ messages[0].content }}").render(messages)
    assert text == "USER ['a', 1, 2.5, True, None]"
    with pytest.raises(TokenizerError) as caught:
        ChatTemplate("x").render([{"role": "user", "content": object()}])
    assert_one_sentence(caught.value, "object")
    nested: list[Any] = []
    for _ in range(200):
        nested = [nested]
    with pytest.raises(TokenizerError):
        ChatTemplate("x").render([{"role": "user", "content": nested}])


def test_pickle_keeps_a_template():
    template = ChatTemplate(CHATML)
    text = template.render(CHATS["one"])
    assert pickle.loads(pickle.dumps(template)).render(CHATS["one"]) == text


def test_where_templates_are_found(tmp_path):
    config: dict[str, Any] = {"chat_template": "from the config"}
    assert find_templates(tmp_path, {}) == {}
    assert find_templates(tmp_path, config)["default"].source == "from the config"
    config = {
        "chat_template": [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "with tools"},
        ]
    }
    found = find_templates(tmp_path, config)
    assert choose_template(found, tools=False).source == "plain"
    assert choose_template(found, tools=True).source == "with tools"
    assert choose_template(found, tools=True, name="default").source == "plain"
    with pytest.raises(TokenizerError) as caught:
        choose_template(found, tools=True, name="rag")
    assert_one_sentence(caught.value, "rag", "default, tool_use")

    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("file with tools", encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("file é", encoding="utf-8")
    found = find_templates(tmp_path, config)
    assert {name: template.source for name, template in found.items()} == {
        "default": "file é",
        "tool_use": "file with tools",
    }
    assert str(more / "tool_use.jinja") in found["tool_use"].name


@pytest.mark.parametrize("given", [3, ["x"], [{"name": "default"}], {"name": "x"}])
def test_a_damaged_entry_names_its_file(tmp_path, given):
    with pytest.raises(TokenizerError) as caught:
        find_templates(tmp_path, json.loads(json.dumps({"chat_template": given})))
    assert_one_sentence(caught.value, str(tmp_path / "tokenizer_config.json"))


def test_a_template_that_is_no_text_names_its_file(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError) as caught:
        find_templates(tmp_path, {})
    assert_one_sentence(caught.value, str(tmp_path / "chat_template.jinja"))
