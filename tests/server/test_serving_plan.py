"""A server plans for what requests are expected to be, and follows its machine when that changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from live import serving

from checkpoints import load, prompts_of
from fake_machine import RATES, FakeMachine, slower
from moe_lightning import SamplingParams
from moe_lightning.cli import serve
from moe_lightning.config import EngineConfig
from moe_lightning.engine import plan as engine_plan
from moe_lightning.engine.background import in_thread
from moe_lightning.engine.plan import make_plan
from moe_lightning.engine.waiting import Turns
from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.memory.weights import allocate
from moe_lightning.perf.drift import WINDOW
from moe_lightning.perf.outlook import Prediction
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.task import TaskKind
from moe_lightning.server import plan as planning
from moe_lightning.server.app import create_app
from moe_lightning.server.config import ServerConfig
from moe_lightning.server.plan import Expected, describe, plan_to_serve
from moe_lightning.units import GIB, MIB

LENGTHS = (1, 5, 16, 17, 33, 9, 4, 12)
NEW_TOKENS = 32
PROMISED = Prediction(1.5, {"h2d": 1.0}, 8, 3, 600.0, 500.0, None)


@pytest.fixture
def searched(mixtral, monkeypatch):
    """Plans as on a GPU that holds requests of up to so many tokens; the arguments of each."""
    asked = []

    def search(config, *, workload, longest, spec):
        asked.append((workload, longest))
        if longest > 40:
            raise NoFeasiblePolicyError("too long", "Lower max_model_len")
        found = make_plan(replace(config, device="cpu"), spec=spec)
        return replace(found, prediction=PROMISED, rates=RATES, workload=workload)

    monkeypatch.setattr(planning, "make_plan", search)
    monkeypatch.setattr(planning, "_SHORTEST", 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return asked


def test_lengths_that_are_said_count_and_others_are_usual_ones():
    assert Expected.of(77, 32) == Expected(77, 32, 4 * 109)
    usual = Expected.of(None, None)
    assert usual.longest > 16 * usual.prompt > 16 * usual.answer


def test_requests_are_as_long_as_memory_allows(mixtral, searched):
    config = EngineConfig(str(mixtral), device="cpu")
    plan = plan_to_serve(config, Expected(8, 4, 4096))
    lengths = [longest for _, longest in searched]
    assert lengths[0] <= plan.spec.max_position and lengths[-1] <= 40 < lengths[-2]
    assert {workload for workload, _ in searched} == {Workload((8,), 4)}
    with pytest.raises(NoFeasiblePolicyError):
        plan_to_serve(config, Expected(60, 20, 100))
    searched.clear()
    with pytest.raises(NoFeasiblePolicyError):
        plan_to_serve(replace(config, max_model_len=64), Expected(8, 4, 4096))
    assert len(searched) == 1, "a length that was asked for is not changed"


def test_the_plan_is_searched_for_without_hints_too_and_told(mixtral, searched, capsys):
    config = EngineConfig(str(mixtral))
    assert serve._plan(config, ServerConfig(avg_prompt_len=6, gen_len=3)).prediction is PROMISED
    told = capsys.readouterr().err
    assert "for prompts of 6 and answers of 3 tokens" in told and "600 tokens/s and 1.50 s a pass" in told
    assert "--avg-prompt-len" not in told and "datasheet" not in told
    said = Expected(6, 3, 36)
    assert describe(replace(plan_to_serve(config, said), prediction=None), said).endswith("on the GPU")


def test_that_a_plan_goes_by_a_datasheet_is_told(mixtral, searched, monkeypatch, capsys):
    by_datasheet = replace(
        make_plan(EngineConfig(str(mixtral), device="cpu")), prediction=PROMISED, rates=RATES.rates
    )
    monkeypatch.setattr("moe_lightning.server.plan.plan_to_serve", lambda *_: by_datasheet)
    serve._plan(EngineConfig(str(mixtral)), ServerConfig())
    assert "note: the plan goes by the GPU's datasheet" in capsys.readouterr().err


def test_a_policy_that_is_given_is_no_plan_to_be_searched(mixtral, searched, tmp_path):
    assert serve._plan(EngineConfig(str(mixtral), policy=str(tmp_path)), ServerConfig()) is None
    assert searched == []


def test_a_served_model_is_watched(mixtral, monkeypatch):
    config = EngineConfig(str(mixtral), device="cpu", executor="threads", max_num_seqs=4, max_model_len=64)
    plan = replace(make_plan(config), prediction=PROMISED, rates=RATES, workload=Workload((8,), 4))
    monkeypatch.setattr(serve, "_plan", lambda *args: plan)
    llm, found = serve._load(config, ServerConfig())
    assert found is plan and llm.policy == plan.policy and llm.engine.watch is not None


def test_a_server_whose_plan_the_gpu_cannot_hold_takes_the_next_smaller_one(mixtral, monkeypatch):
    config = EngineConfig(str(mixtral), device="cpu", max_num_seqs=4, max_model_len=64, gpu_memory="512MiB")
    asked, refused = [], []

    def plan(config, server):
        asked.append(config.gpu_memory)
        return replace(make_plan(config), prediction=PROMISED, rates=RATES, workload=Workload((8,), 4))

    def refuse_once(*given):
        if not refused:
            refused.append(given)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return allocate(*given)

    monkeypatch.setattr(serve, "_plan", plan)
    monkeypatch.setattr("moe_lightning.engine.build.allocate", refuse_once)
    llm, found = serve._load(config, ServerConfig())
    assert asked == [512 * MIB, int(0.95 * 512 * MIB)]
    assert llm.policy == found.policy


def test_when_passes_drift_the_search_runs_beside_them_and_no_request_is_lost(mixtral, caplog):
    llm = load(mixtral, executor="threads", num_blocks=128, num_frames=16, micro_batch_size=1)
    prompts, body = prompts_of(LENGTHS), {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    right = [o.outputs[0].text for o in load(mixtral).generate(prompts, params, use_tqdm=False)]
    machine = FakeMachine(llm, lambda number: slower({TaskKind.ATTENTION: 3.0} if number == 5 else None))
    searches = []

    def begin(search):
        searches.append(in_thread(search))
        return searches[-1]

    machine.keep_to_plan(Workload(LENGTHS, NEW_TOKENS), begin)
    with serving(llm) as live:
        for _ in range(2):
            status, answer = live.post("/v1/completions", {"prompt": prompts, **body})
            assert status == 200
            assert [choice["text"] for choice in answer["choices"]] == right
            assert machine.num_passes > WINDOW
            searches[0].result(120)  # taken in the passes that follow, if not before
    assert len(searches) == llm.engine.watch.num_revisions == 1
    assert any("attention 3.00 times" in message for message in caplog.messages)
    assert llm.engine._batcher.policy == llm._worker._policy != llm.policy


def test_the_longest_request_that_users_name_bounds_a_searched_plan_too(mixtral, monkeypatch):
    monkeypatch.setattr(engine_plan, "_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(engine_plan, "cap_gpu_memory", lambda _, most: most)
    monkeypatch.setattr(engine_plan, "measured_rates", lambda *_: RATES)
    config = EngineConfig("mixtral-8x7b", gpu_memory=24 * GIB, host_memory=128 * GIB, load_format="dummy")
    expected = Expected.of(None, None)
    assert plan_to_serve(config, expected).max_model_len > 2048
    assert plan_to_serve(replace(config, max_model_len=2048), expected).max_model_len == 2048


def test_a_server_answers_in_order_whatever_made_its_engine(alone):
    alone.engine._batcher.change_turns(Turns(together=100))
    create_app(alone)
    assert alone.engine._batcher._turns == Turns()
