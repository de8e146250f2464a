"""The tasks of the Long Range Arena: what each one is, not where its data lie."""

from dmx.tasks.base import TASKS, Published, Task, find_task, task_for, task_names

__all__ = ["TASKS", "Published", "Task", "find_task", "task_for", "task_names"]
