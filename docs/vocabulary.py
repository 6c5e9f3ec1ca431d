"""Writes the words of a prepared world into the folder of a model that was trained in it.

python docs/vocabulary.py data/emoji src/nova_video/models/emoji
"""

import sys
from pathlib import Path

from nova_worlds import EmojiWorld

world, folder = map(Path, sys.argv[1:])
EmojiWorld.load(world).vocabulary(frames=(1, 17), pairs=True).save(folder)
