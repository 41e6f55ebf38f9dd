"""Text generation: all that writes tokens with a model in memory stands on this room.

`batch.py` has the decoding step: rows padded on the left share a forward pass, and join or leave between two tokens. `sampler.py`
chooses tokens by the noise of `noise.py`. `completions.py` writes what the model in training answers, `serve` what its local engine
answers. `answers.py` writes batches of texts with `generate` of transformers.
"""
