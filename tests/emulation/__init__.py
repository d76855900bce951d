"""The kernels' own source on a machine without a GPU.

``kernels_cu`` is compiled by g++ with emulated twins of ``kernels_cu/ptx`` (folder ``ptx`` here) and run by the machine
in ``machine.cpp``; :mod:`tests.emulation.fake_cupy` stands in for CuPy, so that everything from ``cudistr.attention``
to the launch is the code that runs on a GPU. See docs/contributing.md, "Without a GPU".
"""
