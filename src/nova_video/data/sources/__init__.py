"""Sources of media with captions: folders, tar files, tables of `datasets`, and users' own; one module a kind.

    open_source(SourceSettings("clips/")).items()  ->  Iterator[Item]

They import the records of `data/stages.py`, and `data/encode.py` reads them.
"""

from nova_video.data.sources.find_source import expand_braces, open_source
from nova_video.data.sources.source import MediaSource, SourceSettings, group_name
from nova_video.data.sources.table_source import TableSource

__all__ = ["MediaSource", "SourceSettings", "TableSource", "expand_braces", "group_name", "open_source"]
