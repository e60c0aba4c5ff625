"""What NOS does, in one minute; `make demo` runs it.

Starts a server of its own, reads 500 handwritten digits through a stream, finds the edges in photographs,
compares sentences by their meaning, prints one table, and stops the server without a trace.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nos
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

PICTURE = Path(__file__).resolve().parent.parent / "build" / "demo" / "edges.png"
NUM_HELD_OUT = 500
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
EDGE_ROUNDS = 10
SENTENCES = """
The cat is asleep on the sofa.
My kitten chases every fly.
Our old dog barks at the postman.
A fox crossed the garden last night.
The parrot has learned to whistle.
The bus was late because of the snow.
Our train stood still for an hour.
The flight to Lisbon is fully booked.
She rides her bicycle to work.
The ferry leaves at noon.
This phone needs a new battery.
The laptop will not start.
His printer is out of ink.
The update broke my keyboard.
The server answers in a millisecond.
Tomato soup tastes best with fresh basil.
Bake the bread until it sounds hollow.
Add a pinch of salt to the dough.
The curry was far too hot for me.
He only drinks coffee without sugar.
Her daughter plays the piano in the evening.
The choir rehearses every Tuesday.
The drummer lost his sticks.
They danced until the band went home.
An orchestra tunes to the oboe.
It rained for three days.
The wind took the tiles off the roof.
Fog hides the top of the tower.
We have never seen such a hot summer.
The lake is frozen in January.
The striker missed the penalty.
She won the marathon by a minute.
Our team lost the final again.
He lifts weights before breakfast.
The umpire called the ball out.
The bank raised its interest rates.
Rents have doubled in ten years.
The shop gives a discount to students.
My pension will not be enough.
Shares fell after the announcement.
""".strip().splitlines()
QUESTIONS = (
    "A feline is napping.",
    "Public transport had delays.",
    "How do I season a vegetable broth?",
    "My computer does not switch on any more.",
    "Housing has become expensive.",
)

# A pipe says no width; names of models are long.
console = Console(width=None if Console().is_terminal else 110)


@dataclass(kw_only=True)
class Measured:
    """What a model did."""

    model: str
    results: list[nos.Result]
    wall_s: float
    quality: str = ""

    def row(self) -> list[str]:
        times_s = sorted(result.timings.total_s for result in self.results)
        p50_s, p99_s = (times_s[int(share * (len(times_s) - 1))] for share in (0.5, 0.99))
        mean_batch = statistics.mean(result.timings.batch_size for result in self.results)
        return [
            self.model,
            str(len(self.results)),
            f"{len(self.results) / self.wall_s:.0f}",
            f"{p50_s * 1e3:.1f}",
            f"{p99_s * 1e3:.1f}",
            f"{mean_batch:.1f}",
            self.quality,
        ]


def run(model: nos.ModelHandle, inputs: Iterable[object], method: str = "__call__") -> Measured:
    """Load a model, send all inputs through one stream, and take all results."""
    model.load()
    start_s = time.perf_counter()
    with model.stream(method) as stream:
        for one in inputs:
            stream.send(one)
        results = list(stream)
    return Measured(model=model.name, results=results, wall_s=time.perf_counter() - start_s)


def classify_digits(client: nos.Client) -> Measured:
    digits = load_digits()
    images = digits.images.astype(np.float32)
    _, held_out, _, labels = train_test_split(
        images, digits.target, test_size=NUM_HELD_OUT, random_state=0
    )
    measured = run(client.model("nos/digits"), held_out, "labels")
    answers = [int(result.value) for result in measured.results]
    measured.quality = f"{np.mean(answers == labels):.1%} right"
    return measured


def find_edges(client: nos.Client) -> Measured:
    photographs = [getattr(data, name)() for name in PHOTOGRAPHS]
    measured = run(client.model("nos/edges"), photographs * EDGE_ROUNDS)
    edges = [result.value for result in measured.results[: len(photographs)]]
    save_picture(photographs, edges)
    same = all(np.array_equal(edges[0], result.value) for result in measured.results[::4])
    measured.quality = "all rounds equal" if same else "rounds differ"
    return measured


def save_picture(photographs: list[np.ndarray], edges: list[np.ndarray], height: int = 256) -> None:
    """Write the photographs in a row, and their edges below."""
    columns = []
    for photograph, edge in zip(photographs, edges, strict=True):
        width = round(photograph.shape[1] * height / photograph.shape[0])
        brighter = Image.fromarray(edge).point(lambda strength: min(255, 3 * strength))
        pair = [Image.fromarray(photograph), brighter.convert("RGB")]
        columns.append(np.vstack([np.asarray(image.resize((width, height))) for image in pair]))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.hstack(columns)).save(PICTURE)


def compare_sentences(client: nos.Client) -> Measured:
    encode = client.model("sentence-transformers/all-MiniLM-L6-v2")
    asked = encode(list(QUESTIONS))
    measured = run(encode, [[sentence] for sentence in SENTENCES])
    vectors = np.concatenate([result.value for result in measured.results])
    table = Table("asked", "nearest of 40 sentences", "likeness", title="Nearest neighbours")
    for question, likeness in zip(QUESTIONS, asked @ vectors.T, strict=True):
        nearest = int(likeness.argmax())
        table.add_row(question, SENTENCES[nearest], f"{likeness[nearest]:.2f}")
    console.print(table)
    return measured


def main() -> None:
    """Run the demo."""
    with tempfile.TemporaryDirectory(prefix="nos-demo-") as state_dir:
        client = nos.start(state_dir=state_dir, port=0, owned=True)
        try:
            rows = [classify_digits(client), find_edges(client), compare_sentences(client)]
            table = Table(title="One stream per model", caption=f"edges of photographs: {PICTURE}")
            for name in ("model", "frames", "frames/s", "p50 ms", "p99 ms", "mean batch", "result"):
                table.add_column(name, justify="left" if name in {"model", "result"} else "right")
            for measured in rows:
                table.add_row(*measured.row())
            console.print(table)
        finally:
            client.close()
            nos.stop(state_dir=state_dir)


if __name__ == "__main__":
    main()
