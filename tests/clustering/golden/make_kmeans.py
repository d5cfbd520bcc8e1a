"""Writes kmeans.npz with scikit-learn 1.7.2 (k-means: weighted Lloyd from many starts, and its assignment).

python -m venv V && V/bin/pip install scikit-learn==1.7.2 && V/bin/python make_kmeans.py
"""

import importlib.metadata
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans

assert importlib.metadata.version("scikit-learn") == "1.7.2"

out = {}
for case, (shape, count, weighted) in enumerate([((37, 11), 4, False), ((29, 53), 8, True), ((7, 5, 3, 9), 6, True)]):
    rng = np.random.default_rng(case)
    x = rng.standard_t(4, size=shape)
    h = rng.gamma(0.5, size=shape) if weighted else np.ones(shape)
    fitted = KMeans(count, n_init=40, tol=0.0, max_iter=1000, random_state=0).fit(x.reshape(-1, 1), None, h.ravel())
    order = np.argsort(fitted.cluster_centers_[:, 0])
    place = np.argsort(order)
    out |= {
        f"{case}/values": x,
        f"{case}/weights": h,
        f"{case}/centers": fitted.cluster_centers_[order, 0],
        f"{case}/labels": place[fitted.predict(x.reshape(-1, 1))].reshape(shape).astype(np.uint8),
        f"{case}/inertia": np.float64(fitted.inertia_),
    }
np.savez_compressed(Path(__file__).with_name("kmeans.npz"), **out)
