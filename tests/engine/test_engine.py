"""What a user asks of a model: preemption, n, seeds, stops, scores, chat and refused prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from checkpoints import MAX_POSITION, greedy, load, prompts_of, reference_logprobs
from moe_lightning import SamplingParams
from moe_lightning.errors import RequestError
from moe_lightning.runtime import sampling_batch
from moe_lightning.runtime.runner import TaskRunner

LENGTHS = (1, 5, 16, 17, 33, 9)
NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(mixtral):
    return load(mixtral)


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(LENGTHS)


@pytest.fixture(scope="module")
def answers(mixtral_reference, prompts):
    found = [greedy(mixtral_reference, prompt, NEW_TOKENS) for prompt in prompts]
    assert min(margin for _, margin in found) > 1e-3
    return [tokens for tokens, _ in found]


def tokens_of(outputs):
    return [list(answer.token_ids) for output in outputs for answer in output.outputs]


def load_hopeful(*args, **changes):
    """An engine that admits as if answers would be short, as after many that were."""
    llm = load(*args, **changes)
    llm.engine._batcher._answer_lengths.count(0, 10**9)
    return llm


class TestPreemption:
    @pytest.mark.parametrize("executor", ["serial", "threads"])
    @pytest.mark.parametrize("num_blocks", [12, 16, 20])
    def test_few_blocks_change_no_token_and_lose_no_request(
        self, num_blocks, executor, mixtral, prompts, answers
    ):
        llm = load_hopeful(mixtral, executor=executor, num_blocks=num_blocks, block_size=4)
        assert tokens_of(llm.generate(prompts, GREEDY)) == answers
        assert llm.engine.num_preemptions > 0

    def test_draws_and_scores_are_those_of_a_run_without_preemption(self, llm, mixtral, prompts):
        params = SamplingParams(seed=5, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2, prompt_logprobs=1)
        few = load_hopeful(mixtral, num_blocks=12, block_size=4)
        for got, want in zip(few.generate(prompts, params), llm.generate(prompts, params), strict=True):
            assert got.outputs[0].token_ids == want.outputs[0].token_ids
            assert len(got.outputs[0].logprobs) == NEW_TOKENS
            assert len(got.prompt_logprobs) == len(want.prompt_logprobs)
            assert got.outputs[0].cumulative_logprob == pytest.approx(
                want.outputs[0].cumulative_logprob, 1e-3
            )
        assert few.engine.num_preemptions > 0

    def test_prompt_and_answer_tokens_are_counted_once(self, mixtral, prompts):
        llm = load_hopeful(mixtral, num_blocks=12, block_size=4)
        llm.generate(prompts, GREEDY)
        assert llm.engine.num_preemptions > 0
        assert llm.engine.num_prompt_tokens == sum(LENGTHS)
        assert llm.engine.num_generated_tokens == NEW_TOKENS * len(LENGTHS)

    def test_all_blocks_are_free_in_the_end(self, mixtral, prompts):
        llm = load_hopeful(mixtral, num_blocks=12, block_size=4)
        llm.generate(prompts, GREEDY)
        assert llm.engine._batcher.allocator.num_free == 12
        assert llm.engine.num_unfinished == llm.engine.num_running == llm.engine.num_waiting == 0


class TestSampling:
    def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(self, llm, prompts):
        params = SamplingParams(seed=11, temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        other = SamplingParams(seed=3, temperature=1.5, max_tokens=20, ignore_eos=True)
        alone = tokens_of(llm.generate(prompts[2], params))[0]
        among = llm.generate(prompts, [other, other, params, other, other, other])
        assert list(among[2].outputs[0].token_ids) == alone
        assert tokens_of(llm.generate(prompts[2], other))[0][:NEW_TOKENS] != alone

    def test_without_a_seed_the_engines_seed_and_the_request_decide(self, mixtral, prompts):
        params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        same = [tokens_of(load(mixtral).generate([prompts[0]] * 3, params)) for _ in range(2)]
        assert same[0] == same[1]
        assert len({tuple(tokens) for tokens in same[0]}) == 3

    def test_n_answers_differ_and_the_first_is_that_of_n_1(self, llm, prompts):
        one, four = (
            llm.generate(prompts[1], SamplingParams(n=n, seed=2, max_tokens=NEW_TOKENS, ignore_eos=True))[0]
            for n in (1, 4)
        )
        assert [answer.index for answer in four.outputs] == [0, 1, 2, 3]
        assert four.outputs[0].token_ids == one.outputs[0].token_ids
        assert len({answer.token_ids for answer in four.outputs}) == 4

    def test_n_greater_than_max_num_seqs_is_answered_in_full(self, mixtral, prompts, answers):
        llm = load(mixtral, max_num_seqs=2)
        params = SamplingParams(n=5, temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        assert tokens_of(llm.generate(prompts[1], params)) == [answers[1]] * 5

    def test_each_prompt_has_its_own_parameters(self, llm, prompts, answers):
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 2, 12, 3, 4)]
        expected = [answer[: p.max_tokens] for answer, p in zip(answers, params, strict=True)]
        assert tokens_of(llm.generate(prompts, params)) == expected

    @pytest.mark.parametrize("micro_batch_size", [4, 6])
    def test_micro_batches_of_more_rows_than_have_logits_at_once(
        self, micro_batch_size, mixtral, prompts, monkeypatch
    ):
        """Greedy rows, draws, and scores that only rows of one part ask for."""
        wanted = (None, 3, None, None, 0, None)
        params = [
            SamplingParams(temperature=i % 2, seed=i, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=k)
            for i, k in enumerate(wanted)
        ]
        expected = load(mixtral, micro_batch_size=2).generate(prompts, params)
        rows, logits = [], TaskRunner._logits

        def noted(self, hidden):
            rows.append(len(hidden))
            return logits(self, hidden)

        monkeypatch.setattr(TaskRunner, "_logits", noted)
        monkeypatch.setattr(sampling_batch, "HEAD_ROWS", 4)
        found = load(mixtral, micro_batch_size=micro_batch_size, chunk_tokens=100).generate(prompts, params)
        assert max(rows) == 4
        assert tokens_of(found) == tokens_of(expected)
        for output, other, k in zip(found, expected, wanted, strict=True):
            scores, others = output.outputs[0].logprobs, other.outputs[0].logprobs
            if k is None:
                assert scores is others is None
                continue
            for entries, same in zip(scores, others, strict=True):
                assert list(entries) == list(same)
                assert [e.logprob for e in entries.values()] == pytest.approx(
                    [e.logprob for e in same.values()], abs=1e-4
                )


class TestLengthAndStops:
    def test_max_tokens_0_gives_no_token_but_the_prompts_scores(self, llm, prompts):
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        for output, prompt in zip(llm.generate(prompts, params), prompts, strict=True):
            assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", ())
            assert output.outputs[0].finish_reason == "length"
            assert [list(entries) for entries in output.prompt_logprobs[1:]] == [[t] for t in prompt[1:]]

    def test_max_tokens_1_gives_the_first_token(self, llm, prompts, answers):
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        assert tokens_of(llm.generate(prompts, params)) == [answer[:1] for answer in answers]

    def test_max_tokens_none_goes_on_to_max_model_len(self, mixtral, prompts):
        llm = load(mixtral, num_blocks=4)
        (output,) = llm.generate(prompts[3], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
        assert llm.max_model_len == 64
        assert len(output.outputs[0].token_ids) == 64 - len(prompts[3])
        assert output.outputs[0].finish_reason == "length"

    def test_a_stop_token_ends_the_answer_and_is_the_reason(self, llm, prompts, answers):
        stop = answers[4][5]
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
        (output,) = llm.generate(prompts[4], params)
        end = answers[4].index(stop) + 1
        assert list(output.outputs[0].token_ids) == answers[4][:end]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)

    def test_a_stop_string_is_cut_off_and_ends_the_answer(self, llm, prompts):
        full = llm.generate(prompts[4], GREEDY)[0].outputs[0].text
        stop = full[len(full) // 2 :][:2]
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, stop=stop)
        answer = llm.generate(prompts[4], params)[0].outputs[0]
        assert answer.text == full[: full.index(stop)]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert len(answer.token_ids) < NEW_TOKENS

    def test_min_tokens_keeps_stop_tokens_away_so_long(self, llm, prompts, answers):
        stop = answers[4][0]
        params = SamplingParams(
            temperature=0, max_tokens=8, min_tokens=5, ignore_eos=True, stop_token_ids=[stop]
        )
        (output,) = llm.generate(prompts[4], params)
        assert len(output.outputs[0].token_ids) >= 5
        assert stop not in output.outputs[0].token_ids[:5]

    def test_the_models_eos_ends_an_answer_unless_ignored(self, llm, mixtral_reference):
        prompts = prompts_of((2,) * 1000, seed=9)
        with torch.inference_mode():
            first = mixtral_reference(torch.tensor(prompts)).logits[:, -1].argmax(-1).tolist()
        prompt = prompts[first.index(2)]
        tokens, _ = greedy(mixtral_reference, prompt, 3)
        params = SamplingParams(temperature=0, max_tokens=3)
        answer = llm.generate([prompt], params)[0].outputs[0]
        assert list(answer.token_ids) == [2]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
        ignoring = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        assert tokens_of(llm.generate([prompt], ignoring)) == [tokens]


class TestScores:
    def test_as_many_entries_as_asked_for_and_the_chosen_token(self, llm, prompts):
        params = SamplingParams(seed=1, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=2)
        for output, prompt in zip(llm.generate(prompts, params), prompts, strict=True):
            answer = output.outputs[0]
            assert len(answer.logprobs) == 4
            for token, entries in zip(answer.token_ids, answer.logprobs, strict=True):
                assert next(iter(entries)) == token
                assert len(entries) == (3 if entries[token].rank <= 3 else 4)
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == len(prompt)
            for token, entries in zip(prompt[1:], output.prompt_logprobs[1:], strict=True):
                assert len(entries) == (2 if entries[token].rank <= 2 else 3)
            chosen = zip(answer.token_ids, answer.logprobs, strict=True)
            total = sum(entries[token].logprob for token, entries in chosen)
            assert answer.cumulative_logprob == pytest.approx(total)

    def test_requests_of_one_batch_get_only_what_each_asked_for(self, llm, prompts):
        wanted = (None, 0, 1, 5, None, 100)
        params = [
            SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=k, prompt_logprobs=k)
            for k in wanted
        ]
        for output, k in zip(llm.generate(prompts, params), wanted, strict=True):
            if k is None:
                assert output.outputs[0].logprobs is None
                assert output.prompt_logprobs is None
                continue
            assert [len(entries) for entries in output.outputs[0].logprobs] == [max(k, 1)] * 2
            assert {len(entries) for entries in output.prompt_logprobs[1:]} <= {k, k + 1}

    def test_scores_of_prompts_that_share_chunks_stay_with_their_prompt(
        self, mixtral, mixtral_reference, prompts
    ):
        llm = load(mixtral, chunk_tokens=7)
        params = [SamplingParams(max_tokens=1, prompt_logprobs=k) for k in (0, None, 0, 0, 0, 0)]
        for output in llm.generate(prompts, params):
            if output.prompt_logprobs is None:
                continue
            ids = list(output.prompt_token_ids)
            wanted = reference_logprobs(mixtral_reference, ids)
            given = [
                entries[t].logprob for t, entries in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            ]
            expected = wanted[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
            assert given == pytest.approx(expected.tolist(), abs=1e-3)

    def test_scores_cover_a_prompt_of_one_token_and_n_answers_once(self, llm, prompts):
        params = SamplingParams(n=3, max_tokens=2, prompt_logprobs=1, ignore_eos=True)
        short, longer = llm.generate([prompts[0], prompts[1]], params)
        assert short.prompt_logprobs == [None]
        assert len(longer.prompt_logprobs) == len(prompts[1])


class TestPrompts:
    def test_text_ids_and_dicts_of_one_prompt_have_one_answer(self, llm):
        ids = llm.tokenizer("the fox")["input_ids"]
        forms = ["the fox", ids, {"prompt": "the fox"}, {"prompt_token_ids": ids}]
        outputs = llm.generate(forms, GREEDY)
        assert len({output.outputs[0].token_ids for output in outputs}) == 1
        assert outputs[0].prompt == "the fox"
        for form in forms:
            assert tokens_of(llm.generate(form, GREEDY)) == [list(outputs[0].outputs[0].token_ids)]

    def test_arrays_of_ids_are_prompts(self, llm, prompts, answers):
        arrays = [np.array(prompt, dtype=np.int32) for prompt in prompts]
        assert tokens_of(llm.generate(arrays, GREEDY)) == answers
        assert tokens_of(llm.generate(arrays[1], GREEDY)) == [answers[1]]
        assert tokens_of(llm.generate(np.array([prompts[1]] * 2), GREEDY)) == [answers[1]] * 2
        assert tokens_of(llm.generate(list(arrays[1]), GREEDY)) == [answers[1]], "a list of NumPy integers"

    def test_a_dict_of_ids_and_their_text_runs_the_ids(self, llm, prompts, answers):
        (output,) = llm.generate(
            {"prompt_token_ids": prompts[1], "prompt": "as text", "cache_salt": None}, GREEDY
        )
        assert (tokens_of([output]), output.prompt) == ([answers[1]], "as text")

    @pytest.mark.parametrize(
        "prompt", [b"abc", 5, None, {"prompt": "z", "cache_salt": "x"}, np.array(3), "\ud800"], ids=repr
    )
    def test_a_bad_prompt_alone_is_refused_as_in_a_list(self, prompt, llm):
        with pytest.raises(RequestError):
            llm.generate(prompt, GREEDY)

    @pytest.mark.parametrize(
        "messages, message",
        [
            ([{"role": "user", "contents": "Hi"}], r"messages\[0\]\.contents is not supported"),
            ([{"role": "user"}], r"messages\[0\]\.content=None: give a string"),
            ([{"role": "wizard", "content": "Hi"}], r"role='wizard' is not supported"),
            ([{"role": "user", "content": "\ud800"}], "surrogate"),
            ({"role": "user", "content": "Hi"}, "give a list of at least one message"),
            ([[]], r"messages=\[\]: give a list"),
            ("Hi", "messages='Hi': give a list"),
            (None, "messages=None: give a list"),
        ],
    )
    def test_a_conversation_that_would_lose_something_is_refused(self, messages, message, llm):
        with pytest.raises(RequestError, match=message):
            llm.chat(messages)

    @pytest.mark.parametrize("params", [{"temperature": 0}, [{"temperature": 0}], 0])
    def test_parameters_of_another_type_are_refused(self, params, llm):
        with pytest.raises(RequestError, match="give a SamplingParams"):
            llm.generate("a", params)

    def test_no_prompts_give_no_answers(self, llm):
        assert llm.generate([]) == []
        assert list(llm.generate_iter([])) == []

    def test_chat_is_the_templates_text(self, llm):
        messages = [{"role": "user", "content": "the dog"}]
        (output,) = llm.chat(messages, GREEDY)
        assert output.prompt == "<s>[user] the dog\n[assistant] "
        assert output.prompt_token_ids[0] == 1, "the template's own BOS, and no second one"
        assert 1 not in output.prompt_token_ids[1:]
        assert tokens_of(llm.generate([list(output.prompt_token_ids)], GREEDY)) == tokens_of([output])
        assert tokens_of(llm.chat([messages, messages], GREEDY)) == tokens_of([output, output])

    def test_chat_that_the_template_refuses_is_a_request_error(self, llm, monkeypatch):
        monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
        with pytest.raises(RequestError, match="roles must alternate"):
            llm.chat([{"role": "user", "content": "a"}])

    def test_chat_without_a_template_is_a_request_error(self, llm, monkeypatch):
        monkeypatch.setattr(llm.tokenizer, "chat_template", None)
        with pytest.raises(RequestError, match="no chat template"):
            llm.chat([{"role": "user", "content": "a"}])

    def test_the_longest_prompt_runs_and_one_token_more_is_refused(self, llm):
        assert llm.max_model_len == MAX_POSITION
        (longest, longer) = prompts_of((MAX_POSITION - 1, MAX_POSITION))
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        assert [len(t) for t in tokens_of(llm.generate([longest], params))] == [1]
        with pytest.raises(RequestError, match=rf"{MAX_POSITION} tokens; {MAX_POSITION - 1} fit"):
            llm.generate([longer], params)
        scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
        assert len(llm.generate([longer], scored)[0].prompt_logprobs) == MAX_POSITION

    @pytest.mark.parametrize(
        "prompt, message",
        [
            ("", "prompt is empty"),
            ({"prompt_token_ids": []}, "prompt is empty"),
            ([5, 320], "320 is no token id; they run from 0 to 319"),
            ([5, -1], "-1 is no token id"),
            ([5, True], "True is no token id"),
            ([5, "a"], "'a' is no token id"),
            ([5, 1.0], "1.0 is no token id"),
            ({"text": "a"}, "keys ..text.."),
            ({"prompt": None}, "keys ..prompt.."),
            (
                {"prompt": "z", "multi_modal_data": {"image": 1}},
                "'multi_modal_data' .* not supported; remove it",
            ),
            ({"prompt_token_ids": [5], "prompt": 7}, "prompt=7: give a string"),
            ({"prompt_token_ids": "abc"}, "'abc' is no prompt"),
            (b"abc", "b'abc' is no prompt; give text"),
            (None, "None is no prompt"),
            (1.5, "1.5 is no prompt"),
            ("half \ud800", "prompt holds half a surrogate pair at character 5"),
            (np.array([1.0, 2.0]), "is no prompt; .*integer array"),
            (np.array([[1, 2]]), "is no prompt; .*one-dimensional"),
        ],
    )
    def test_a_bad_prompt_is_refused_before_any_runs(self, prompt, message, llm, prompts):
        before = llm.engine.num_prompt_tokens
        with pytest.raises(RequestError, match=message):
            llm.generate([prompts[0], prompt], GREEDY)
        assert llm.engine.num_prompt_tokens == before
        assert llm.engine.num_unfinished == 0

    def test_as_many_parameters_as_prompts_or_one(self, llm, prompts):
        with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
            llm.generate(prompts[:3], [GREEDY, GREEDY])


class TestIteration:
    def test_every_answer_comes_once_and_short_ones_first(self, llm, prompts, answers):
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (12, 1, 6, 3, 9, 2)]
        found = [(o.request_id, list(o.outputs[0].token_ids)) for o in llm.generate_iter(prompts, params)]
        assert [request_id for request_id, _ in found] == ["1", "5", "3", "2", "4", "0"]
        assert all(tokens == answers[int(i)][: params[int(i)].max_tokens] for i, tokens in found)

    def test_what_an_iteration_leaves_unfinished_is_dropped(self, llm, prompts, answers):
        iterator = llm.generate_iter(prompts, GREEDY)
        next(iterator)
        iterator.close()
        assert llm.engine.num_unfinished == llm.engine.num_running == llm.engine.num_waiting == 0
        assert tokens_of(llm.generate(prompts, GREEDY)) == answers

    def test_more_prompts_than_the_queue_takes_are_all_answered(self, mixtral, prompts, answers):
        llm = load(mixtral, max_num_seqs=2)
        short = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        assert tokens_of(llm.generate(prompts * 4, short)) == [answer[:2] for answer in answers] * 4

    def test_an_aborted_request_returns_what_it_has_and_leaves_the_others(self, llm, prompts, answers):
        engine = llm.engine
        for number, prompt in enumerate(prompts):
            engine.add(llm.completion_request(f"r{number}", prompt, GREEDY))
        for _ in range(3):
            assert engine.step() == []
        output = engine.abort("r2")
        assert output.outputs[0].finish_reason == "abort"
        assert list(output.outputs[0].token_ids) == answers[2][:3]
        assert engine.abort("r2") is None
        found = {}
        while engine.num_unfinished:
            found.update({o.request_id: list(o.outputs[0].token_ids) for o in engine.step()})
        assert found == {f"r{i}": answer for i, answer in enumerate(answers) if i != 2}

    def test_an_aborted_request_that_still_waits_never_runs(self, mixtral, prompts):
        llm = load(mixtral, max_num_seqs=1)
        for number in (0, 1):
            llm.engine.add(llm.completion_request(str(number), prompts[number], GREEDY))
        llm.engine.step()
        assert llm.engine.abort("1").outputs[0].token_ids == ()
        while llm.engine.num_unfinished:
            llm.engine.step()
        assert llm.engine.num_prompt_tokens == len(prompts[0])

    def test_progress_is_reported_after_each_pass_and_ends_at_the_totals(self, llm, prompts):
        stats = []
        requests = [llm.completion_request(f"p{i}", prompt, GREEDY) for i, prompt in enumerate(prompts)]
        assert len(list(llm.run(requests, stats.append))) == len(prompts)
        generated = [s.generated_tokens for s in stats]
        assert generated == sorted(set(generated)), "every pass generates"
        assert stats[-1].prompt_tokens == sum(LENGTHS)
        assert stats[-1].generated_tokens == NEW_TOKENS * len(prompts)
        assert (stats[-1].num_running, stats[-1].num_waiting) == (0, 0)
