"""What a GPU host needs before Kata can use its GPUs: `katagpu host`, and `katagpu-host.pyz`.

These modules run on that host too, with Python 3.9 and its standard library alone.
"""
