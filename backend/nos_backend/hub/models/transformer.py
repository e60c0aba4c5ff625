"""Models of the Hugging Face hub by their task: image classification, feature extraction, text generation.

Weights are read from safetensors files only, and no code of a repository runs unless its registration
allows it. Needs transformers.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
import transformers
from PIL import Image

#: Texts of one forward pass; bounds the memory that a long list takes.
MAX_BATCH = 32


class _Pretrained:
    """A network of a repository, and what prepares its inputs."""

    #: Their classes in transformers.
    _PREPARER = ""
    _NETWORK = ""

    def __init__(
        self,
        repository: str,
        revision: str = "main",
        folder: str = "",
        remote_code: bool = False,
        device: str = "cpu",
    ) -> None:
        """Load the weights.

        Args:
            repository: Its name on the hub, for instance `openai-community/gpt2`.
            revision: A branch, tag or commit of it.
            folder: Where its files lie; if empty they are taken from the hub's cache, or fetched.
            remote_code: Run Python code of the repository where its network needs that.
            device: As torch writes it.
        """
        options: dict[str, Any] = {"trust_remote_code": remote_code}
        if not folder:
            options["revision"] = revision
        source = folder or repository
        self.device = device
        self.prepare = getattr(transformers, self._PREPARER).from_pretrained(source, **options)
        kind = getattr(transformers, self._NETWORK)
        self.network = kind.from_pretrained(source, use_safetensors=True, **options)
        self.network.eval().to(device)


class ImageClassifier(_Pretrained):
    """Says what is in an image."""

    _PREPARER = "AutoImageProcessor"
    _NETWORK = "AutoModelForImageClassification"

    def __call__(self, image: Image.Image, num_labels: int = 5) -> list[dict[str, Any]]:
        """Return the likeliest labels with their scores, the best first.

        Args:
            image: RGB, of any size.
            num_labels: At most so many.
        """
        inputs = self.prepare(images=image.convert("RGB"), return_tensors="pt").to(self.device)
        scores_L = self.network(**inputs).logits[0].float().softmax(-1)
        best = scores_L.topk(min(num_labels, len(scores_L)))
        names = self.network.config.id2label
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"label": names[index], "score": score} for index, score in pairs]


class FeatureExtractor(_Pretrained):
    """Turns texts into vectors: the mean over a text's tokens of the network's last layer."""

    _PREPARER = "AutoTokenizer"
    _NETWORK = "AutoModel"

    def __call__(self, texts: list[str]) -> Annotated[torch.Tensor, "float32[batch, width]"]:
        """Return one vector per text, in the order of the texts.

        Args:
            texts: Any number; a text longer than the network takes is cut.
        """
        rows = []
        for start in range(0, len(texts), MAX_BATCH):
            inputs = self.prepare(
                texts[start : start + MAX_BATCH], padding=True, truncation=True, return_tensors="pt"
            ).to(self.device)
            x_BTD = self.network(**inputs).last_hidden_state.float()
            mask_BT1 = inputs["attention_mask"].unsqueeze(-1)
            rows.append((x_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1))
        return torch.cat(rows) if rows else torch.empty(0, self.network.config.hidden_size)


class TextGenerator(_Pretrained):
    """Continues a text, token by token."""

    _PREPARER = "AutoTokenizer"
    _NETWORK = "AutoModelForCausalLM"

    def __call__(
        self, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0
    ) -> Iterator[str]:
        """Yield what follows the prompt, piece by piece as it comes.

        Args:
            prompt: Any text; at least one token.
            max_new_tokens: Stops after so many; earlier where the network ends the text.
            temperature: 0 takes the likeliest token each time; more makes it more varied.
        """
        tokens_BT = self.prepare(prompt, return_tensors="pt").input_ids.to(self.device)
        ends = self.network.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        known: list[int] = []
        told, past = "", None
        for _ in range(max_new_tokens):
            out = self.network(input_ids=tokens_BT, past_key_values=past, use_cache=True)
            past = out.past_key_values
            token = self._choose(out.logits[0, -1].float(), temperature)
            if token in ends:
                return
            known.append(token)
            text = self.prepare.decode(known, skip_special_tokens=True)
            # A character may take several tokens; until it is whole it decodes to this mark.
            if len(text) > len(told) and not text.endswith("\ufffd"):
                yield text[len(told) :]
                told = text
            tokens_BT = torch.tensor([[token]], device=self.device)

    def generate(self, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0) -> str:
        """Return what follows the prompt, whole."""
        return "".join(self(prompt, max_new_tokens, temperature))

    @staticmethod
    def _choose(logits_V: torch.Tensor, temperature: float) -> int:
        if temperature <= 0:
            return int(logits_V.argmax())
        return int(torch.multinomial((logits_V / temperature).softmax(-1), 1))
