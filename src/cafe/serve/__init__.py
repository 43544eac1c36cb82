"""HTTP to model: an OpenAI-compatible server over one batching engine and one copy of the weights.

app.py        routes: embeddings, chat, rerank, models, search, health, metrics
schema.py     what requests may say
content.py    their texts and pictures -> conversations
fetch.py      remote pictures, where they are allowed
gate.py       keys, hosts, sizes, draining, vanished clients
engine.py     the queue, its batches and the one thread that owns the model
decoding.py   generation that can be stepped
calls.py      how a batch is asked of the model
run.py        socket, signals, drain
door.py       what a browser may reach of the page, and its cookie
page/         the web page
"""
