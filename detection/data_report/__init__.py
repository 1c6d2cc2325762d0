"""What `nats data` says of a data set: checks, figures, drawn samples.

Imports `data` and `pictures`.
"""
