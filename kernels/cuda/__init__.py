"""The CUDA side: kernels compiled at run time through CuPy, one module per method or kernel family."""
