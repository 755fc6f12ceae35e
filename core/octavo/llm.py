"""Offline generation: a model, prompts, texts."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from octavo.client import EngineClient, ThreadClient
from octavo.config import EngineConfig
from octavo.default_model import find_default_model
from octavo.errors import ConfigError, RequestError
from octavo.frontend import Collector, Frontend, Sink
from octavo.messages import EngineInfo
from octavo.outputs import CompletionDelta, RequestOutput
from octavo.request import SamplingParams
from octavo.startup import make_text, resolve

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model in this process::

        llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct")
        for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

    ``model`` is a folder, a file, a name on the hub, or None for the small default model. Further arguments are the
    fields of :class:`octavo.config.EngineConfig`.

    Raises:
        ConfigError: the model cannot be served so; says why and what to change.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        unknown = sorted(set(options) - set(EngineConfig.__dataclass_fields__))
        if unknown:
            known = ", ".join(EngineConfig.__dataclass_fields__)
            raise ConfigError(f"LLM has no option {', '.join(unknown)}; there are: {known}")
        self._start(EngineConfig(model=model or find_default_model(), **options))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """The same from a configuration that is complete already."""
        llm = cls.__new__(cls)
        llm._start(config)
        return llm

    def _start(self, config: EngineConfig) -> None:
        resolved = resolve(config)
        self.text = make_text(resolved)
        self.client: EngineClient = ThreadClient(resolved)
        self.frontend = Frontend(self.client, self.text, seed=config.seed)
        self.frontend.start()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts. A prompt is a text or a list of token ids.

        Raises:
            RequestError: a prompt cannot be served; nothing has been started then.
            EngineDead: the engine failed.
        """
        listed = _listed(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        ids = [self.text.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in listed]
        return self._run(ids, texts, _params_for(len(ids), params), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, rendered by the model's chat template."""
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        ids = [
            self.text.encode_chat(conversation, add_generation_prompt=add_generation_prompt)
            for conversation in conversations
        ]
        return self._run(ids, [None] * len(ids), _params_for(len(ids), params), use_tqdm)

    @property
    def info(self) -> EngineInfo:
        """What the running engine is: sizes, dtype, device, backend."""
        return self.client.info

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        self.client.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(
        self, prompts: list[list[int]], texts: list[str | None], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        for prompt, one in zip(prompts, params, strict=True):
            self.frontend.checked(prompt, one)
        finished: queue.SimpleQueue[Collector] = queue.SimpleQueue()
        collectors = [Collector(prompt, one.n, text) for prompt, one, text in zip(prompts, params, texts, strict=True)]
        request_ids = [
            self.frontend.submit(prompt, one, _sink(collector, finished))
            for prompt, one, collector in zip(prompts, params, collectors, strict=True)
        ]
        started, num_tokens = time.perf_counter(), 0
        try:
            with tqdm(total=len(prompts), desc="prompts", disable=not use_tqdm, dynamic_ncols=True) as progress:
                for _ in prompts:
                    collector = finished.get()
                    num_tokens += sum(len(output.token_ids) for output in collector.result().outputs)
                    progress.set_postfix_str(f"{num_tokens / (time.perf_counter() - started):.1f} tok/s", refresh=False)
                    progress.update()
        except BaseException:  # whatever interrupts the caller must not leave requests running
            for request_id in request_ids:
                self.frontend.abort(request_id)
            raise
        return [collector.result(request_id) for request_id, collector in zip(request_ids, collectors, strict=True)]


def _sink(collector: Collector, finished: queue.SimpleQueue[Collector]) -> Sink:
    def push(delta: CompletionDelta) -> None:
        collector.push(delta)
        if collector.finished:
            finished.put(collector)

    return push


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_for(count: int, params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{count} prompts need {count} sampling parameters, not {len(params)}", param="params")
    return list(params)
