"""BentoML. Bytes where it takes them: its batches it makes of JSON only, from outside."""

import bentoml
import numpy as np
import workloads

WORKLOAD = workloads.served()


@bentoml.service(
    workers=1,
    traffic={"timeout": 60, "max_concurrency": 4096},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Peer:
    """The model."""

    def __init__(self) -> None:
        self.model = workloads.Model(WORKLOAD)

    @bentoml.api(route="/predict")
    async def predict(self, x: bytes, /) -> bytes:
        """Run one request."""
        return self.model.one(WORKLOAD.tensor(x)).tobytes()

    @bentoml.api(
        route="/batched", batchable=True, max_batch_size=workloads.MAX_BATCH, max_latency_ms=10000
    )
    async def batched(self, x: np.ndarray) -> np.ndarray:
        """Run what waits together."""
        return self.model.rows(np.asarray(x, np.float32))
