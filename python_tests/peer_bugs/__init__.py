"""Bugs that other implementations had, each as a test of ours with its number in docs/reliability.md."""
