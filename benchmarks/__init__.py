"""Measuring: problems, timing, floors, peers and reports. `scripts/` holds the command lines; what they do lives here.

Who calls whom: scripts -> report, sweep, model_sweep -> methods, timing, floors, cases -> kernels (and models).
"""
