"""Live widgets: plain ES modules, without a build and without a CDN."""

from __future__ import annotations

from nos_jupyter.widgets.cluster_panel import ClusterPanel
from nos_jupyter.widgets.inference_panel import InferencePanel
from nos_jupyter.widgets.memory_profile import MemoryProfile
from nos_jupyter.widgets.model_browser import ModelBrowser
from nos_jupyter.widgets.register_model import RegisterModel
from nos_jupyter.widgets.stream_player import StreamPlayer

__all__ = [
    "ClusterPanel",
    "InferencePanel",
    "MemoryProfile",
    "ModelBrowser",
    "RegisterModel",
    "StreamPlayer",
]
