"""HTTP to model: an OpenAI-compatible server over one batching engine and one copy of the weights.

    from cafe.serving.run import serve

    serve("tiny", index="photos.index", port=8000, ui=True)   # blocks until SIGTERM or Ctrl-C

run.py          `serve`: socket, signals, draining
app.py          all routes as one application
routes/         embeddings, chat, responses, rerank, search, …: one file each
page/           the web page
middleware.py   what every request passes: keys, hosts, sizes, draining, disconnected clients
page_auth.py    which of the page's routes a browser may reach, and its cookie
service.py      what the routes share
schema….py      schemas of the requests
answering.py    what the routes that generate share
streams.py      answers as streams of events
tools.py        tools of a chat, and calls of them in an answer
content.py      their texts and images -> conversations
fetch.py        remote images, where they are allowed
limits.py       limits of requests, and budgets that they share
errors.py       errors in OpenAI's shape
metrics.py      counters for Prometheus
engine.py       the queue, its batches and the one thread that owns the model
messages.py     what requests, engine and model exchange
model_calls.py  runs the engine's batches on a `CAFe`
decoding.py     generation in steps
detokenize.py   tokens of an answer -> text, as a stream
"""
