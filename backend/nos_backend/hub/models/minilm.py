"""`sentence-transformers/all-MiniLM-L6-v2`: sentence embeddings.

The network is written out here rather than taken from transformers, whose import alone cost 2.3 s and
149 MB in every executor (2-core machine, transformers 5.23); this file adds 0.02 s and 3 MB.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional

REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
#: The files of the model and what they must hash to.
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
WIDTH, NUM_HEADS, NUM_LAYERS, INNER_WIDTH = 384, 12, 6, 1536
NUM_WORDS, NUM_POSITIONS, NUM_TYPES = 30522, 512, 2
NORM_EPSILON = 1e-12
#: Longer sentences are cut, as the reference does.
MAX_TOKENS = 256
#: Sentences of one forward pass; bounds the memory that a long list takes.
MAX_BATCH = 32
#: Our names of a layer's parts, and those of the file.
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "joined": "attention.output.dense",
    "joined_norm": "attention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "narrow_norm": "output.LayerNorm",
}


class Layer(nn.Module):
    """One transformer layer, normalised after each half as in BERT (Devlin et al., 2018).

    Shapes: B sentences, T tokens, D width, N heads, H width of a head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.joined = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.joined_norm = nn.LayerNorm(WIDTH, NORM_EPSILON)
        self.widen = nn.Linear(WIDTH, INNER_WIDTH)
        self.narrow = nn.Linear(INNER_WIDTH, WIDTH)
        self.narrow_norm = nn.LayerNorm(WIDTH, NORM_EPSILON)

    def forward(self, x_BTD: torch.Tensor, mask_B11T: torch.Tensor) -> torch.Tensor:
        """Let each token look at the tokens of its sentence, then at itself."""
        query_BNTH, key_BNTH, value_BNTH = (
            part(x_BTD).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        seen_BNTH = functional.scaled_dot_product_attention(
            query_BNTH, key_BNTH, value_BNTH, attn_mask=mask_B11T
        )
        seen_BTD = seen_BNTH.transpose(1, 2).flatten(-2)
        x_BTD = self.joined_norm(x_BTD + self.joined(seen_BTD))
        wide = functional.gelu(self.widen(x_BTD))
        result: torch.Tensor = self.narrow_norm(x_BTD + self.narrow(wide))
        return result


class Network(nn.Module):
    """Tokens in, one vector per sentence out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, WIDTH)
        self.positions = nn.Embedding(NUM_POSITIONS, WIDTH)
        self.types = nn.Embedding(NUM_TYPES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, NORM_EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))

    def forward(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Return unit vectors (B, D): the mean over a sentence's tokens, normalised.

        Args:
            tokens_BT: Token numbers, int64.
            mask_BT: True where there is a token, False where there is padding.
        """
        x_BTD = self.words(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        x_BTD = self.norm(x_BTD + self.types.weight[0])
        mask_B11T = mask_BT[:, None, None, :]
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask_B11T)
        mask_BT1 = mask_BT.unsqueeze(-1)
        mean_BD = (x_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        return functional.normalize(mean_BD, dim=-1)


class MiniLM:
    """Turns sentences into vectors whose dot product says how close in meaning they are.

    The weights are those of `sentence-transformers/all-MiniLM-L6-v2` (Apache-2.0), checked by their sha256;
    the vectors equal those of the sentence-transformers library to 1e-4. It was trained on English.

    Example:
        >>> encode = client.model("sentence-transformers/all-MiniLM-L6-v2")
        >>> vectors = encode(["A cat.", "A kitten.", "A bus."])
        >>> vectors.shape, bool(vectors[0] @ vectors[1] > vectors[0] @ vectors[2])
        ((3, 384), True)
    """

    def __init__(self, folder: str = "", device: str = "cpu") -> None:
        """Load the weights.

        Args:
            folder: Where `model.safetensors` and `tokenizer.json` lie; if empty or not there they are taken
                from the Hugging Face cache, or fetched.
            device: As torch writes it.

        Raises:
            ValueError: If a file is not what it must be.
        """
        files = {name: _read(name, folder) for name in FILES}
        self.tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()
        # Not made on the meta device: its first use imports 800 modules of torch, 0.7 s.
        self.network = Network()
        weights = _renamed(safetensors.torch.load(files["model.safetensors"]))
        self.network.load_state_dict(weights, assign=True)
        self.device = device

    def __call__(self, sentences: list[str]) -> Annotated[torch.Tensor, "float32[batch, 384]"]:
        """Return one unit vector per sentence; the same as `encode`.

        Args:
            sentences: Any number of texts.
        """
        return self.encode(sentences)

    def encode(self, sentences: list[str]) -> Annotated[torch.Tensor, "float32[batch, 384]"]:
        """Return one unit vector per sentence.

        Args:
            sentences: Any number of texts; of each the first 256 tokens count.

        Returns:
            Vectors of length 1, shape (n, 384), in the order of the sentences.
        """
        vectors = torch.empty(len(sentences), WIDTH, device=self.device)
        # Sentences of like length share a batch, so that little of it is padding.
        order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
        for start in range(0, len(order), MAX_BATCH):
            batch = order[start : start + MAX_BATCH]
            encoded = self.tokenizer.encode_batch([sentences[index] for index in batch])
            tokens = torch.tensor([line.ids for line in encoded], device=self.device)
            mask = torch.tensor([line.attention_mask for line in encoded], device=self.device)
            vectors[batch] = self.network(tokens, mask.bool())
        return vectors


def _read(name: str, folder: str) -> bytes:
    """Return a file of the model, checked."""
    path = Path(folder, name) if folder else Path()
    if not path.is_file():
        # Needed only where the file is not at hand.
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(REPOSITORY, name, revision=REVISION))
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != FILES[name]:
        raise ValueError(f"{path}: expected sha256 {FILES[name]}, got {digest}")
    return data


def _renamed(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the file's tensors under our names."""
    names = {
        "words.weight": "embeddings.word_embeddings.weight",
        "positions.weight": "embeddings.position_embeddings.weight",
        "types.weight": "embeddings.token_type_embeddings.weight",
        "norm.weight": "embeddings.LayerNorm.weight",
        "norm.bias": "embeddings.LayerNorm.bias",
    }
    for index in range(NUM_LAYERS):
        for ours, theirs in PARTS.items():
            for kind in ("weight", "bias"):
                names[f"layers.{index}.{ours}.{kind}"] = f"encoder.layer.{index}.{theirs}.{kind}"
    return {ours: weights[theirs] for ours, theirs in names.items()}
