"""`cafe serve`: embeddings, chat and reranking over HTTP, in OpenAI's shapes; and a web page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import ApiKey, Host, Model, Port, ServedIndex

if TYPE_CHECKING:
    from cafe.index import Index
    from cafe.serve.calls import CafeCalls


def command(
    model: Model,
    index: ServedIndex = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most inputs computed together.")] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="How long an input waits for company.")
    ] = 5.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Waiting inputs before 429.")] = 256,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch pictures from public addresses.")
    ] = False,
    ui: Annotated[bool, typer.Option("--ui", help="Also serve a web page, at /ui.")] = False,
) -> None:
    """Serve the model over HTTP.

    Routes: /v1/embeddings, /v1/chat/completions, /v1/rerank, /v1/models, /search, /health,
    /ready, /metrics. SIGTERM and Ctrl-C finish the running requests first.
    """
    from cafe.errors import CafeError

    try:
        from cafe.serve.finding import IndexSearch
        from cafe.serve.run import Server, Settings
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cafe"):
            raise
        raise CafeError(f"cafe serve needs {error.name}: pip install 'cafe-vlm[serve]'") from error

    searched = None if index is None else _opened(index)

    def load() -> CafeCalls:
        from cafe.cli.index_model import open_model
        from cafe.model.vlm import CAFe
        from cafe.serve.calls import CafeCalls

        if searched is None:
            return CafeCalls(CAFe.from_pretrained(model))
        return CafeCalls(open_model(model, searched)[0])

    settings = Settings(
        name=Path(model).resolve().name if Path(model).is_dir() else model,
        host=host,
        port=port,
        api_key=api_key,
        max_batch=max_batch,
        max_wait_seconds=max_wait_ms / 1000,
        max_queue=max_queue,
        allow_remote_images=allow_remote_images,
        page=ui,
    )
    search = None if searched is None else IndexSearch(searched)
    server = Server(load, settings, search, None if search is None else search.root)
    print(f"loading {model}", flush=True)
    server.run(lambda url: print(f"serving {settings.name} on {url}{'/ui' * ui}", flush=True))


def _opened(uri: str) -> Index:
    from cafe.index import Index

    return Index.open(uri)
