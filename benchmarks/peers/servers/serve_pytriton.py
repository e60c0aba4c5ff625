"""PyTriton: tritonserver in front of a function in this process. PORT GRPC_PORT METRICS_PORT."""

import sys
from typing import Any

import numpy as np
import workloads
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

WORKLOAD = workloads.served()
MODEL = workloads.Model(WORKLOAD)


def infer(requests: list[Any]) -> list[dict[str, workloads.Array]]:
    """Answer what waits together; each request has its own leading dimension."""
    if WORKLOAD.name == "frame":
        return [{"y": np.stack([MODEL.one(frame) for frame in it["x"]])} for it in requests]
    return [{"y": y} for y in MODEL.many([it["x"] for it in requests])]


if __name__ == "__main__":
    http_port, grpc_port, metrics_port = map(int, sys.argv[1:])
    shape, answer = WORKLOAD.shape[1:], WORKLOAD.answer_shape[1:]
    if WORKLOAD.name == "frame":
        shape, answer = WORKLOAD.shape, WORKLOAD.answer_shape
    delay_us = round(workloads.wait_s() * 1e6) if WORKLOAD.max_batch > 1 else 0
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=http_port,
        grpc_address="127.0.0.1",
        grpc_port=grpc_port,
        metrics_address="127.0.0.1",
        metrics_port=metrics_port,
    )
    with Triton(config=config) as triton:
        triton.bind(
            WORKLOAD.name,
            infer,
            inputs=[Tensor(name="x", dtype=np.dtype(WORKLOAD.dtype).type, shape=shape)],
            outputs=[Tensor(name="y", dtype=np.float32, shape=answer)],
            config=ModelConfig(
                max_batch_size=4 if WORKLOAD.name == "frame" else workloads.MAX_BATCH,
                batcher=DynamicBatcher(max_queue_delay_microseconds=delay_us),
            ),
        )
        triton.serve()
