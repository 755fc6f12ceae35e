"""Prompts from files, answers for people and for programs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from octavo import Completion, FinishReason, RequestOutput
from octavo.cli import main
from octavo.cli.generate import as_record, print_answers, read_prompts
from octavo.errors import ConfigError

OUTPUT = RequestOutput("r", "p", [1, 2], [Completion(0, " yes\n", [3, 4, 5], finish_reason=FinishReason.LENGTH)])


def test_prompts_come_one_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    assert read_prompts(str(file)) == ["one", " two "]
    monkeypatch.setattr("sys.stdin", io.StringIO("three\n"))
    assert read_prompts("-") == ["three"]


def test_prompts_of_json_lines_may_hold_line_breaks(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one\\ntwo"}\n{"prompt": "three", "id": 4}\n')
    assert read_prompts(str(file)) == ["one\ntwo", "three"]


@pytest.mark.parametrize("line", ["[]", "{}", "x", '{"prompt": 5}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ConfigError, match="line 2"):
        read_prompts(str(file))


def test_a_file_without_prompts_or_none_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(str(tmp_path / "none"))


def test_a_record_holds_what_a_program_needs() -> None:
    assert as_record("p", OUTPUT) == {
        "prompt": "p",
        "num_prompt_tokens": 2,
        "outputs": [{"index": 0, "text": " yes\n", "num_tokens": 3, "finish_reason": "length"}],
    }


def test_one_answer_is_printed_alone_and_several_under_their_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    record = as_record("p", OUTPUT)
    print_answers([record])
    assert capsys.readouterr().out == " yes\n"
    print_answers([record, record])
    assert capsys.readouterr().out == ">>> p\n yes\n\n" * 2


def test_results_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl").write_text("kept")
    assert main(["generate", "m", "--prompt", "x", "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "kept"


def test_sampling_values_are_checked_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "no/such", "--prompt", "x", "--temperature", "-1"]) == 2
    assert "temperature must be between" in capsys.readouterr().err


def test_a_tiny_model_completes_prompts_into_json_lines(model: str, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    engine = ["--load-format", "dummy", "--num-blocks", "64"]
    sampling = ["--max-tokens", "5", "--n", "2", "--ignore-eos", "--chat"]
    words = ["--prompt", "one", "--prompt", "three", "--output", str(file)]
    assert main(["generate", model, *engine, *sampling, *words]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(record["prompt"], record["num_prompt_tokens"]) for record in records] == [("one", 3), ("three", 5)]
    for record in records:
        assert [(sample["index"], sample["num_tokens"]) for sample in record["outputs"]] == [(0, 5), (1, 5)]
