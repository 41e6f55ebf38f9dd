"""Loads a model in a separate process, as any user would: `python -m dstune.lakehouse.load_registered URI

FOLDER OUT.npy`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(place: str, out: str) -> None:
    """Write the model's output for the probe. place: `models:/...` in the registry that the environment names, or an export."""
    import mlflow.pyfunc
    import numpy as np

    if Path(place).is_dir():
        from dstune.lakehouse import registered_model

        np.save(out, registered_model.probe(registered_model.load_export(place)[1]))
        return
    loaded = mlflow.pyfunc.load_model(place).unwrap_python_model()
    np.save(out, sys.modules[type(loaded).__module__].probe(loaded.model))


if __name__ == "__main__":
    main(*sys.argv[1:])
