"""What training and search share: a run's options, folder, loop, processes.

Imports `models`, `data` and `metrics`.
"""
