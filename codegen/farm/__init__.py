"""Measuring on other machines: TVM's RPC tracker hands out devices, and a measurer spreads its jobs over them.

Tracker, servers and sessions are TVM's own; here is what starts and ends them cleanly, and what does not believe them.
Nothing here imports TVM but the modules that end in ``_child``, each of which is a process of its own.
"""
