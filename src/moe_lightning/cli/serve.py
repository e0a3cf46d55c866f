"""The verb `serve`: answers requests over HTTP."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lightning.cli.flags import (
    add_engine_flags,
    add_settings,
    engine_config,
    environment_name,
    settings_of,
)
from moe_lightning.cli.measure_first import note_unmeasured
from moe_lightning.cli.notes import note
from moe_lightning.config import EngineConfig
from moe_lightning.errors import ConfigError

if TYPE_CHECKING:
    from moe_lightning.engine.plan import Plan
    from moe_lightning.llm import LLM
    from moe_lightning.server.batch_limits import BatchLimits
    from moe_lightning.server.config import ServerConfig

SUMMARY = "serve a model over HTTP (OpenAI's API)"
DESCRIPTION = (
    "Serves a model over HTTP with OpenAI's API: completions, chat completions, streaming, and more. Many requests "
    "at a time make it fast. It listens on this machine alone unless --host says otherwise."
)


def add_flags(parser: ArgumentParser) -> None:
    """Add the verb's flags."""
    from moe_lightning.server.batch_limits import BatchLimits
    from moe_lightning.server.config import ServerConfig

    parser.add_argument("model_dir", nargs="?", metavar="MODEL", help="checkpoint directory, as --model")
    add_settings(parser, ServerConfig, "server", "api_key")
    add_settings(parser, BatchLimits, "batches", "max_files")
    add_engine_flags(parser)


def run(args: Namespace) -> int:
    """Serve until a signal comes; the exit status.

    Raises:
        MoELightningError: something the user can act on.
    """
    from moe_lightning.server.batch_limits import BatchLimits
    from moe_lightning.server.config import ServerConfig

    if args.model_dir and args.model and args.model_dir != args.model:
        raise ConfigError(
            f"MODEL {args.model_dir!r} and --model {args.model!r} contradict each other; give one"
        )
    args.model = args.model_dir or args.model
    return serve(engine_config(args), settings_of(ServerConfig, args), settings_of(BatchLimits, args))


def serve(config: EngineConfig, server: ServerConfig, batch_limits: BatchLimits) -> int:
    """Load a model and serve it.

    Raises:
        MoELightningError: something the user can act on.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed; run `pip install 'moe-lightning[serve]'`"
        ) from error
    from moe_lightning.server.run import listen
    from moe_lightning.server.run import serve as run_server

    # Before minutes go into loading.
    listening = listen(server.host, server.port)
    if server.data_dir:
        from moe_lightning.server.batches import BatchService

        BatchService.check(Path(server.data_dir))
    llm, plan = _load(config, server)
    from moe_lightning.engine.garbage import collect_rarely
    from moe_lightning.server.app import Settings, create_app
    from moe_lightning.server.hosts import allowed_names, is_loopback

    host, port = listening.getsockname()[:2]
    app = create_app(
        llm,
        Settings(
            server.served_model_name, server.api_key, server.limits, plan.prediction if plan else None,
            Path(server.data_dir) if server.data_dir else None, batch_limits,
            allowed_names(host, server.allowed_hosts),
        ),
    )  # fmt: skip
    collect_rarely(is_server=True)
    if server.api_key is None and not is_loopback(host):
        note(
            f"everybody who reaches {host} can use this server; set {environment_name('api_key')} to ask for a key"
        )

    def on_ready() -> None:
        shown = f"[{host}]" if ":" in host else host
        print(f"{app.state.service.names[0]} is served at http://{shown}:{port}", flush=True)

    run_server(app, listening, on_ready)
    if plan and plan.rates:
        from moe_lightning.cli.beside_table import print_fullest

        print_fullest(llm, plan.rates)
    return 0


def _load(config: EngineConfig, server: ServerConfig) -> tuple[LLM, Plan | None]:
    from moe_lightning.engine.smaller_plan import built
    from moe_lightning.llm import LLM

    def planned(config: EngineConfig) -> Plan | None:
        return _plan(config, server)

    def build(plan: Plan | None) -> LLM:
        of_plan = {"policy": plan.policy, "max_model_len": plan.max_model_len} if plan else {}
        return LLM(**asdict(config) | of_plan)

    template = _read_template(server.chat_template)
    llm, plan = built(config, planned(config), planned, build)
    if plan:
        llm.keep_to(plan)
    if template is not None:
        llm.tokenizer.chat_template = template
    return llm, plan


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}") from error


def _plan(config: EngineConfig, server: ServerConfig) -> Plan | None:
    """The plan that should be fastest for what requests are expected to be; None without a GPU or with a policy."""
    import torch

    from moe_lightning.server.plan import Expected, describe, plan_to_serve

    if config.policy or config.device == "cpu" or not torch.cuda.is_available():
        return None
    expected = Expected.of(server.avg_prompt_len, server.gen_len)
    plan = plan_to_serve(config, expected)
    note(describe(plan, expected))
    note_unmeasured(plan)
    if server.avg_prompt_len is None:
        note("give --avg-prompt-len and --gen-len for a plan that suits your requests better")
    return plan
