"""An example for Airflow: copy it into your directory of DAGs. It is the one that README shows."""

import os
import subprocess
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import dag, task

from gpu_resource_extensions.airflow_tasks import gpu_allocation, use_gpus


@dag(schedule=None, default_args={"retries": 2})
def gpu_example() -> None:
    @task
    @gpu_allocation(2, 8)  # held as long as the processes of this task live
    def train(seed: int) -> None:
        subprocess.run(["sh", "-c", f"echo seed {seed} on GPUs $CUDA_VISIBLE_DEVICES"], check=True)

    @task
    def evaluate(gpus: dict[str, Any]) -> str:
        with use_gpus(gpus):
            return "evaluated on GPUs " + os.environ["CUDA_VISIBLE_DEVICES"]

    reserved = gpu_allocation(2, 8)
    with reserved as gpus:  # held from here until the last task of the block has ended
        report = BashOperator(
            task_id="report",
            bash_command="echo report on GPUs $CUDA_VISIBLE_DEVICES",
            env=gpus["environment"],
            append_env=True,
        )
        evaluate(gpus) >> report

    train.expand(seed=[1, 2, 3]) >> reserved.setup


gpu_example()
