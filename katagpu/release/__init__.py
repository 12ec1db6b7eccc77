"""Releases of a finished guest: made, signed, published, and installed on a host that runs Kata.

What `pyz.MODULES` names runs on that host too, with Python 3.9 and its standard library alone.
"""
