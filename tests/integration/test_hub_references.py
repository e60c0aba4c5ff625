"""Repositories of the Hugging Face hub become models: transformers itself, on tiny networks."""

import nos
import pytest
import torch
from nos.errors import InvalidRequestError
from PIL import Image

from tests.servers import start_server

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from nos_backend.hub.models import transformer  # noqa: E402 - it imports transformers

WORDS = {word: number for number, word in enumerate(("[UNK]", "[PAD]", "a", "b", "c", "d"))}


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


TINY = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder whose `weights` has three tiny repositories."""
    root = tmp_path_factory.mktemp("hub")
    weights = root / "weights"
    generator = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=6, n_embd=8, n_layer=1, n_head=1, n_positions=32, eos_token_id=None
        )
    )
    generator.save_pretrained(weights / "tiny" / "gpt")
    save_tokenizer(weights / "tiny" / "gpt")
    extractor = transformers.BertModel(transformers.BertConfig(vocab_size=6, hidden_size=8, **TINY))
    extractor.save_pretrained(weights / "tiny" / "bert")
    save_tokenizer(weights / "tiny" / "bert")
    classifier = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=8, image_size=16, patch_size=8, num_labels=3, **TINY)
    )
    classifier.save_pretrained(weights / "tiny" / "vit")
    preparer = transformers.models.vit.ViTImageProcessorPil(size={"height": 16, "width": 16})
    preparer.save_pretrained(weights / "tiny" / "vit")
    return root


@pytest.fixture
def weights(root):
    return root / "weights"


@pytest.fixture(scope="module")
def client(root):
    """A client of a server that has them at hand."""
    server = start_server(root, "--idle-shutdown-s", "0")
    with nos.connect(server.address, token_file=str(server.token_file)) as connected:
        yield connected
    server.stop()


@pytest.mark.timeout(300)  # two executors import transformers
def test_text_generation_streams_its_tokens(client):
    made = client.register("hf:tiny/gpt", task="text-generation", check=False)
    assert made.name == "tiny/gpt"
    model = client.model("tiny/gpt")
    pieces = list(model("a b", max_new_tokens=4))
    assert pieces
    assert model.generate("a b", max_new_tokens=4) == "".join(pieces)


def test_feature_extraction_gives_a_vector_per_text(weights):
    extract = transformer.FeatureExtractor("tiny/bert", folder=str(weights / "tiny" / "bert"))
    with torch.inference_mode():
        vectors = extract(["a b c", "d"])
        torch.testing.assert_close(vectors[1:], extract(["d"]), atol=1e-5, rtol=1e-4)
    assert vectors.shape == (2, 8)


def test_image_classification_gives_labels_the_best_first(weights):
    classify = transformer.ImageClassifier("tiny/vit", folder=str(weights / "tiny" / "vit"))
    with torch.inference_mode():
        found = classify(Image.new("RGB", (20, 30)))
    assert {item["label"] for item in found} == {"LABEL_0", "LABEL_1", "LABEL_2"}
    scores = [item["score"] for item in found]
    assert scores == sorted(scores, reverse=True)


def test_weights_that_are_no_safetensors_are_refused(weights, tmp_path):
    for path in (weights / "tiny" / "bert").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        transformer.FeatureExtractor("tiny/bert", folder=str(tmp_path))


@pytest.mark.parametrize(
    ("reference", "task", "told"),
    [
        ("hf:../secrets", "text-generation", "org/name"),
        ("hf:tiny/gpt@", "text-generation", "org/name"),
        ("hf:tiny/gpt", "poetry", "image-classification, feature-extraction, text-generation"),
        ("hf:tiny/gpt", "", "text-generation"),
    ],
)
def test_wrong_reference_or_task_is_named(client, reference, task, told):
    with pytest.raises(InvalidRequestError, match=told):
        client.register(reference, task=task)
