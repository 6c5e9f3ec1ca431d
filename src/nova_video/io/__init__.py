"""Files that come from users and go to them: text, pictures and video, and locks and atomic writes in `files.py`.
One decoder serves every door: `decode.py` opens media, `pictures.py` reads by Pillow and `videos.py` by PyAV.

It may import `common`.
"""
