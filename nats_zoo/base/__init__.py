"""What everything stands on: errors, files, strict reading, text and tables, names of files.

Imports nothing of this package but its version.
"""
