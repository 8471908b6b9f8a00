"""This machine as a server of a pool: its GPUs by NVML (package ``nvidia-ml-py``)."""

from __future__ import annotations

import os
import sys

from gpu_resource_manager_v01 import ResourceManagerError, ServerDescription, host_name, say


class DetectionError(ResourceManagerError):
    """Asking: the number of GPUs cannot be known here, or it is 0."""

    exit_code, code = 2, "detection_failed"
    template = "{problem}\n  対処: {remedy}--init --server NAME:GPUS:CPUS で台数を指定してください"

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy


def detected_server() -> ServerDescription:
    """Return this machine: host name, GPUs by NVML, CPUs by the kernel.

    :raises DetectionError: the number of GPUs cannot be known here, or it is 0.
    """
    try:
        import pynvml
    except ImportError as error:
        problem = say("GPU の数が分かりません: nvidia-ml-py を読み込めません ({})", error)
        remedy = say("この Python ({}) に pip で nvidia-ml-py をインストールするか、", sys.executable)
        raise DetectionError(problem, remedy) from error
    try:
        pynvml.nvmlInit()
        try:
            gpus: int = pynvml.nvmlDeviceGetCount()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        problem, remedy = say("GPU の数が分かりません: NVML: {}", error), say("ドライバを確認するか、")
        raise DetectionError(problem, remedy) from error
    if not gpus:
        raise DetectionError(say("この計算機に NVIDIA GPU はありません"), "")
    return host_name(), gpus, os.cpu_count() or 1
