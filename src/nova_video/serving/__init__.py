"""`nova serve`: an API, a page and live streams over one queue of jobs, which one thread works off.

It may import `common`, `io`, `model`, `autoencoders`, `sampling`, `fast`, `text`, `pipeline` and `data`.
"""
