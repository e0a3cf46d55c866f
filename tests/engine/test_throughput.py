"""What `bench throughput` measures is what the engine did."""

from __future__ import annotations

import itertools

import pytest

from checkpoints import load
from moe_lightning.bench import throughput
from moe_lightning.bench.workloads import WORKLOADS, prompts, workload
from moe_lightning.errors import ConfigError
from moe_lightning.perf.workload import Workload

WORK = Workload((3, 5, 9), gen_len=6)


@pytest.fixture
def llm(mixtral):
    return load(mixtral, max_num_seqs=6, num_blocks=64, block_size=4)


def test_a_job_answers_every_request_in_full(llm):
    source = throughput._requests(WORK, llm.spec.vocab_size)
    passes = list(throughput._passes(llm, source, 10, None, lambda line: None))
    assert sum(p.generated for p in passes) == 10 * 6
    lengths = [len(p) for p in prompts(WORK, 240, llm.spec.vocab_size, seed=0)[:10]]
    assert sum(p.prompt_tokens for p in passes) == sum(lengths)
    assert llm.engine.num_unfinished == 0


def test_a_steady_state_begins_with_all_ages_and_stays_full(llm):
    source = throughput._requests(WORK, llm.spec.vocab_size)
    throughput._begin_midway(llm, source, WORK)
    assert llm.engine.num_running == 6
    assert [len(s.output_ids) for s in llm.engine._batcher.running] == [0, 1, 2, 3, 4, 5]
    passes = list(throughput._passes(llm, source, None, 18, lambda line: None))
    assert len(passes) == 18
    # One ends in each pass and another takes its place; a prompt's pass gives its first token.
    assert all(p.generated == 6 for p in passes[1:])
    assert llm.engine.num_preemptions == 0


def test_workloads_have_the_lengths_that_they_are_known_for():
    mean = {name: workload(name).mean_prompt for name in WORKLOADS}
    assert mean["mtbench"] == pytest.approx(76.1, abs=0.05)
    assert max(workload("mtbench").prompt_lens) == 418
    assert mean["synthetic-reasoning"] == pytest.approx(242, abs=1)
    assert mean["summarization"] == pytest.approx(1693, abs=5)
    assert max(workload("summarization").prompt_lens) == 1984
    with pytest.raises(ConfigError, match="no workload is named 'mt'; choose one of mtbench"):
        workload("mt")


def test_prompts_go_through_all_lengths_before_one_comes_again():
    found = prompts(WORK, 7, 100)
    assert sorted(len(p) for p in found[:3]) == sorted(len(p) for p in found[3:6]) == [3, 5, 9]
    assert all(3 <= token < 100 for token in itertools.chain(*found))
