"""`cafe serve` and `cafe ui`: embeddings, chat and reranking over HTTP in OpenAI's formats.

`cafe ui` is `cafe serve --ui` with the options that a person at a browser needs.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from cafe.cli.arguments import Model
from cafe.cli.config_file import ConfigOption

IndexOption = Annotated[
    str | None, typer.Option("--index", metavar="DIR", help="An index to search as well.")
]
HostOption = Annotated[
    str, typer.Option(help="Address to listen on; any but this machine's needs an API key.")
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(envvar="CAFE_API_KEY", help="Key that clients send and the web page asks for."),
]


class LogLevel(StrEnum):
    """Of messages; the access log is one that was asked for, and is written at any."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def command(
    model: Model,
    index: IndexOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key: ApiKeyOption = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum number of inputs per batch.")] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="How long an input waits for others to fill a batch.")
    ] = 5.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Number of waiting inputs beyond which requests get 429.")
    ] = 256,
    prefix_cache_mb: Annotated[
        int,
        typer.Option(min=0, help="Memory (MiB) for images that are asked about again; 0: none."),
    ] = 256,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch images from public URLs.")
    ] = False,
    ui: Annotated[bool, typer.Option("--ui", help="Also serve a web page, at /ui.")] = False,
    access_log: Annotated[
        bool,
        typer.Option(
            "--access-log", help="Log each request as a line of JSON, without its contents."
        ),
    ] = False,
    log_level: Annotated[
        LogLevel, typer.Option(help="The least serious messages that are logged.")
    ] = LogLevel.INFO,
    config: ConfigOption = None,
) -> None:
    """Serve the model over HTTP.

    Routes: /v1/embeddings, /v1/chat/completions, /v1/responses, /v1/rerank, /v1/models, /search,
    /health, /ready, /metrics. On SIGTERM and Ctrl-C, running requests are finished first.
    """
    logging.getLogger("cafe").setLevel(log_level.value.upper())
    from cafe.errors import CafeError

    try:
        from cafe.serving.run import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cafe"):
            raise
        raise CafeError(f"cafe serve needs {error.name}: pip install 'cafe-vlm[serve]'") from error

    serve(
        model,
        index=index,
        host=host,
        port=port,
        api_key=api_key,
        max_batch=max_batch,
        max_wait_seconds=max_wait_ms / 1000,
        max_queue=max_queue,
        prefix_cache_mb=prefix_cache_mb,
        allow_remote_images=allow_remote_images,
        ui=ui,
        access_log=access_log,
        report=partial(print, flush=True),
    )


def ui_command(
    model: Model,
    index: IndexOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key: ApiKeyOption = None,
) -> None:
    """Search and ask on a web page.

    The same server as cafe serve --ui, which has more options.
    """
    command(model, index=index, host=host, port=port, api_key=api_key, ui=True)
