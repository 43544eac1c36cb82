"""`cafe ui`: `cafe serve --ui` with what a person at a browser needs."""

from __future__ import annotations

from cafe.cli import serve
from cafe.cli.arguments import ApiKey, Host, Model, Port, ServedIndex


def command(
    model: Model,
    index: ServedIndex = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
) -> None:
    """Search and ask on a web page.

    The same server as cafe serve --ui, which has more options.
    """
    serve.command(model, index=index, host=host, port=port, api_key=api_key, ui=True)
