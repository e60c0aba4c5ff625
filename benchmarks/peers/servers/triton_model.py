"""The model for Triton's Python backend, which finds this class by its name."""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as backend
import workloads


class TritonPythonModel:
    """The model; its name is the workload."""

    def initialize(self, args: dict[str, str]) -> None:
        """Make it."""
        self.workload = workloads.WORKLOADS[json.loads(args["model_config"])["name"]]
        self.model = workloads.Model(self.workload)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer what waits together."""
        inputs = [backend.get_input_tensor_by_name(it, "x").as_numpy() for it in requests]
        if self.workload.name == "frame":
            answers = [np.stack([self.model.one(frame) for frame in x]) for x in inputs]
        else:
            answers = self.model.many(inputs)
        return [backend.InferenceResponse([backend.Tensor("y", y)]) for y in answers]
