"""Files that come from users: text in `text.py`, media in the other modules, through one decoder for every door.

`decode.py` opens media files and times frames, `pictures.py` reads with Pillow, `videos.py` with PyAV; `colour.py`
converts to sRGB.
"""
