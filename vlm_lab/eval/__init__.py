"""Evaluation: tasks (what is asked), runner (what is answered), metrics (what it is worth)."""
