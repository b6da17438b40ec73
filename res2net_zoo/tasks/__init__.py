"""The paper's downstream tasks on backbones of the zoo (Gao et al., TPAMI 2021, Tables 5 to 10).

A task is one class in one file: its network, losses, predictions, data and metrics. Shared code is in `base`
(a model and its folder), `evaluation` and `training`.
"""

from importlib import import_module

from res2net_zoo.tasks.base import TaskModel, load, load_settings

__all__ = ["TASKS", "TaskModel", "load", "load_settings", "task_class"]

# Imported on demand: each task has its own optional dependencies.
TASKS = {
    "detection": "Detection",
    "keypoints": "Keypoints",
    "saliency": "Saliency",
    "segmentation": "Segmentation",
}


def task_class(task: str) -> type[TaskModel]:
    """Return the class of a task in `TASKS`."""
    return getattr(import_module(f"res2net_zoo.tasks.{task}"), TASKS[task])
