"""``edgeguard bench``: what a guard costs on this machine, measured through the public API.

The parent process (:mod:`~edgeguard.bench.measure`) computes nothing: every engine and every peer lives in a process of
its own (:mod:`~edgeguard.bench.worker`), so that memory is that engine's, and is asked in turn, one call each, so that
drift of the machine hits all alike. What comes out is a :class:`~edgeguard.bench.records.Record`, one to one with the
JSON that ``schema.json`` describes; tables, plot and comparison are drawn from a record alone.
"""
