"""Learns from rollouts: advantages, losses, DeepSpeed ranks, weight publication."""
