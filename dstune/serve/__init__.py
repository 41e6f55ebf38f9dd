"""Trained models behind an OpenAI-compatible API: engines, the gateway in front of them, and the store of keys.

`dstune serve` starts engines as processes of their own, proves that each answers as the model that was trained
(`parity.py`), and opens the gateway (`gateway/`).
"""
