"""The target ``web``, in headless Chromium on this machine."""
