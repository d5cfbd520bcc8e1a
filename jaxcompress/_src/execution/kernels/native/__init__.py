"""Compiled CPU kernels: an optional part, built when the package is installed where there is a C++ compiler."""
