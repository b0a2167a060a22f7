"""The figures of the PagedAttention paper (SOSP 2023, arXiv 2309.06180), with this repository's scheduler and pool.

    python -m benchmarks.paper            # all figures: tables, docs/paper/*.png and *.svg
    python -m benchmarks.paper --quick    # shorter traces, no files

Requests have prescribed lengths. Ours is the real engine with its real scheduler and block pool over a model that only
costs time, on a virtual clock; the baselines reserve contiguous memory from a buddy allocator. A step costs every
system the same: `costs.step_seconds`. The savings of beam search are counted in real searches of the bundled model.
"""
