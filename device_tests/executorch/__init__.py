"""The target ``executorch``: the ``.pte`` of an export for Android, on this machine or on a phone."""
