"""An own text encoder: a fixed random vector for each word. Real ones have weights; two members are all that is needed.

nova encode clips -o dataset --text-encoder own_text_encoder:WordVectors
nova train recipe.toml        # with text_encoder = "own_text_encoder:WordVectors", run where this file is
pipe = NovaPipeline.from_pretrained("runs/own/model", text_encoder=WordVectors())
"""

import zlib

import torch
from torch import Tensor


class WordVectors:
    """A vector for each word of a text, drawn from a generator that the word seeds."""

    width = 32

    def encode(self, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Features (N, max_length, width), zero behind a text's words, and the number of its words (N,)."""
        features = torch.zeros(len(texts), max_length, self.width)
        words = [text.lower().split()[:max_length] for text in texts]
        for row, found in enumerate(words):
            for place, word in enumerate(found):
                generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                features[row, place] = torch.randn(self.width, generator=generator)
        return features, torch.tensor([len(found) for found in words])
