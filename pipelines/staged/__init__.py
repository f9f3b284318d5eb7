"""Sampling in stages of several sizes: schedules, transitions, and one running call."""
