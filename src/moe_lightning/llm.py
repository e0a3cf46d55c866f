"""The Python interface: a model that answers prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lightning.config import EngineConfig
from moe_lightning.engine.background import in_thread
from moe_lightning.engine.build import build_worker
from moe_lightning.engine.draws import stable_seed
from moe_lightning.engine.engine import Engine
from moe_lightning.engine.grammar import Grammars
from moe_lightning.engine.plan import Plan, checkpoint_directory, make_plan
from moe_lightning.engine.prompts import (
    Prompt,
    Tokens,
    as_conversations,
    as_prompts,
    check_tokens,
    params_of_each,
    render,
    tokenize,
)
from moe_lightning.engine.request import Request, RequestOutput, SamplingParams
from moe_lightning.engine.runs import OnPass, Runs
from moe_lightning.engine.smaller_plan import built
from moe_lightning.engine.structured import StructuredOutputsParams
from moe_lightning.engine.tokenizer import dummy_tokenizer, load_tokenizer
from moe_lightning.engine.waiting import Turns
from moe_lightning.engine.watch import Begin, Watch
from moe_lightning.engine.worker import Worker
from moe_lightning.errors import ConfigError
from moe_lightning.memory import checkpoint
from moe_lightning.perf.facts import PassFacts
from moe_lightning.perf.filling import QUEUE
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.policy import Policy


class LLM:
    """A loaded model; keywords as in vLLM where the meaning is the same.

    Args:
        model: checkpoint directory.
        tokenizer: directory of another tokenizer than the checkpoint's.
        dtype, tensor_parallel_size, quantization, kv_cache_dtype, max_model_len, gpu_memory, host_memory, device,
        seed, max_num_seqs, executor, load_format: see `EngineConfig`.
        policy: a JSON file as in `EngineConfig`, or a whole `Policy` (for experiments).

    Raises:
        ConfigError, UnsupportedModelError, CheckpointError, NoFeasiblePolicyError: the model cannot run as asked.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | str | None = None,
        gpu_memory: int | str | None = None,
        host_memory: int | str | None = None,
        device: str = "auto",
        seed: int = 0,
        *,
        max_num_seqs: int | str | None = None,
        executor: str = "auto",
        load_format: str = "auto",
        packing: str = "auto",
        policy: str | Path | Policy | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "dtype": dtype, "tensor_parallel_size": tensor_parallel_size, "quantization": quantization,
            "kv_cache_dtype": kv_cache_dtype, "max_model_len": max_model_len, "gpu_memory": gpu_memory,
            "host_memory": host_memory, "device": device, "seed": seed, "max_num_seqs": max_num_seqs,
            "executor": executor, "load_format": load_format, "packing": packing,
        }  # fmt: skip
        whole = policy if isinstance(policy, Policy) else None
        self.config = EngineConfig(
            model=str(model),
            tokenizer=_path("tokenizer", tokenizer),
            policy=None if whole else _path("policy", policy),
            **settings,
        )
        plan = make_plan(self.config, whole)
        self.spec, self.dtype, self._device = plan.spec, plan.dtype, plan.device
        self.model_name = Path(model).absolute().name
        directory = checkpoint_directory(self.config)
        self.tokenizer = self._load_tokenizer(directory)
        self._grammars = Grammars(self.tokenizer, self.spec.vocab_size, self.spec.eos_token_ids)
        # Before memory is taken: a wrong checkpoint is the commonest error.
        tensors = None if directory is None else checkpoint.open_model(directory, self.spec)
        if whole or self.config.policy:
            self._worker = self._build(plan, tensors)
        else:
            self._worker, plan = built(self.config, plan, make_plan, lambda plan: self._build(plan, tensors))
        self.policy, self.max_model_len = plan.policy, plan.max_model_len
        self.engine = Engine(
            self._worker, self.policy, self.tokenizer, self.spec.eos_token_ids, self.max_model_len,
            turns=Turns.of_job(self.policy, self._device),
        )  # fmt: skip
        self._runs = Runs(self.engine, QUEUE * self.policy.max_num_seqs)
        self._num_requests = 0

    @property
    def fullest_pass(self) -> Timeline | None:
        """When each task ran in the pass with the most decode micro-batches so far, then the most chunks."""
        return self._worker.fullest.timeline() if self._worker.fullest else None

    @property
    def fullest_facts(self) -> PassFacts | None:
        """What that pass was."""
        return self._worker.fullest.facts if self._worker.fullest else None

    def answer_in_order(self) -> None:
        """From now on whoever comes first goes first; else answers come as soon as the last of all can."""
        self.engine.answer_in_order()

    def keep_to(self, plan: Plan, begin: Begin = in_thread) -> None:
        """Compare passes with what the plan predicts, and when they drift, go on as the measured rates suggest.

        Only where lanes work at once, as predictions suppose, and for a plan that was searched for. `begin` runs
        the search for another plan.
        """
        if self.config.executor != "serial" and plan.rates and plan.workload:
            dtype = str(self.dtype).removeprefix("torch.")
            self.engine.watch = Watch(
                self.spec, dtype, self.policy, plan.rates, plan.workload, self.max_model_len, begin
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts.

        Args:
            prompts: text, token ids (a list or an array), ``{"prompt_token_ids": [...]}`` or ``{"prompt": str}``,
                or a list of these.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar.

        Raises:
            RequestError: a prompt is empty, too long or no prompt; nothing has run then.
        """
        requests = self._completion_requests(prompts, sampling_params)
        return self._collect(requests, use_tqdm)

    def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """As `generate`, but answers come as they are finished; `request_id` says to which prompt, from "0" on."""
        requests = self._completion_requests(prompts, sampling_params)
        base = int(requests[0].request_id) if requests else 0
        for output in self.run(requests):
            yield _renamed(output, str(int(output.request_id) - base))

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers to one conversation or several, through the model's chat template.

        Raises:
            RequestError: the model has no chat template, or a conversation does not fit it.
        """
        conversations = as_conversations(messages)
        requests = [
            self.chat_request(self._next_id(), conversation, params)
            for conversation, params in zip(
                conversations, params_of_each(sampling_params, len(conversations)), strict=True
            )
        ]
        return self._collect(requests, use_tqdm)

    def completion_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, seed: int | None = None
    ) -> Request:
        """A request that `run` takes; `seed` is for the case that params has none.

        Raises:
            RequestError: the prompt is empty, too long, has ids that are no tokens, or more than would be run.
        """
        return self._request(request_id, tokenize(self.tokenizer, prompt), params, seed)

    def chat_request(
        self, request_id: str, messages: list[dict[str, Any]], params: SamplingParams, seed: int | None = None
    ) -> Request:
        """A request for the answer to a conversation.

        Raises:
            RequestError: the model has no chat template, or the conversation does not fit it.
        """
        return self._request(request_id, render(self.tokenizer, messages), params, seed)

    def run(self, requests: Iterable[Request], on_pass: OnPass | None = None) -> Iterator[RequestOutput]:
        """Outputs as requests finish; takes requests only as fast as they can be worked on.

        `on_pass` is called after each pass. When the caller stops early, what is unfinished is dropped. Other runs
        may begin, and end, before this one does; request ids must differ from those of their unfinished requests.
        """
        return self._runs.run(requests, on_pass)

    def _completion_requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        several = as_prompts(prompts)
        return [
            self.completion_request(self._next_id(), prompt, params)
            for prompt, params in zip(several, params_of_each(sampling_params, len(several)), strict=True)
        ]

    def _collect(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        found = {}
        with _progress(len(requests), use_tqdm) as advance:
            for output in self.run(requests):
                found[output.request_id] = output
                advance()
        return [found[request.request_id] for request in requests]

    def _next_id(self) -> str:
        self._num_requests += 1
        return str(self._num_requests - 1)

    def prepare_form(self, wanted: StructuredOutputsParams) -> None:
        """Compile a form ahead of the request that asks for it: that may take seconds, later it takes none.

        Raises:
            RequestError: it cannot be used.
        """
        self._grammars.compile(wanted)

    def _request(self, request_id: str, tokens: Tokens, params: SamplingParams, seed: int | None) -> Request:
        ids, text = tokens
        check_tokens(ids, self.spec.vocab_size, self.max_model_len, params)
        if params.seed is not None:
            seed = params.seed
        elif seed is None:
            seed = stable_seed(self.config.seed, request_id)
        wanted = params.structured_outputs
        form = None if wanted is None else self._grammars.compile(wanted)
        return Request(request_id, ids, params, text, seed, form=form)

    def _load_tokenizer(self, directory: Path | None) -> Any:
        if self.config.tokenizer or directory:
            return load_tokenizer(self.config.tokenizer or str(directory))
        return dummy_tokenizer(self.spec.vocab_size)

    def _build(self, plan: Plan, tensors: checkpoint.Tensors | None) -> Worker:
        total = self.spec.num_parameters * self.dtype.itemsize
        with _progress(total, True, "loading weights", is_bytes=True) as advance:
            return build_worker(
                self.spec, plan.policy, self.dtype, self._device,
                tensors=tensors, executor=self.config.executor, seed=self.config.seed,
                progress=lambda done, total: advance(done, total),
            )  # fmt: skip


def _path(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str | Path):
        return str(value) if value else None
    raise ConfigError(f"{name}={value!r}: give a path")


def _renamed(output: RequestOutput, request_id: str) -> RequestOutput:
    return replace(output, request_id=request_id)


@contextmanager
def _progress(
    total: int, is_shown: bool, label: str = "prompts", *, is_bytes: bool = False
) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal; nothing elsewhere."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    count: bars.ProgressColumn = bars.DownloadColumn() if is_bytes else bars.MofNCompleteColumn()
    columns = (bars.TextColumn(label), bars.BarColumn(), count, bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=console, disable=not (is_shown and console.is_terminal)) as bar:
        task = bar.add_task(label, total=total)

        def advance(done: int | None = None, of: int | None = None) -> None:
            if done is None:
                bar.advance(task)
            else:
                bar.update(task, completed=done, total=of)

        yield advance
