"""What Airflow is told of us as one of its providers. Airflow reads it at every start, so it imports nothing."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return what ``airflow providers get gpu-resource-manager`` shows."""
    name, tasks = "GPU resource manager", ["gpu_resource_extensions.airflow_tasks"]
    return {
        "package-name": "gpu-resource-manager",  # that of the distribution, or Airflow refuses to start
        "name": name,
        "description": "GPUs of a few servers, shared between several people",
        "integrations": [{"integration-name": name}],
        "operators": [{"integration-name": name, "python-modules": tasks}],
        "triggers": [{"integration-name": name, "python-modules": tasks}],
    }
