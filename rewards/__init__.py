"""Judges completions: graders, the killable grading pool, pass@k."""

from rewards.pass_at_k import pass_at_k

__all__ = ["pass_at_k"]
