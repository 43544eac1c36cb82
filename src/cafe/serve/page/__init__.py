"""The web page: search an index, look at what is found, ask about a picture.

mount.py        gradio inside the server's application, and the form that asks for the key
layout.py       the whole page: its two halves side by side, and what joins them
search_half.py  a search, and a gallery of what it finds
ask_half.py     a picture, a question, and the answer as it is written
given.py        where a visitor gives a picture, and what events say that was given
told.py         what the page tells a visitor
turns.py        a search or a question of a visitor -> the engine, as the other routes do it
pictures.py     hits -> small copies of their pictures
style.css       how it looks; login.html: the form
"""
