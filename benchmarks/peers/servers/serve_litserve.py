"""LitServe: uvicorn in front, a worker behind ZeroMQ. PORT."""

import os
import sys
from typing import Annotated

import litserve
import workloads
from fastapi import Depends, Request, Response

WORKLOAD = workloads.served()
#: Waiting longer does not help it: its callers come back one by one.
WAIT_S = float(os.environ.get("PEER_WAIT_MS", "1")) / 1e3


class Body:
    """A request's bytes. It prints short: LitServe formats every request for its log, written or not."""

    def __init__(self, data: bytes) -> None:
        self.data = data


async def body_of(request: Request) -> Body:
    """Read a request."""
    return Body(await request.body())


class Api(litserve.LitAPI):
    """Runs each request alone."""

    def setup(self, device: str) -> None:
        """Make the model."""
        del device
        self.model = workloads.Model(WORKLOAD)

    def decode_request(self, request: Annotated[Body, Depends(body_of)]) -> workloads.Array:
        """Take the tensor's bytes."""
        return WORKLOAD.tensor(request.data)

    def predict(self, x: workloads.Array) -> workloads.Array:
        """Run the model."""
        return self.model.one(x)

    def encode_response(self, output: workloads.Array) -> Response:
        """Give the answer's bytes."""
        return Response(content=output.tobytes(), media_type="application/octet-stream")


class BatchedApi(Api):
    """Runs what waits together."""

    def batch(self, inputs: list[workloads.Array]) -> list[workloads.Array]:
        """Leave them apart; the model joins them."""
        return inputs

    def predict(self, x: list[workloads.Array]) -> list[workloads.Array]:
        """Run the model."""
        return self.model.many(x)

    def unbatch(self, output: list[workloads.Array]) -> list[workloads.Array]:
        """Return one answer for each."""
        return output


if __name__ == "__main__":
    if WORKLOAD.max_batch > 1:
        api = BatchedApi(max_batch_size=WORKLOAD.max_batch, batch_timeout=WAIT_S)
    else:
        api = Api()
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=1, fast_queue=True, timeout=60
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
