"""Samples rollouts: engines, student and teacher actors, the trust region, the blending service."""
