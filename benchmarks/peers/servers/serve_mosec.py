"""mosec: a front in Rust, a worker in Python behind a UNIX socket. Takes mosec's own flags."""

import os

import workloads
from mosec import Server, Worker

WORKLOAD = workloads.served()
#: With batches its timer costs a lone caller a millisecond, without them each request costs more.
BATCH = int(os.environ.get("PEER_BATCH", "32" if WORKLOAD.name == "mlp" else "8"))


class Single(Worker):
    """Runs each request alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = workloads.Model(WORKLOAD)

    def deserialize(self, data: bytes) -> workloads.Array:
        """Take the tensor's bytes."""
        return WORKLOAD.tensor(data)

    def serialize(self, data: workloads.Array) -> bytes:
        """Give the answer's bytes."""
        return data.tobytes()

    def forward(self, data: workloads.Array) -> workloads.Array:
        """Run the model."""
        return self.model.one(data)


class Batched(Single):
    """Runs what waits together."""

    def forward(self, data: list[workloads.Array]) -> list[workloads.Array]:
        """Run the model."""
        return self.model.many(data)


if __name__ == "__main__":
    server = Server()
    wait_ms = 1 if WORKLOAD.max_batch == 1 else max(1, round(workloads.wait_s() * 1e3))
    if BATCH == 1 or WORKLOAD.name == "frame":
        server.append_worker(Single)
    else:
        server.append_worker(Batched, max_batch_size=BATCH, max_wait_time=wait_ms)
    server.run()
