"""The target ``gguf`` on this machine."""
