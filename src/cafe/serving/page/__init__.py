"""The web page: search an index, look at the results, ask about an image.

mount.py         gradio inside the server's application, and the login form
layout.py        the whole page: both panels, and the connection between them
search_panel.py  a search, and a gallery of its hits
ask_panel.py     an image, a question, and the answer as it is generated
components.py    parts of both panels: notes, an image box and its check
turns.py         runs a visitor's search or question on the engine, as the other routes do
thumbnails.py    small copies of the hits' images
style.css        the styles of the page
login.html       the login form
"""
