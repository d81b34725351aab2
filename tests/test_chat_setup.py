"""From flags to a session: defaults of the checkpoint, templates, end tokens."""

from pathlib import Path

import pytest
from sentence import assert_one_sentence
from speaking import write_speaking
from tiny import edit_json

from torch_q4metal.chat_setup import ModelOptions, SamplingOptions, merge_sampling, open_session
from torch_q4metal.config import GenerationDefaults
from torch_q4metal.errors import MemoryLimitError, Q4MetalError, TokenizerError
from torch_q4metal.sampling import SamplingParams
from torch_q4metal.terminal import write_answer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_speaking(tmp_path / "model", "Paris.")


def answer(path: Path, text: str, **options: object) -> str:
    session = open_session(ModelOptions(str(path)), SamplingOptions(), **options)  # type: ignore[arg-type]
    return "".join(session.ask(text))


def test_flags_win_over_the_checkpoint_and_greedy_is_left() -> None:
    nothing = merge_sampling(SamplingOptions(), GenerationDefaults())
    assert nothing == SamplingParams()
    defaults = GenerationDefaults(temperature=0.7, top_k=20, repetition_penalty=1.05)
    assert merge_sampling(SamplingOptions(top_k=0, seed=1), defaults) == SamplingParams(
        temperature=0.7, top_k=0, repetition_penalty=1.05, seed=1
    )
    assert merge_sampling(SamplingOptions(temperature=0.0), defaults).temperature == 0


def test_the_checkpoints_own_sampling_is_used(path: Path) -> None:
    edit_json(path / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9)
    session = open_session(ModelOptions(str(path)), SamplingOptions(top_p=1.0))
    assert session.sampling == SamplingParams(temperature=0.6, top_p=1.0)


def test_without_a_template(path: Path) -> None:
    edit_json(path / "tokenizer_config.json", chat_template=None)
    with pytest.raises(TokenizerError) as caught:
        answer(path, "hello")
    assert_one_sentence(caught.value, str(path), "--chat-template", "--ignore-chat-template")
    assert answer(path, "the capital is P", use_template=False) == "aris."


def test_another_template_as_text_or_file(path: Path, tmp_path: Path) -> None:
    template = "{{ messages[0].content }}ri"
    assert answer(path, "x", chat_template=template) == "s."
    file = tmp_path / "template.jinja"
    file.write_text(template)
    assert answer(path, "x", chat_template=str(file)) == "s."


def test_a_template_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for given, words in (("missing.jinja", "No such file"), (str(tmp_path / "binary"), "UTF-8")):
        with pytest.raises(TokenizerError) as caught:
            answer(path, "x", chat_template=given)
        assert_one_sentence(caught.value, given, words)


def test_extra_end_tokens_are_single_tokens(path: Path) -> None:
    assert answer(path, "x", extra_eos_tokens=["r"]) == "Pa"
    with pytest.raises(Q4MetalError) as caught:
        answer(path, "x", extra_eos_tokens=["ris"])
    assert_one_sentence(caught.value, "--extra-eos-token ris", "3 tokens")


def test_the_context_that_was_asked_for(path: Path) -> None:
    session = open_session(ModelOptions(str(path), context=64), SamplingOptions())
    assert session.context == 64


def test_what_does_not_fit_is_refused_unless_forced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_q4metal.memory.available_memory", lambda: 1 << 20)
    with pytest.raises(MemoryLimitError):
        open_session(ModelOptions(str(path)), SamplingOptions())
    open_session(ModelOptions(str(path), force=True), SamplingOptions())


def test_a_pipe_gets_what_the_model_said(capsys: pytest.CaptureFixture[str]) -> None:
    write_answer("\x1b[2Jü\r")
    assert capsys.readouterr().out == "\x1b[2Jü\r"
