"""The offline class: what goes in, what comes out, and that every field of SamplingParams does what it says."""

from __future__ import annotations

import string
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.errors import ConfigError, EngineDead, RequestError
from octavo.outputs import Completion, PositionLogprobs
from octavo.request import FinishReason


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama), dtype="float32", device="cpu", num_blocks=128, max_num_seqs=8, num_threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def letters(llm: LLM) -> list[int]:
    """With these alone allowed, a random model writes text that can be read."""
    return llm.text.encode(string.ascii_lowercase)


def sample(llm: LLM, prompt: str | list[int] = "hello", **params: Any) -> Completion:
    settings = {"temperature": 0.0, "max_tokens": 12, **params}
    return llm.generate(prompt, SamplingParams(**settings), use_tqdm=False)[0].outputs[0]


# --- prompts and outputs ---------------------------------------------------------------------------------------------


def test_texts_and_token_ids_are_prompts_and_come_back_in_order(llm: LLM) -> None:
    ids = llm.text.encode("hello")
    params = SamplingParams(temperature=0.0, max_tokens=6)
    texts = llm.generate(["hello", "bye", ids], params, use_tqdm=False)
    assert [output.prompt for output in texts] == ["hello", "bye", None]
    assert [output.prompt_token_ids for output in texts] == [ids, llm.text.encode("bye"), ids]
    assert texts[0].outputs[0].token_ids == texts[2].outputs[0].token_ids != texts[1].outputs[0].token_ids
    assert len({output.request_id for output in texts}) == 3
    for single in ("hello", ids):
        (alone,) = llm.generate(single, params, use_tqdm=False)
        assert alone.outputs[0].token_ids == texts[0].outputs[0].token_ids


def test_an_output_says_what_it_is_why_it_ended_and_when(llm: LLM) -> None:
    (output,) = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=5), use_tqdm=False)
    (completion,) = output.outputs
    assert completion.text == llm.text.decode(completion.token_ids, skip_special_tokens=True)
    assert (completion.index, len(completion.token_ids)) == (0, 5)
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.LENGTH, None)
    assert completion.logprobs is None
    assert output.prompt_logprobs is None
    times = output.metrics
    assert times is not None
    assert 0 < times.arrival <= times.scheduled <= times.first_token <= times.finished
    assert times.num_preemptions == 0


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in (3, 1, 2)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 1, 2]
    (output,) = llm.generate("a", use_tqdm=False)
    assert 0 < len(output.outputs[0].token_ids) <= (SamplingParams().max_tokens or 0)
    with pytest.raises(RequestError, match="3 prompts need 3 sampling parameters, not 2"):
        llm.generate(["a", "b", "c"], params[:2], use_tqdm=False)


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == []


def test_a_chat_is_its_template_rendered(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    conversation = [{"role": "user", "content": "hi"}]
    (answer,) = llm.chat(conversation, params, use_tqdm=False)
    assert llm.text.decode(answer.prompt_token_ids, skip_special_tokens=False) == "<user>hi\n<assistant>"
    (same,) = llm.generate("<user>hi\n<assistant>", params, use_tqdm=False)
    assert same.outputs[0].token_ids == answer.outputs[0].token_ids
    both = llm.chat([conversation, [{"role": "user", "content": "bye"}]], params, use_tqdm=False)
    assert both[0].outputs[0].token_ids == answer.outputs[0].token_ids != both[1].outputs[0].token_ids
    (bare,) = llm.chat(conversation, params, use_tqdm=False, add_generation_prompt=False)
    assert llm.text.decode(bare.prompt_token_ids, skip_special_tokens=False) == "<user>hi\n"


def test_progress_is_shown_unless_it_is_not_wanted(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], SamplingParams(max_tokens=2), use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"], SamplingParams(max_tokens=2))
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "tok/s" in shown


# --- parameters ------------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_text_before_it(llm: LLM, letters: list[int]) -> None:
    whole = sample(llm, allowed_token_ids=letters).text
    stop = whole[5:8]
    assert whole.find(stop) == 5
    cut = sample(llm, allowed_token_ids=letters, stop=stop)
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole[:5], FinishReason.STOP, stop)
    kept = sample(llm, allowed_token_ids=letters, stop=["never", stop], include_stop_str_in_output=True)
    assert (kept.text, kept.stop_reason) == (whole[:8], stop)
    assert kept.timing is not None
    assert kept.timing.arrival <= kept.timing.scheduled <= kept.timing.first_token <= kept.timing.finished


def test_a_stop_token_ends_the_sample(llm: LLM, letters: list[int]) -> None:
    whole = sample(llm, allowed_token_ids=letters)
    stop = whole.token_ids[4]
    first = whole.token_ids.index(stop)
    cut = sample(llm, allowed_token_ids=letters, stop_token_ids=[stop])
    assert (cut.token_ids, cut.text) == (whole.token_ids[: first + 1], whole.text[:first])
    assert (cut.finish_reason, cut.stop_reason) == (FinishReason.STOP, stop)
    kept = sample(llm, allowed_token_ids=letters, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert kept.text == whole.text[: first + 1]


def test_min_tokens_holds_every_end_back(llm: LLM, letters: list[int]) -> None:
    whole = sample(llm, allowed_token_ids=letters)
    stop = whole.token_ids[0]
    assert len(sample(llm, allowed_token_ids=letters, stop_token_ids=[stop]).token_ids) == 1
    longer = sample(llm, allowed_token_ids=letters, stop_token_ids=[stop], min_tokens=6)
    assert len(longer.token_ids) >= 6
    assert stop not in longer.token_ids[:5]
    text = sample(llm, allowed_token_ids=letters, stop=whole.text[0], min_tokens=6)
    assert len(text.token_ids) >= 6


def test_an_end_of_sequence_token_ends_unless_it_is_ignored(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), dtype="float32", num_threads=1, num_blocks=64) as llm:
        (end,) = llm.text.eos_token_ids
        wanted: dict[str, Any] = {"logit_bias": {end: 100.0}, "max_tokens": 5}
        ended = sample(llm, **wanted)
        assert (ended.token_ids, ended.text, ended.stop_reason) == ([end], "", end)
        assert sample(llm, **wanted, ignore_eos=True).token_ids == [end] * 5


def test_special_tokens_are_skipped_unless_they_are_wanted(llm: LLM) -> None:
    (extra,) = llm.text.encode("<extra>")
    wanted: dict[str, Any] = {"allowed_token_ids": [extra], "max_tokens": 2}
    assert sample(llm, **wanted).text == ""
    assert sample(llm, **wanted, skip_special_tokens=False).text == "<extra><extra>"


def test_samples_of_one_prompt_differ_and_repeat_with_their_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=11, max_tokens=8)
    (first,), (again,) = (llm.generate("hello", params, use_tqdm=False) for _ in range(2))
    texts = [output.token_ids for output in first.outputs]
    assert [output.index for output in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(ids) for ids in texts}) == 4
    assert [output.token_ids for output in again.outputs] == texts
    (single,) = llm.generate("hello", params.replace(n=1, seed=13), use_tqdm=False)
    assert single.outputs[0].token_ids == texts[2]


def test_seeds_that_an_engine_draws_follow_from_its_own(tiny_llama: Path) -> None:
    def drawn(seed: int | None) -> list[int]:
        with LLM(str(tiny_llama), dtype="float32", num_threads=1, num_blocks=64, seed=seed) as llm:
            return llm.generate("hello", SamplingParams(max_tokens=12), use_tqdm=False)[0].outputs[0].token_ids

    assert drawn(1) == drawn(1) != drawn(2)


def check_position(position: PositionLogprobs, token_id: int, count: int) -> None:
    assert position.token.token_id == token_id
    assert position.token.logprob <= 0
    assert len(position.top) == count
    assert [one.rank for one in position.top] == list(range(1, count + 1))
    assert [one.logprob for one in position.top] == sorted((one.logprob for one in position.top), reverse=True)


def test_logprobs_for_every_token_of_output_and_prompt(llm: LLM) -> None:
    (output,) = llm.generate(
        "hello", SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=2), use_tqdm=False
    )
    (completion,) = output.outputs
    assert completion.logprobs is not None
    for position, token_id in zip(completion.logprobs, completion.token_ids, strict=True):
        check_position(position, token_id, 3)
        assert position.token == position.top[0] or position.token.rank == 1
    assert "".join(position.token.text for position in completion.logprobs) == completion.text
    assert output.prompt_logprobs is not None
    first, *rest = output.prompt_logprobs
    assert first is None
    for found, token_id in zip(rest, output.prompt_token_ids[1:], strict=True):
        assert found is not None
        check_position(found, token_id, 2)


def test_a_prompt_can_be_scored_alone(llm: LLM) -> None:
    (scored,) = llm.generate("hello", SamplingParams(max_tokens=0, prompt_logprobs=1), use_tqdm=False)
    (beside,) = llm.generate("hello", SamplingParams(max_tokens=3, prompt_logprobs=1), use_tqdm=False)
    assert (scored.outputs[0].token_ids, scored.outputs[0].finish_reason) == ([], FinishReason.LENGTH)
    assert scored.prompt_logprobs == beside.prompt_logprobs


def test_bad_words_allowed_tokens_and_bias_choose_among_tokens(llm: LLM, letters: list[int]) -> None:
    free = sample(llm, allowed_token_ids=letters)
    assert set(free.token_ids) <= set(letters)
    word = free.text[2:4]
    banned = sample(llm, allowed_token_ids=letters, bad_words=[word])
    assert word not in banned.text
    assert banned.text[:3] == free.text[:3]
    wanted = letters[25]
    assert sample(llm, logit_bias={wanted: 100.0}).text == "z" * 12
    against = dict.fromkeys(free.token_ids, -100.0)
    assert not set(sample(llm, logit_bias=against, allowed_token_ids=letters).token_ids) & set(free.token_ids)


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 50.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
)
def test_penalties_are_felt(llm: LLM, letters: list[int], penalty: dict[str, float]) -> None:
    plain = sample(llm, allowed_token_ids=letters[:4], max_tokens=40)
    changed = sample(llm, allowed_token_ids=letters[:4], max_tokens=40, **penalty)
    assert plain.token_ids != changed.token_ids


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_what_leaves_one_candidate_is_greedy(llm: LLM, narrow: dict[str, float]) -> None:
    assert sample(llm, temperature=1.0, seed=5, **narrow).token_ids == sample(llm).token_ids
    assert sample(llm, temperature=1.0, seed=5).token_ids != sample(llm).token_ids


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_refused_before_anything_runs(llm: LLM) -> None:
    fine, long = "hello", "x" * 256
    with pytest.raises(RequestError, match="the prompt has 256 tokens, but the context holds 256") as caught:
        llm.generate([fine, long], SamplingParams(max_tokens=1), use_tqdm=False)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match=r"5 tokens and max_tokens asks for 252.*at most 251"):
        llm.generate(fine, SamplingParams(max_tokens=252), use_tqdm=False)
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate([fine, ""], use_tqdm=False)
    with pytest.raises(RequestError, match="the prompt names tokens that are not in the vocabulary"):
        llm.generate([[1, 260]], use_tqdm=False)
    assert llm.frontend.num_open == 0
    assert len(sample(llm, fine, max_tokens=None, ignore_eos=True).token_ids) == 251


def test_any_number_of_prompts_waits_its_turn(llm: LLM) -> None:
    outputs = llm.generate([[number % 200] for number in range(300)], SamplingParams(max_tokens=1), use_tqdm=False)
    assert [output.prompt_token_ids[0] for output in outputs] == [number % 200 for number in range(300)]
    assert all(len(output.outputs[0].token_ids) == 1 for output in outputs)


def test_several_threads_may_ask_at_once(llm: LLM) -> None:
    expected = sample(llm).token_ids
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(sample(llm).token_ids)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


# --- beginning and end -----------------------------------------------------------------------------------------------


def test_an_option_that_does_not_exist_lists_those_that_do(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"LLM has no option max_model_length; there are: model, .*max_model_len"):
        LLM(str(tiny_llama), max_model_length=3)


def test_an_llm_from_a_configuration_is_the_same(tiny_llama: Path) -> None:
    config = EngineConfig(model=str(tiny_llama), dtype="float32", num_blocks=64, num_threads=1, max_model_len=64)
    with LLM.from_config(config) as made:
        assert made.info.max_model_len == 64
        assert len(sample(made).token_ids) == 12


def test_after_the_end_it_says_so_and_leaves_no_thread(tiny_llama: Path) -> None:
    before = threading.active_count()
    with LLM(str(tiny_llama), dtype="float32", num_blocks=64, num_threads=1) as made:
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(EngineDead, match="shut down"):
        sample(made)
    made.close()


def test_the_public_names_are_those_of_the_readme() -> None:
    assert octavo.LLM is LLM
    assert octavo.SamplingParams is SamplingParams
