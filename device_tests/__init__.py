"""Exports of edgeguard on real devices: golden vectors, agreement, timings. ``python -m device_tests --help``."""
