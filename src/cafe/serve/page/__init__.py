"""The web page: search an index, look at what is found, ask about a picture.

mount.py      gradio inside the server's application, and the form that asks for the key
layout.py     what is on the page, and which function answers what
turns.py      a search or a question of a visitor -> the engine, as the other routes do it
pictures.py   hits -> small copies of their pictures
style.css     how it looks; login.html: the form
"""
