"""Writes `minilm_reference.npz`: what the sentence-transformers library gives for some sentences.

Run once, by hand: `python tests/unit/hub/make_minilm_reference.py FOLDER`, where FOLDER holds
all-MiniLM-L6-v2 and sentence-transformers is installed. It is no dependency of this project.
"""

import sys
from pathlib import Path

import numpy as np
import sentence_transformers

SENTENCES = [
    "A cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "The bus was late again this morning.",
    "",
    "Übermäßig naïve café: 東京, здравствуй, and $5.00!",
    "one",
    "The quick brown fox jumps over the lazy dog. " * 60,
]


def main() -> None:
    model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
    vectors = model.encode(SENTENCES, normalize_embeddings=True)
    version = f"sentence-transformers {sentence_transformers.__version__}"
    path = Path(__file__).with_name("minilm_reference.npz")
    np.savez_compressed(path, sentences=SENTENCES, vectors=vectors, made_by=version)


if __name__ == "__main__":
    main()
